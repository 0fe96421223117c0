"""The forms in which people have a tokenizer: read, or refused with what to do."""

from __future__ import annotations

import base64
import builtins
import shlex
import subprocess
import sys

import pytest

from jaxchat.errors import UserError
from jaxchat.tokenizer import FILE_NAME, load_tokenizer
from jaxchat.tokenizer.patterns import R50K_PATTERN
from tests.tokenizer.files import same, trained

BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def made():
    return trained(R50K_PATTERN)


def ranks_of(tokenizer) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % id for token, id in tokenizer.mergeable_ranks.items())


@pytest.mark.parametrize("name", ["gpt2.tiktoken", "GPT2.TIKTOKEN", "r50k_base", "gpt2.txt", "gpt2.json"])
@pytest.mark.parametrize("change", [None, "blank lines", "mark", "Windows"])
def test_ranks(made, tmp_path, name, change):
    data = ranks_of(made[0])
    if change == "blank lines":
        data = b"\n" + data.replace(b"\n", b"\n\n", 3)
    elif change == "mark":
        data = BOM + data
    elif change == "Windows":
        data = data.replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(data)
    assert same(load_tokenizer(tmp_path / name), made[0])


@pytest.mark.parametrize("name", [FILE_NAME, "tokenizer.JSON", "renamed.json", "noext", "odd.tok"])
@pytest.mark.parametrize("change", [None, "mark", "Windows"])
def test_json(made, tmp_path, name, change):
    data = made[0].to_json().encode()
    data = {None: data, "mark": BOM + data, "Windows": data.replace(b"\n", b"\r\n")}[change]
    (tmp_path / name).write_bytes(data)
    assert same(load_tokenizer(tmp_path / name), made[0])


def test_folders(made, tmp_path):
    run, ours, upper, ranks = (tmp_path / name for name in ("run", "ours", "upper", "ranks"))
    made[0].save(run / "tokenizer")
    made[0].save(ours)
    (ours / "vocab.json").write_text("{}")
    upper.mkdir()
    (upper / "TOKENIZER.json").write_text(made[0].to_json())
    ranks.mkdir()
    (ranks / "gpt2.tiktoken").write_bytes(ranks_of(made[0]))
    for folder in (run, ours, upper, ranks):
        assert same(load_tokenizer(folder), made[0])
    (ranks / "mine.tiktoken").write_bytes(ranks_of(made[0]))
    with pytest.raises(UserError, match="has several tokenizers; name one of gpt2.tiktoken, mine.tiktoken"):
        load_tokenizer(ranks)


@pytest.mark.parametrize("name", [FILE_NAME, "gpt2.tiktoken"])
def test_a_folder_with_the_name_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, but must be the file of a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [["vocab.json", "merges.txt"], ["tokenizer_config.json"], ["tokenizer.model"]])
def test_folders_of_other_libraries(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"but no tokenizer.json, .*AutoTokenizer.*save_pretrained") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"# Title\n", b"[]", b"{}", b'{"a": 0}', b"\xff\xfe{\0", b"null", b"[" * 100_000]
)
def test_files_that_are_no_tokenizer(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(
        UserError, match=r"damaged or not a tokenizer .*give a whole tokenizer.json or .tiktoken"
    ) as caught:
        load_tokenizer(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no tokenizer at"):
            load_tokenizer(path)


def test_the_advice_for_ranks_of_an_unknown_pattern_works(made, tmp_path):
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(ranks_of(made[0]))
    with pytest.raises(UserError, match="the split pattern of .*mine.tiktoken is unknown") as caught:
        load_tokenizer(path)
    _, _, advice = str(caught.value).partition("python ")
    arguments = [R50K_PATTERN if word == "PATTERN" else word for word in shlex.split(advice)]
    subprocess.run([sys.executable, *arguments], check=True)
    assert same(load_tokenizer(tmp_path / "mine-tokenizer"), made[0])


def test_tiktoken_may_be_missing(made, monkeypatch):
    real = builtins.__import__

    def without_tiktoken(name, *rest, **more):
        if name == "tiktoken":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_tiktoken)
    with pytest.raises(UserError, match="pip install tiktoken"):
        made[0].to_tiktoken()
