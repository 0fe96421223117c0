"""Text to token ids and back: byte-pair encoding with nine special tokens, and the form conversations have in tokens.

`Tokenizer` is jaxchat's own, in Rust; `HuggingFaceTokenizer` has the same interface for files that only Hugging Face's
`tokenizers` can reproduce; `load_tokenizer` takes the one that fits.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from etils import epath

from jaxchat.errors import UserError
from jaxchat.tokenizer.base import FILE_NAME, MIN_VOCAB, SPECIAL_TOKENS, BaseTokenizer
from jaxchat.tokenizer.bpe import Tokenizer
from jaxchat.tokenizer.foreign.formats import Unsupported
from jaxchat.tokenizer.foreign.huggingface import HuggingFaceTokenizer
from jaxchat.tokenizer.patterns import SPLIT_PATTERN

__all__ = [
    "FILE_NAME",
    "MIN_VOCAB",
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "BaseTokenizer",
    "HuggingFaceTokenizer",
    "Tokenizer",
    "load_tokenizer",
]


def load_tokenizer(
    path: epath.PathLike, backend: Literal["auto", "rust", "huggingface"] = "auto"
) -> Tokenizer | HuggingFaceTokenizer:
    """The tokenizer of a folder with a `tokenizer.json`, of such a file, or of a `.tiktoken` file.

    `auto` is the Rust one, and the Hugging Face one for files that Rust cannot reproduce exactly. Raises `UserError`
    when there is none, it is damaged, or not for the backend asked for."""
    path = epath.Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if path.suffix == ".tiktoken":
        tokenizer = Tokenizer.from_tiktoken(path)
        return HuggingFaceTokenizer.from_text(tokenizer.to_json()) if backend == "huggingface" else tokenizer
    if backend == "huggingface":
        return HuggingFaceTokenizer.from_file(path)
    try:
        return Tokenizer.from_file(path)
    except Unsupported as why:
        if backend == "rust":
            raise
        if find_spec("tokenizers") is None:
            raise UserError(f"{why}; pip install tokenizers") from None
        return HuggingFaceTokenizer.from_file(path)
