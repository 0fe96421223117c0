"""Text to token ids and back: byte-pair encoding with nine special tokens, and the form conversations have in tokens.

`Tokenizer` is jaxchat's own, in Rust; `HuggingFaceTokenizer` has the same interface for files that only Hugging Face's
`tokenizers` can reproduce; `load_tokenizer` takes the one that fits.
"""

from __future__ import annotations

from jaxchat.tokenizer.base import FILE_NAME, MIN_VOCAB, SPECIAL_TOKENS, BaseTokenizer
from jaxchat.tokenizer.bpe import Tokenizer
from jaxchat.tokenizer.patterns import SPLIT_PATTERN

__all__ = ["FILE_NAME", "MIN_VOCAB", "SPECIAL_TOKENS", "SPLIT_PATTERN", "BaseTokenizer", "Tokenizer"]
