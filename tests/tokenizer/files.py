"""Tokenizers of several kinds as files, and the ids that Hugging Face gives with them."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxchat.tokenizer import Tokenizer
from jaxchat.tokenizer.patterns import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    R50K_PATTERN,
    SPLIT_PATTERN,
)
from tests.tokenizer.texts import corpus

GAPS = r"[a-z]+|\p{N}{1,3}| \p{Lu}"  # matches only a small part of a text
EMPTY = r"[a-z]*|\s+"  # also matches the empty string
PATTERNS = [SPLIT_PATTERN, GPT2_PATTERN, R50K_PATTERN, CL100K_PATTERN, O200K_PATTERN, GAPS, EMPTY]
END = "<|endoftext|>"


@cache
def huggingface(file: str, spelled: bool = True) -> tokenizers.Tokenizer:
    """Hugging Face's tokenizer for a file; with `spelled`, text that spells special tokens becomes these."""
    peer = tokenizers.Tokenizer.from_str(file)
    peer.encode_special_tokens = not spelled
    return peer


def ids_of(text: str, file: str) -> list[int]:
    """Hugging Face's ids of a text."""
    return huggingface(file, spelled=False).encode(text, add_special_tokens=False).ids


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return one._vocabulary == other._vocabulary


@cache
def trained(pattern: str) -> tuple[Tokenizer, str]:
    tokenizer = Tokenizer.train_from_iterator(corpus(20, 10_000), 500, pattern=pattern)
    return tokenizer, tokenizer.to_json()


def _split(pattern, behavior="isolated", invert=False):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior, invert), byte_level])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama": lambda: _split(tokenizers.Regex(SPLIT_PATTERN.replace("{1,2}", "{1,3}"))),
    "gaps": lambda: _split(tokenizers.Regex(GAPS)),
    "empty": lambda: _split(tokenizers.Regex(EMPTY)),
    "dropped": lambda: _split(tokenizers.Regex(GAPS), "removed", invert=True),
    "string": lambda: _split("t"),
    "dot": lambda: _split(". "),
}


@cache
def foreign(kind: str, *, ignore_merges: bool = False, special: tuple[str, ...] = (END, "[PAD]")) -> str:
    """The tokenizer.json of a vocabulary trained by Hugging Face; its special tokens follow it and are not listed."""
    peer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    peer.pre_tokenizer = PRE_TOKENIZERS.get(kind, PRE_TOKENIZERS["gpt2"])()
    peer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(
        corpus(21, 20_000), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    peer.add_special_tokens(list(special))
    if kind == "normalizer":
        peer.normalizer = tokenizers.normalizers.NFC()
    return peer.to_str()
