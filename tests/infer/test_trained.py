"""Loading what a run has trained, and the remedies for what is missing or damaged."""

import errno
import os

import pytest

from jaxchat.errors import UserError
from jaxchat.infer.trained import load_tokenizer_of
from jaxchat.runs.directory import RunDirectory
from jaxchat.tokenizer import Tokenizer


def refusal(directory: RunDirectory) -> str:
    with pytest.raises(UserError) as refused:
        load_tokenizer_of(directory)
    return str(refused.value)


def test_a_tokenizer_that_is_damaged_or_missing_has_a_remedy_that_ends(tmp_path):
    directory = RunDirectory(tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for damage in ("", '{"model": ', "null", "{}"):
        (folder / "tokenizer.json").write_text(damage)
        assert f"delete the folder {folder}: the same launch.py command makes it again" in refusal(directory)
    (folder / "tokenizer.json").unlink()
    folder.rmdir()
    message = refusal(directory)
    assert "delete" not in message and message.endswith("the same launch.py command makes it again, from the same text")


def test_a_tokenizer_that_may_not_be_read_is_not_to_be_deleted(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    Tokenizer.train_from_iterator(["one two three four five " * 9], 270).save(directory.tokenizer)
    file = tmp_path / "tokenizer" / "tokenizer.json"

    read = type(directory.path).read_bytes

    def denied(path):
        if path.name == file.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(type(directory.path), "read_bytes", denied)
    assert refusal(directory) == f"{file} cannot be read (Permission denied); correct that, and try again"


def test_an_imported_tokenizer_is_imported_again(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_record("tokenizer", {"stage": "tokenizer", "imported": {"from": "hf", "file": "/model"}})
    assert refusal(directory).endswith("; import the model again, to a new --run")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    message = refusal(directory)
    assert "delete" not in message and message.endswith("; import the model again, to a new --run")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    source = {"from": "jaxchat", "run": "/other", "stage": "sft", "step": 3}  # of --init-from
    directory.write_record("tokenizer", {"stage": "tokenizer", "imported": source})
    assert "the same launch.py command makes it again" in refusal(directory)


def test_a_tokenizer_of_another_run_is_named(tmp_path):
    directory = RunDirectory(tmp_path)
    texts = ["one two three four five six seven eight nine ten " * 9]
    Tokenizer.train_from_iterator(texts, 270).save(directory.tokenizer)
    assert load_tokenizer_of(directory).vocab_size == 270
    directory.write_record("tokenizer", {"stage": "tokenizer", "metrics": {"vocab_size": 270}})
    assert load_tokenizer_of(directory).vocab_size == 270
    Tokenizer.train_from_iterator(texts, 280).save(directory.tokenizer)
    message = refusal(directory)
    assert "has 280 ids and the run's own tokenizer has 270: it is that of another run; put the run's own" in message
