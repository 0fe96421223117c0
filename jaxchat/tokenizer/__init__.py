"""Text to token ids and back: byte-pair encoding with nine special tokens, and the token format of conversations.

`Tokenizer` is jaxchat's own, in Rust. `HuggingFaceTokenizer` has the same interface for files that only Hugging Face's
`tokenizers` can reproduce. `load_tokenizer` chooses the one that fits.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from etils import epath

from jaxchat.errors import UserError
from jaxchat.tokenizer.base import FILE_NAME, MIN_VOCAB, SPECIAL_TOKENS, BaseTokenizer
from jaxchat.tokenizer.bpe import Tokenizer
from jaxchat.tokenizer.files import holds_ranks, tokenizer_file
from jaxchat.tokenizer.foreign.huggingface_backend import HuggingFaceTokenizer
from jaxchat.tokenizer.patterns import SPLIT_PATTERN
from jaxchat.tokenizer.vocabulary import Unsupported

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
    """Loads the tokenizer in a `tokenizer.json`, a `.tiktoken` file, a folder with one of them, or a run directory.

    What a file is, its content says: its name may be another.

    Args:
      backend: "auto" uses Rust, or Hugging Face for files that Rust cannot reproduce exactly.

    Raises:
      UserError: the file is missing, damaged, or not possible with the backend.
    """
    path = tokenizer_file(path)
    if holds_ranks(path):
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
