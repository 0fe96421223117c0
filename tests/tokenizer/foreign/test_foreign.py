"""A foreign tokenizer.json gives the same ids as the library that wrote it."""

from __future__ import annotations

import json
import pickle
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from jaxchat.errors import UserError
from jaxchat.tokenizer import FILE_NAME, SPECIAL_TOKENS, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxchat.tokenizer.patterns import (
    GPT2_PATTERN,
    O200K_PATTERN,
    SPLIT_PATTERN,
    for_oniguruma,
    read_differently,
)
from tests.tokenizer.files import (
    END,
    GAPS,
    PRE_TOKENIZERS,
    foreign,
    huggingface,
    ids_of,
    same,
)
from tests.tokenizer.texts import ANY, corpus


@cache
def loaded(kind: str, ignore_merges: bool) -> tuple[Tokenizer, str, str]:
    """A foreign tokenizer, its file, and the file that jaxchat writes for it."""
    file = foreign(kind, ignore_merges=ignore_merges)
    tokenizer = Tokenizer.from_text(file)
    return tokenizer, file, tokenizer.to_json()


@given(ANY, st.sampled_from(sorted(PRE_TOKENIZERS)), st.booleans())
@example("", "gpt2", False)
@example("  the  12345's \n\n", "gpt2", False)
@example("AB!? cd, 12345 -- ef", "gaps", False)
@example("AB!? 12", "empty", True)
@example("tttt test", "string", False)
@settings(max_examples=500, deadline=None)
def test_foreign_ids_equal_huggingfaces(text, kind, ignore_merges):
    tokenizer, file, saved = loaded(kind, ignore_merges)
    ids = ids_of(text, file)
    assert tokenizer.encode(text) == ids == ids_of(text, saved)
    if kind not in ("dropped",):
        assert tokenizer.decode(ids) == text


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=12),
    st.lists(st.text("abc", min_size=2, max_size=5), max_size=4),
    st.randoms(),
    st.booleans(),
    st.lists(st.text("aabbc", max_size=70), min_size=5, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_any_merges_in_any_order(pairs, unreachable, rng, ignore_merges, texts):
    """Ranks need not be ids, two pairs may make one token, and tokens need not be reachable."""
    tokens, merges = list("abc"), []
    for left, right in pairs:
        left, right = tokens[left % len(tokens)], tokens[right % len(tokens)]
        merges.append([left, right])
        tokens += [left + right] if left + right not in tokens else []
    tokens = list(dict.fromkeys([*pre_tokenizers.ByteLevel.alphabet(), *tokens, *unreachable]))
    rng.shuffle(tokens)
    rng.shuffle(merges)
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges}
    data = {**edited(), "model": {**edited()["model"], **model, "ignore_merges": ignore_merges}, "added_tokens": []}
    tokenizer, peer = Tokenizer.from_text(json.dumps(data)), tokenizers.Tokenizer.from_str(json.dumps(data))
    saved = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    for text in texts:
        assert tokenizer.encode(text) == peer.encode(text).ids == saved.encode(text).ids


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZERS))
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_foreign_tokenizer_is_saved_unchanged(tmp_path, kind, ignore_merges):
    tokenizer, _, _ = loaded(kind, ignore_merges)
    tokenizer.save(tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)
    assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    # Through Hugging Face, which drops the facts that jaxchat adds.
    again = Tokenizer.from_text(huggingface(tokenizer.to_json()).to_str())
    text = " ".join(corpus(22, 500))
    assert again.encode(text) == tokenizer.encode(text)


def test_whole_pieces_and_merges_differ():
    """`ignore_merges` is not lost: without it, this vocabulary never reaches the token of a whole piece."""
    data = json.loads(foreign("gpt2"))
    data["model"]["merges"] = []
    plain = Tokenizer.from_text(json.dumps(data))
    data["model"]["ignore_merges"] = True
    whole = Tokenizer.from_text(json.dumps(data))
    assert plain.encode("the") == [plain.encode(letter)[0] for letter in "the"]
    assert len(whole.encode("the")) == 1 and whole.encode(" the there") != plain.encode(" the there")


def test_special_tokens_of_a_foreign_tokenizer():
    file = foreign("gpt2", special=(END, "<|bos|>", "[PAD]"))
    tokenizer, peer = Tokenizer.from_text(file), huggingface(file)
    assert [tokenizer.special_tokens[name] for name in (END, "<|bos|>", "[PAD]")] == [600, 601, 602]
    missing = [name for name in SPECIAL_TOKENS if name != "<|bos|>"]
    assert [tokenizer.encode_special(name) for name in missing] == list(range(603, 611))
    assert tokenizer.vocab_size == 611 and tokenizer.bos_token_id == 601
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (611,) and not sizes[600:].any() and sizes[:600].all()
    text = f"a{END}<|bos|>[PAD]<|user_start|>"
    assert max(tokenizer.encode(text)) < 600 and tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        tokenizer.decode([600, 610, *tokenizer.encode("x")])
        == f"{END}<|output_end|>x"
        == peer.decode([600], skip_special_tokens=False) + "<|output_end|>x"
    )
    saved = huggingface(tokenizer.to_json())
    assert saved.encode(f"{END}<|output_end|>").ids == [600, 610]


