"""Saved files give the same ids in Hugging Face, are read back unchanged, and refused if damaged."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.tokenizer import FILE_NAME, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxchat.tokenizer.patterns import (
    CL100K_PATTERN,
    SPLIT_PATTERN,
)
from tests.tokenizer.files import (
    GAPS,
    PATTERNS,
    foreign,
    huggingface,
    ids_of,
    same,
    trained,
)
from tests.tokenizer.texts import ANY, corpus


@given(ANY, st.sampled_from(PATTERNS))
@example("", SPLIT_PATTERN)
@example("'\u017f 'LL 'Ve'rE  \n", CL100K_PATTERN)
@example("1234567 \n\n  x \n", CL100K_PATTERN)
@example("AB cd, 12345 -- ef", GAPS)
@settings(max_examples=500, deadline=None)
def test_huggingface_gives_the_ids_of_a_saved_tokenizer(text, pattern):
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


def test_a_file_that_huggingface_has_rewritten(tokenizer):
    """It has no checksum, and its merges are those that it lists."""
    text = " ".join(corpus(27, 2000))
    again = Tokenizer.from_text(huggingface(tokenizer.to_json()).to_str())
    assert again.encode(text) == tokenizer.encode(text) and again.special_tokens == tokenizer.special_tokens


def unsealed(text: str) -> str:
    """A file from before checksums."""
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
def test_a_damaged_file_is_refused(tokenizer, tmp_path, how, kind):
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


VALUES = [
    None,
    True,
    -1,
    0,
    2**40,
    2**70,
    1.5,
    "",
    "a",
    "\ud800",
    "(",
    [],
    [[]],
    ["a", "b"],
    {},
    {"a": 0},
    {"type": "BPE"},
]


def changed(part, draw):
    """The JSON value `part` with one value in it, anywhere, replaced, left out or repeated."""
    if not isinstance(part, dict | list) or not part or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(VALUES))
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    key, how = (
        draw(st.sampled_from(keys)),
        draw(st.sampled_from(["inside", "inside", "inside", "left out", "as another"])),
    )
    part = part.copy()
    if how == "left out":
        del part[key]
    else:
        part[key] = changed(part[key], draw) if how == "inside" else part[draw(st.sampled_from(keys))]
    return part


@given(st.data(), st.sampled_from(["own", "unsealed", "gpt2", "gaps", "normalizer"]))
@settings(max_examples=300, deadline=None)
def test_any_change_of_a_file_is_refused_in_one_line_or_read(tmp_path_factory, data, kind):
    text = trained(SPLIT_PATTERN)[1] if kind in ("own", "unsealed") else foreign(kind)
    path = tmp_path_factory.mktemp("changed") / FILE_NAME
    path.write_text(json.dumps(changed(json.loads(unsealed(text) if kind == "unsealed" else text), data.draw)))
    for backend in ("auto", "rust", "huggingface"):
        try:
            tokenizer = load_tokenizer(path, backend)
            assert tokenizer.decode(tokenizer.encode("a b"))
            tokenizer.to_json()
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_tokens_of_a_megabyte(tmp_path):
    """From before there was a limit; every place in them was tried as the boundary of two tokens."""
    runs = [b"-" * 2**power for power in range(1, 21)]
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)] + runs)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert same(again, tokenizer) and again.encode("-" * (2**20 + 3)) == tokenizer.encode("-" * (2**20 + 3))
    halves = [[name, name] for name in ("-" * 2**power for power in range(20))]
    assert [merge for merge in json.loads(tokenizer.to_json())["model"]["merges"] if merge[0] == merge[1]] == halves


def test_missing_or_binary_file(tmp_path):
    for load in (Tokenizer.from_directory, load_tokenizer):
        with pytest.raises(UserError, match="no tokenizer at .*nowhere"):
            load(tmp_path / "nowhere")
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    for load in (Tokenizer.from_directory, HuggingFaceTokenizer.from_directory, load_tokenizer):
        with pytest.raises(UserError, match="damaged"):
            load(tmp_path)
