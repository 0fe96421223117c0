"""Loading what a run has trained, and the remedies for what is missing or damaged."""

import pytest

from jaxchat.errors import UserError
from jaxchat.infer.trained import load_tokenizer_of
from jaxchat.runs.directory import RunDirectory


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
