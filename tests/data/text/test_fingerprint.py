"""A training that resumes continues with the text that it began with, wherever that is, or says what has changed."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.data.positions import join_positions
from jaxchat.data.text import fingerprint as module
from jaxchat.data.text.fingerprint import fingerprint, what_changed
from jaxchat.data.text.folder import find_text
from jaxchat.errors import UserError
from tests.data.small_text import take, text_batches
from tests.tiny import record, refusal, start


def write(folder: Path, texts: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a", "b", "c"):
        lines = [json.dumps({"text": f"{name}: the {i} cats sat on a mat"}) + "\n" for i in range(texts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def prints(folder: Path) -> dict:
    found = fingerprint(find_text(folder))
    assert found is not None
    return json.loads(json.dumps(found))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "a.jsonl has other content": lambda folder: edit(folder / "a.jsonl", "7 cats", "7 dogs"),
    "b.jsonl has 1,8.. bytes, not 1,8..": lambda folder: edit(folder / "b.jsonl", "7 cats", "7 black cats"),
    "b.jsonl is gone": lambda folder: (folder / "b.jsonl").unlink(),
    "aa.jsonl is new": lambda folder: shutil.copy(folder / "a.jsonl", folder / "aa.jsonl"),
    "c.jsonl has other content": lambda folder: edit(folder / "c.jsonl", "7 cats", "7 dogs"),
    "a.jsonl is gone, z.jsonl is new": lambda folder: (folder / "a.jsonl").rename(folder / "z.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("message", CHANGES)
def test_what_changed_is_said(tmp_path, message):
    before = prints(write(tmp_path / "text"))
    CHANGES[message](tmp_path / "text")
    changed = what_changed(before, prints(tmp_path / "text"))
    assert changed is not None
    if ".." in message:
        assert changed.startswith("b.jsonl has 1,") and " bytes, not 1," in changed
    elif "z.jsonl" in message:
        assert changed.startswith("a.jsonl is gone")
    else:
        assert changed == message


def test_a_moved_or_copied_folder_is_the_same_text(tmp_path):
    before = prints(write(tmp_path / "text"))
    shutil.copytree(tmp_path / "text", tmp_path / "copy")
    (tmp_path / "copy" / "notes.md").write_text("not text")
    (tmp_path / "copy").rename(tmp_path / "moved")
    assert what_changed(before, prints(tmp_path / "moved")) is None


def test_the_metadata_of_parquet_shows_other_content(tmp_path):
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [f"{name} {i}" for i in range(100)]}), tmp_path / f"{name}.parquet")
    before = prints(tmp_path)
    pq.write_table(pa.table({"text": [f"a {i}" for i in range(99)] + ["zz"]}), tmp_path / "a.parquet")
    assert "a.parquet" in (what_changed(before, prints(tmp_path)) or "")


def test_large_files_are_sampled_to_their_ends_and_many_files_are_not_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_BYTES", 900)
    monkeypatch.setattr(module, "_PIECE_BYTES", 100)
    monkeypatch.setattr(module, "NAMED", 1)
    write(tmp_path / "text")
    before = prints(tmp_path / "text")
    assert "each" not in before["train"] and before["train"]["files"] == 2
    edit(tmp_path / "text" / "b.jsonl", "b: the 39 cats", "b: the 39 dogs")
    assert what_changed(before, prints(tmp_path / "text")) == "training has other content"
    (tmp_path / "text" / "b.jsonl").unlink()
    changed = what_changed(before, prints(tmp_path / "text")) or ""
    assert changed.startswith("training has 1 files of ") and ", not 2 files of " in changed


def test_a_damaged_fingerprint_says_nothing(tmp_path):
    now = prints(write(tmp_path / "text"))
    whole = now["train"]
    for side in (
        None,
        3,
        [],
        {},
        {**whole, "each": 3},
        {**whole, "each": {"a": 1}},
        {**whole, "files": "x", "hash": ""},
    ):
        assert what_changed({"train": side, "val": now["val"]}, now) is None
    assert what_changed({}, now) is None
    assert what_changed({**now, "train": {**whole, "hash": "", "each": {}}}, now) == "a.jsonl is new, b.jsonl is new"


def test_a_position_is_of_its_text(tmp_path):
    write(tmp_path / "text")
    split = find_text(tmp_path / "text")

    def batches(found: dict | None):
        return text_batches(split.train, fingerprint=found)

    before = prints(tmp_path / "text")
    iterator = batches(before)
    take(iterator, 3)
    state = json.loads(json.dumps(join_positions([iterator.get_state()])))
    assert state["fingerprint"] == before
    for found in (before, None):  # None: text that may still be downloading
        batches(found).set_state(state)
    edit(tmp_path / "text" / "a.jsonl", "7 cats", "7 dogs")
    with pytest.raises(
        UserError, match=r"the text has changed .*: a.jsonl has other content; put it back .*, or .* --redo"
    ):
        batches(prints(tmp_path / "text")).set_state(state)
    del state["fingerprint"]  # as earlier versions wrote it
    batches(prints(tmp_path / "text")).set_state(state)


def test_a_run_refuses_to_go_on_with_other_text(tmp_path):
    arguments = [f"--data={write(tmp_path / 'text', 400)}", "--stages=tokenizer,pretrain"]
    arguments.append("--tokenizer.vocab-size=270")
    code, out, err = start(tmp_path / "run", *arguments)
    assert code == 0, err
    assert "data      text: to train on a.jsonl, b.jsonl (" in out and "for validation c.jsonl (" in out
    text = record(tmp_path / "run", "pretrain")["text"]
    assert (text["train_files"], text["val_files"]) == (["a.jsonl", "b.jsonl"], ["c.jsonl"])
    (tmp_path / "run" / "pretrain" / "stage.json").unlink()  # as if it had been stopped
    edit(tmp_path / "text" / "b.jsonl", "7 cats", "7 dogs")
    message = refusal(start(tmp_path / "run", *arguments))
    assert message.startswith("the text has changed") and "b.jsonl has other content" in message
    edit(tmp_path / "text" / "b.jsonl", "7 dogs", "7 cats")
    code, out, err = start(tmp_path / "run", *arguments)
    assert code == 0, err
