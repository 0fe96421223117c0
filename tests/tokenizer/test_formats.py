"""Vocabularies from files and into files, with the ids of the libraries whose formats they are."""

from __future__ import annotations

import json
import pickle
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxchat.config import UserError
from jaxchat.tokenizer import FILE_NAME, SPECIAL_TOKENS, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxchat.tokenizer.patterns import (
    CL100K_PATTERN,
    GPT2_PATTERN,
    O200K_PATTERN,
    R50K_PATTERN,
    SPLIT_PATTERN,
    for_oniguruma,
    read_differently,
)
from tests.tokenizer.texts import ANY, corpus

GAPS = r"[a-z]+|\p{N}{1,3}| \p{Lu}"  # most of the text is in no match
EMPTY = r"[a-z]*|\s+"  # matches nothing at all, too
PATTERNS = [SPLIT_PATTERN, GPT2_PATTERN, R50K_PATTERN, CL100K_PATTERN, O200K_PATTERN, GAPS, EMPTY]
END = "<|endoftext|>"


@cache
def huggingface(text: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(text)


def ids_of(text: str, file: str) -> list[int]:
    """Hugging Face's, by a tokenizer.json."""
    return huggingface(file).encode(text, add_special_tokens=False).ids


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return one._vocabulary == other._vocabulary


# --- our own ---------------------------------------------------------------------------------------------------------


@cache
def trained(pattern: str) -> tuple[Tokenizer, str]:
    tokenizer = Tokenizer.train_from_iterator(corpus(20, 10_000), 500, pattern=pattern)
    return tokenizer, tokenizer.to_json()


@given(ANY, st.sampled_from(PATTERNS))
@example("", SPLIT_PATTERN)
@example("'\u017f 'LL 'Ve'rE  \n", CL100K_PATTERN)
@example("1234567 \n\n  x \n", CL100K_PATTERN)
@example("AB cd, 12345 -- ef", GAPS)
@settings(max_examples=500, deadline=None)
def test_huggingface_gives_the_ids_of_a_saved_one(text, pattern):
    tokenizer, file = trained(pattern)
    assert ids_of(text, file) == tokenizer.encode(text)


def test_huggingface_takes_special_tokens_and_decodes(tokenizer):
    peer = huggingface(tokenizer.to_json())
    assert peer.encode("<|bos|>hi").ids == tokenizer.encode("hi", prepend="<|bos|>")
    assert peer.decode(tokenizer.encode("hi\n ü", append="<|user_end|>"), skip_special_tokens=False) == (
        "hi\n ü<|user_end|>"
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_save_and_load(tmp_path, pattern):
    tokenizer, _ = trained(pattern)
    folder = tmp_path / "new" / "tokenizer"
    tokenizer.save(folder)
    for path in (folder, folder / FILE_NAME):
        assert same(load_tokenizer(path), tokenizer)
    assert same(Tokenizer.from_directory(folder), tokenizer)
    assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_one_that_huggingface_has_written_again(tokenizer):
    """It has no checksum then, and its merges are those that it lists."""
    text = " ".join(corpus(27, 2000))
    again = Tokenizer.from_text(huggingface(tokenizer.to_json()).to_str())
    assert again.encode(text) == tokenizer.encode(text) and again.special_tokens == tokenizer.special_tokens


def unsealed(text: str) -> str:
    """A file of the time before there was a checksum in it."""
    data = json.loads(text)
    del data["model"]["jaxchat"]
    return json.dumps(data)


def test_a_file_without_a_checksum(tokenizer):
    assert same(Tokenizer.from_text(unsealed(tokenizer.to_json())), tokenizer)


def damage(text: str, how: str) -> str:
    data = json.loads(text)
    model = data["model"]
    if how == "cut":
        return text[: len(text) // 2]
    if how == "empty":
        return ""
    if how == "list":
        return "[]"
    if how == "no model":
        del data["model"]
    if how == "token missing":
        del model["vocab"]["a"]
    if how == "merge missing":
        del model["merges"][3]
    if how == "two ids swapped":
        model["vocab"]["a"], model["vocab"]["b"] = model["vocab"]["b"], model["vocab"]["a"]
    if how == "not our alphabet":
        model["vocab"] = {"日" + name: rank for name, rank in model["vocab"].items()}
    if how == "other specials":
        data["added_tokens"].pop()
    if how == "pattern":
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "("
    return json.dumps(data)


HOWS = ["cut", "empty", "list", "no model", "token missing", "merge missing", "two ids swapped", "not our alphabet"]
HOWS += ["other specials", "pattern"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["own", "foreign", "huggingface"])
def test_a_damaged_file_is_nothing_else(tokenizer, tmp_path, how, kind):
    one = {
        "own": tokenizer,
        "foreign": Tokenizer.from_text(foreign("gpt2")),
        "huggingface": HuggingFaceTokenizer.from_text(foreign("normalizer")),
    }[kind]
    text = one.to_json()
    if kind == "huggingface" and how == "pattern":
        return  # it has none
    (tmp_path / FILE_NAME).write_text(damage(text, how), encoding="utf-8")
    for load in (Tokenizer.from_directory, HuggingFaceTokenizer.from_directory, load_tokenizer):
        with pytest.raises(UserError) as caught:
            load(tmp_path)
        assert str(tmp_path / FILE_NAME) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_file_without_a_checksum(tokenizer, tmp_path, how):
    (tmp_path / FILE_NAME).write_text(damage(unsealed(tokenizer.to_json()), how), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{tmp_path / FILE_NAME} is (damaged|no vocabulary).*$"):
        load_tokenizer(tmp_path)


def test_missing_or_binary_file(tmp_path):
    for load in (Tokenizer.from_directory, load_tokenizer):
        with pytest.raises(UserError, match="no tokenizer at .*nowhere"):
            load(tmp_path / "nowhere")
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    for load in (Tokenizer.from_directory, HuggingFaceTokenizer.from_directory, load_tokenizer):
        with pytest.raises(UserError, match="damaged"):
            load(tmp_path)


# --- other people's tokenizer.json ------------------------------------------------------------------------------------


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
    """The tokenizer.json of a vocabulary trained by Hugging Face; its special tokens are behind, and not listed."""
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


@cache
def loaded(kind: str, ignore_merges: bool) -> tuple[Tokenizer, str, str]:
    """A foreign one, its file, and the file that we make of it."""
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


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZERS))
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_foreign_one_is_saved_as_it_is(tmp_path, kind, ignore_merges):
    tokenizer, _, _ = loaded(kind, ignore_merges)
    tokenizer.save(tmp_path)
    assert same(load_tokenizer(tmp_path), tokenizer)
    assert same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)
    # By way of Hugging Face, which drops our notes.
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


def test_special_tokens_of_a_foreign_one():
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
        assert END in text or ids == ids_of(text, file) == ids_of(text, tokenizer.to_json())
        assert names.index(END) not in ids and tokenizer.decode(ids) == text
    assert tokenizer.decode([names.index(END), 601]) == END + "<|bos|>"
    assert same(Tokenizer.from_text(tokenizer.to_json()), tokenizer)


def test_merges_as_strings_and_twice():
    data = json.loads(foreign("gpt2"))
    merges = data["model"]["merges"]
    data["model"]["merges"] = [merges[5], *merges[:5], merges[9], *merges[5:]]  # the later rank holds
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
    "space": (edited(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "it puts a space before every text"),
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
def test_what_only_huggingface_can(tmp_path, name):
    data, why = UNSUPPORTED[name]
    data["model"]["merges"] = [m for m in data["model"]["merges"] if "the" not in ("".join(m), *m)]
    (tmp_path / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"^{tmp_path / FILE_NAME} needs the Hugging Face backend: {why}.*$"):
        load_tokenizer(tmp_path, "rust")
    with pytest.raises(UserError, match=why):
        Tokenizer.from_file(tmp_path / FILE_NAME)
    if name not in ("distant", "gap"):
        assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_what_is_plain_text_for_a_special_token():
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
