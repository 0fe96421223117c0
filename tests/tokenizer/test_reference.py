"""The Rust tokenizer and tiktoken against the reference: byte-pair encoding in plain Python."""

from __future__ import annotations

import doctest
import functools

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

import jaxchat_tokenizer as rust
from jaxchat.tokenizer import reference
from jaxchat.tokenizer.patterns import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN, SPLIT_PATTERN
from tests.tokenizer.texts import HARD, WORDS, corpus

PATTERNS = {
    "ours": SPLIT_PATTERN,
    "GPT-2's": R50K_PATTERN,
    "cl100k's": CL100K_PATTERN,
    "o200k's": O200K_PATTERN,
    "with gaps": r"[a-k]+|\p{N}\s|[^\x00-\x7f]{2}",
    "with a group": r"\s*(\p{L}+|\p{N})|\s",
    "with a backreference": r"(\p{L})\1+|\p{L}+?(?=(\p{L})\2)|\p{L}+|[^\p{L}]",
    "with a lookbehind": r"(?<=\s)\p{L}+|(?<![\s\p{L}])\p{L}{1,2}|[\s\p{N}]+",
}
# Only characters that Python knows: recent letters of Unicode are not letters in every library yet.
KNOWN = st.characters(exclude_categories=["Cs", "Cn"])
TEXT = (
    st.text(KNOWN, max_size=40)
    | HARD
    | st.text(st.sampled_from("  'lLsS/aA1Ǆǅǆ\r\n\x1c\u0085"), max_size=40)
    | st.text(st.sampled_from("ab \ud83d\ude00\udfff\ud800"), max_size=12)  # lone surrogates
    | st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join)
)


@functools.cache
def learned(name: str) -> tuple[list[bytes], rust.Encoder, tiktoken.Encoding]:
    """The tokenizers of 150 merges of a pattern, in both libraries."""
    tokens = reference.train(corpus(0, 1500), 406, PATTERNS[name])
    return tokens, *encoders(tokens, PATTERNS[name])


def encoders(tokens: list[bytes], pattern: str) -> tuple[rust.Encoder, tiktoken.Encoding]:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    peer = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return rust.Encoder(tokens, [], pattern), peer


def test_the_example_worked_out_by_hand():
    assert doctest.testmod(reference) == (0, 4)


@pytest.mark.parametrize("name", PATTERNS)
def test_training_on_a_corpus(name):
    texts = corpus(1, 1500) + ["aaaaaaa " * 9, "ababababab abab", ""]
    tokens = reference.train(texts, 456, PATTERNS[name])
    assert len(tokens) > 350
    assert rust.train(iter(texts), 456, PATTERNS[name]) == tokens


@given(st.lists(TEXT, max_size=5), st.sampled_from(sorted(PATTERNS)), st.integers(256, 300))
@example([], "ours", 300)
@example(["a" * 30, "ab" * 9], "ours", 300)  # only ties, and merges that overlap themselves
@settings(max_examples=300, deadline=None)
def test_training_on_any_text(texts, name, size):
    """Most of these texts have fewer merges than requested; then all of them are learned."""
    assert rust.train(texts, size, PATTERNS[name]) == reference.train(texts, size, PATTERNS[name])


@given(st.lists(TEXT | st.text("ab-"), max_size=5), st.integers(1, 9), st.integers(256, 300))
@example(["-" * 99], 7, 300)
@settings(max_examples=200, deadline=None)
def test_no_token_is_longer_than_the_limit(texts, longest, size):
    tokens = reference.train(texts, size, longest=longest)
    assert rust.train(texts, size, SPLIT_PATTERN, longest=longest) == tokens
    assert max(map(len, tokens)) <= longest


@given(TEXT, st.sampled_from(sorted(PATTERNS)))
@example("", "ours")
@example("'\u017f 'LL 'Ve'rE", "ours")
@example("z" * 300 + "ka" * 100, "ours")
@settings(max_examples=400, deadline=None)
def test_encoding(text, name):
    tokens, encoder, peer = learned(name)
    ids = reference.encode(text, tokens, PATTERNS[name])
    assert encoder.encode([text]) == [ids]
    assert peer.encode_ordinary(text) == ids


@given(
    st.lists(st.binary(min_size=2, max_size=5) | st.text("ab ", min_size=2).map(str.encode), unique=True),
    TEXT,
    st.randoms(),
)
@settings(max_examples=200, deadline=None)
def test_encoding_with_a_vocabulary_that_was_not_learned(longer, text, rng):
    """Any bytes can be tokens, at any rank: some unreachable by merges, some made by two pairs of neighbours."""
    tokens = [bytes([byte]) for byte in range(256)] + longer
    rng.shuffle(tokens)
    encoder, peer = encoders(tokens, SPLIT_PATTERN)
    text += "abba ab" + b"".join(longer).decode(errors="ignore")
    ids = reference.encode(text, tokens)
    assert encoder.encode([text]) == [ids]
    assert peer.encode_ordinary(text) == ids


@given(st.lists(st.integers(0, 405), max_size=40))
@settings(max_examples=200, deadline=None)
def test_decoding(ids):
    tokens, encoder, peer = learned("ours")
    assert reference.decode(ids, tokens) == encoder.decode(ids).decode(errors="replace") == peer.decode(ids)


def test_the_pieces_between_which_nothing_is_merged():
    assert reference.split("I'll pay 1234.") == [b"I", b"'ll", b" pay", b" ", b"12", b"34", b"."]
    assert reference.split("ab--ab", "[a-z]+") == [b"ab", b"ab"]
    assert reference.split("x\ud800", "(?s).") == [b"x", "\ufffd".encode()]


def test_it_shows_its_work(capsys):
    reference.main("banana bandana\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        r"15 bytes in 3 pieces: banana _bandana \n",
        r"256  a + n (4x):  b|an|an|a _|b|an|d|an|a \n",
        r"257  b + an (2x):  ban|an|a _|ban|d|an|a \n",
    ]
    assert lines[-1].endswith(r"banana _bandana \n")
