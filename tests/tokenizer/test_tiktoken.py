"""Vocabularies from tiktoken and back, with its ids."""

from __future__ import annotations

import base64
from functools import cache

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer, load_tokenizer
from jaxchat.tokenizer.patterns import CL100K_PATTERN, O200K_PATTERN, R50K_PATTERN, SPLIT_PATTERN
from tests.tokenizer.files import END, GAPS, foreign, ids_of, same, trained
from tests.tokenizer.texts import ANY, corpus


@cache
def encoding(name: str) -> tiktoken.Encoding:
    """Small encodings that resemble the published ones in the places of special tokens and unused ids."""
    pattern = {"r50k": R50K_PATTERN, "p50k": R50K_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN}[name]
    ranks = Tokenizer.train_from_iterator(corpus(25, 10_000), 500, pattern=pattern).mergeable_ranks
    n = len(ranks)
    special = {END: n}
    if name == "p50k":  # in the middle of the ranks
        special = {END: n - 20}
        ranks = {token: rank + (rank >= n - 20) for token, rank in ranks.items()}
    if name == "cl100k":  # one unused before, many between
        special = {END: n + 1, "<|fim_prefix|>": n + 2, "<|endofprompt|>": n + 20}
    if name == "o200k":
        special = {END: n + 3, "<|endofprompt|>": n + 5}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@cache
def from_encoding(name: str) -> tuple[Tokenizer, tiktoken.Encoding, str]:
    tokenizer = Tokenizer.from_tiktoken(encoding(name))
    return tokenizer, tokenizer.to_tiktoken(), tokenizer.to_json()


NAMES = ["r50k", "p50k", "cl100k", "o200k"]


@given(ANY, st.sampled_from(NAMES))
@example("", "cl100k")
@example(f"a{END} <|fim_prefix|>", "p50k")
@settings(max_examples=400, deadline=None)
def test_ids_of_an_encoding(text, name):
    tokenizer, back, saved = from_encoding(name)
    ids = encoding(name).encode_ordinary(text)
    assert tokenizer.encode(text) == ids == back.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert ids_of(text, saved) == ids


@given(st.text(st.sampled_from("a \ud83d\ude00\udfff\ud800"), max_size=8))
@settings(max_examples=50, deadline=None)
def test_lone_surrogates_of_an_encoding(text):
    assert from_encoding("o200k")[0].encode(text) == encoding("o200k").encode_ordinary(text)


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_of_an_encoding(name, tmp_path):
    tokenizer, back, _ = from_encoding(name)
    special = encoding(name)._special_tokens
    assert special.items() <= tokenizer.special_tokens.items()
    assert sorted(tokenizer.special_tokens.values())[-9:] == list(range(tokenizer.vocab_size))[-9:]
    assert tokenizer.bos_token_id == encoding(name).n_vocab
    sizes = tokenizer.token_bytes()
    assert [id for id in range(tokenizer.vocab_size) if not sizes[id]] == sorted(tokenizer.special_tokens.values())
    for token, rank in encoding(name)._mergeable_ranks.items():
        assert tokenizer.id_to_bytes(rank) == token
    for special_name, id in special.items():
        assert tokenizer.decode([id]) == special_name == back.decode([id])
        assert back.encode(special_name, allowed_special="all") == [id]
    tokenizer.save(tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)
    assert same(Tokenizer.from_tiktoken(back), tokenizer)


def test_unused_ids():
    tokenizer, back, _ = from_encoding("cl100k")
    unused = encoding("cl100k").max_token_value - 20  # directly after the ranks
    assert tokenizer.special_tokens[f"<|unused_{unused}|>"] == unused
    assert tokenizer.decode([unused]) == f"<|unused_{unused}|>"


def test_published_patterns():
    assert openai_public.r50k_pat_str == R50K_PATTERN
    source = open(openai_public.__file__).read()
    assert CL100K_PATTERN in source and all(part in source for part in O200K_PATTERN.split("|[")[0].split("|\\p{N}"))


def write_ranks(path, ranks):
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("stem, name", {"gpt2": "r50k", "r50k_base": "r50k", "p50k_base": "p50k",
                                        "cl100k_base": "cl100k", "o200k_base": "o200k"}.items())  # fmt: skip
def test_a_tiktoken_file(tmp_path, stem, name):
    peer = encoding(name)
    path = write_ranks(tmp_path / f"{stem}.tiktoken", peer._mergeable_ranks)
    tokenizer = load_tokenizer(path)
    assert tokenizer.pattern == peer._pat_str
    other = load_tokenizer(path, "huggingface")
    for text in corpus(26, 400):
        assert tokenizer.encode(text) == peer.encode_ordinary(text) == other.encode(text)


def test_a_tiktoken_file_of_another_pattern(tmp_path):
    path = write_ranks(tmp_path / "cl100_base.tiktoken", trained(GAPS)[0].mergeable_ranks)
    with pytest.raises(UserError, match="the split pattern of .*cl100_base.tiktoken is unknown.*mean 'cl100k_base'"):
        load_tokenizer(path)
    assert same(Tokenizer.from_tiktoken(path, GAPS), trained(GAPS)[0])


DAMAGED_RANKS = {
    b"YQ== 0\nYg== x\n": "line 2 is not a token in base64 and its rank",
    b"YQ== 0\n\nY! 1\n": "line 3 is not a token in base64 and its rank",
    b"YQ== 0\nYQ== 1\n": "line 2 repeats the token of rank 0",
    b"YQ== 0\nYg== 0\n": "two tokens have the id 0",
    b"YQ== 0\nYg== 1\n": "no token for the single byte",
    b"YQ== 0\nYg== 1000\n": "do not fill the ids 0 to 1000: ranks must be 0 to 1 without gaps",
    b"": "there are no ranks",
}


@pytest.mark.parametrize("content", DAMAGED_RANKS)
def test_a_damaged_tiktoken_file(tmp_path, content):
    path = tmp_path / "gpt2.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} .*{DAMAGED_RANKS[content]}.*$"):
        load_tokenizer(path)


def test_impossible_encodings(tokenizer):
    ranks = tokenizer.mergeable_ranks

    def load(ranks, special, pattern=r"[a-z]+|\s"):
        Tokenizer.from_tiktoken(tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))

    for missing, special, why in (
        (300, {}, "rank 300 is missing"),
        (300, {END: 300}, f"rank 300 is the special token '{END}'".replace("|", r"\|")),
    ):
        fewer = {token: rank for token, rank in ranks.items() if rank != missing}
        with pytest.raises(UserError, match=f"ranks must be 0 to 889 without gaps, with special tokens after.*{why}"):
            load(fewer, special)
        load(fewer, special, SPLIT_PATTERN)  # which keeps `<|endoftext|>` apart
    with pytest.raises(UserError, match="two tokens have the id 5"):
        load(ranks, {END: 5})
    with pytest.raises(UserError, match="the split pattern does not compile"):
        Tokenizer.from_tiktoken(tokenizer.to_tiktoken(), pattern="(")


def test_vocabularies_that_tiktoken_cannot_represent():
    with pytest.raises(UserError, match="tiktoken has no rule for the merges of this vocabulary"):
        Tokenizer.from_text(foreign("gpt2")).to_tiktoken()