@pytest.mark.parametrize("place", ["first", "last"])
def test_special_tokens_that_the_vocabulary_lists(place):
    """GPT-2 lists its only one, the last; trainers of Hugging Face list theirs first."""
    data = json.loads(foreign("gpt2"))
    vocab = data["model"]["vocab"]
    names = sorted(vocab, key=vocab.get)
    names = [END, *names] if place == "first" else [*names, END]
    data["model"]["vocab"] = {name: id for id, name in enumerate(names)}
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] == END]
    data["added_tokens"][0]["id"] = names.index(END)
    file = json.dumps(data)
    tokenizer = Tokenizer.from_text(file)
    assert tokenizer.encode_special(END) == names.index(END) and tokenizer.bos_token_id == 601
    assert tokenizer.token_bytes()[names.index(END)] == 0 and END.encode() not in tokenizer.mergeable_ranks
    for text in [*corpus(23, 300), f"x{END} the"]:
        ids = tokenizer.encode(text)
        assert ids == ids_of(text, file) == ids_of(text, tokenizer.to_json())
        assert names.index(END) not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([names.index(END), 601]) == END + "<|bos|>"
    assert same(Tokenizer.from_text(tokenizer.to_json()), tokenizer)


def test_merges_as_strings_and_twice():
    data = json.loads(foreign("gpt2"))
    merges = data["model"]["merges"]
    data["model"]["merges"] = [merges[5], *merges[:5], merges[9], *merges[5:]]  # the later rank counts
    twice = json.dumps(data)
    data["model"]["merges"] = ["#version: 0.2", *map(" ".join, data["model"]["merges"])]
    strings = json.dumps(data)
    for text in corpus(24, 300):
        ids = ids_of(text, twice)
        assert Tokenizer.from_text(twice).encode(text) == Tokenizer.from_text(strings).encode(text) == ids


def edited(**changes):
    data = json.loads(foreign("gpt2"))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return data


def with_token(**facts):
    data = json.loads(foreign("gpt2"))
    data["added_tokens"].append({**data["added_tokens"][0], "content": "<new>", "id": 602, **facts})
    return data


def without(name):
    """The vocabulary without a token, so that an id is missing."""
    data = json.loads(foreign("gpt2"))
    del data["model"]["vocab"][name]
    return data


def split(pattern, behavior="Isolated"):
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [part, byte_level]})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
UNSUPPORTED = {
    "NFC": (edited(normalizer={"type": "NFC"}), r"it normalizes text \(NFC\)"),
    "dropout": (edited(model__dropout=0.1), "its model sets dropout"),
    "suffix": (edited(model__end_of_word_suffix="</w>"), "its model sets end_of_word_suffix"),
    "no splitting": (edited(pre_tokenizer=None), "it does not split text into bytes"),
    "space": (edited(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "it adds a space before every text"),
    "no regex": (edited(pre_tokenizer={**BYTE_LEVEL, "use_regex": False}), "it splits text twice or not at all"),
    "digits": (
        edited(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}),
        "it splits text by Digits, ByteLevel",
    ),
    "decoder": (edited(decoder={"type": "Fuse"}), "its decoder is Fuse"),
    "gap": (without("the"), r"its ids have a gap or are used twice"),
    "distant": (with_token(id=700), "its added tokens do not follow the vocabulary"),
    "text": (with_token(special=False), "its added token '<new>' is not special"),
    "merged": (split(r"\S+|\s+", "MergedWithNext"), "its split pattern's matches are MergedWithNext"),
    "line ends": (split(r"^\S+|\s+$|[^a]"), r"its split pattern has '\^', which"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_vocabularies_for_hugging_face_only(tmp_path, name):
    data, why = UNSUPPORTED[name]
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "the" not in ("".join(m), *m)]
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"^{tmp_path / FILE_NAME} needs the Hugging Face backend: {why}.*$"):
        load_tokenizer(tmp_path, "rust")
    with pytest.raises(UserError, match=why):
        Tokenizer.from_file(tmp_path / FILE_NAME)
    if name not in ("distant", "gap"):
        assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_plain_text_that_would_become_a_special_token():
    """With whole pieces, `no` would become the special token of that name."""
    data = json.loads(foreign("gpt2", ignore_merges=True))
    vocab = data["model"]["vocab"]
    data["added_tokens"] = [{**data["added_tokens"][0], "content": "the", "id": vocab["the"]}]
    with pytest.raises(UserError, match="plain text may become its special token 'the'"):
        Tokenizer.from_text(json.dumps(data))
    assert vocab["the"] not in HuggingFaceTokenizer.from_text(json.dumps(data)).encode("the")


def test_which_backend(tmp_path, monkeypatch):
    (tmp_path / FILE_NAME).write_text(foreign("gpt2"))
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
    assert isinstance(load_tokenizer(tmp_path, "huggingface"), HuggingFaceTokenizer)
    (tmp_path / FILE_NAME).write_text(foreign("normalizer"))
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"it normalizes text \(NFC\); pip install tokenizers$"):
        load_tokenizer(tmp_path)


def test_what_the_regex_engines_read_differently():
    for pattern in (SPLIT_PATTERN, GPT2_PATTERN, O200K_PATTERN, GAPS, r"[^\r\n]|(?i:'s)|\p{^L}\\|(?<!a)\]+?|x{2,3}"):
        assert read_differently(pattern) is None
        assert for_oniguruma(pattern) == pattern
    strange = {r"a$": "$", r"\w+": r"\w", r"a{1,3}+": "{1,3}+", r"[\w]": r"[\w]", r"[[:alpha:]]x": "[[:alpha:]",
               r"(?m)a": "(?m)", r"a|^b": "^", r"[a&&b]": "[a&&b]", r"\bx": r"\b", "a{,3}": "{,3}"}  # fmt: skip
    assert {pattern: read_differently(pattern) for pattern in strange} == strange
    assert for_oniguruma(r"^\p{N}{1,3}+|[a$^]{2}+|x{2}|a\$$") == r"\A(?>\p{N}{1,3})|(?>[a$^]{2})|x{2}|a\$\z"
