"""The look at the text before the first stage finds what pretraining would refuse, and gives the right reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.data.text import describe, reading
from jaxchat.data.text.describe import check_fills_row, look_through, text_lines
from jaxchat.data.text.folder import find_text
from jaxchat.errors import UserError
from tests.tiny import refusal, start


def write(path, lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps({"text": f"text {line}"})) + "\n" for line in lines)
    )


def test_a_small_text_is_read_as_a_whole(tmp_path):
    write(tmp_path / "a.jsonl", [*range(500), "nonsense", *range(500)])
    write(tmp_path / "b.jsonl", range(50))
    with pytest.raises(UserError, match="a.jsonl:501: broken JSON"):
        look_through(find_text(tmp_path), sequence_len=16)
    found = look_through(find_text(tmp_path, on_bad="skip"), sequence_len=16)
    assert found is not None and found.lines() == ["to be left out: 1 broken line"]
    write(tmp_path / "a.jsonl", range(500))
    write(tmp_path / "b.jsonl", [*range(50), "nonsense"])
    with pytest.raises(UserError, match="b.jsonl:51: broken JSON"):
        look_through(find_text(tmp_path), sequence_len=16)


def test_of_a_long_text_parts_are_read_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(describe, "CHECKED_BYTES", 5000)
    write(tmp_path / "a.jsonl", range(5000))
    write(tmp_path / "b.jsonl", range(50))
    found = look_through(find_text(tmp_path), sequence_len=16)
    assert found is not None and 2 <= found.seen <= 6
    line = f"looked through {found.seen} of {found.blocks} blocks; the others when they are read"
    assert found.blocks > 100 and found.lines() == [line]
    write(tmp_path / "a.jsonl", [*range(5000), "nonsense"])
    with pytest.raises(UserError, match="a.jsonl:5001: broken JSON"):
        look_through(find_text(tmp_path), sequence_len=16)


def test_too_little_text_is_told_from_none(tmp_path):
    write(tmp_path / "a.jsonl", range(3))
    write(tmp_path / "b.jsonl", range(3))
    split = find_text(tmp_path)
    with pytest.raises(
        UserError, match="a.jsonl holds at most 21 tokens, fewer than the 101 of one row; add text or low"
    ):
        look_through(split, sequence_len=100)
    look_through(split, sequence_len=20)
    with pytest.raises(UserError, match="a.jsonl holds only 9 tokens, fewer than the 21 of one row; add text or lower"):
        check_fills_row(split, 20, lambda texts: 2 * len(texts))
    check_fills_row(split, 8, lambda texts: 2 * len(texts))
    with pytest.raises(UserError, match="data.lanes is 2, but .*a.jsonl has only 1 blocks"):
        look_through(split, sequence_len=20, lanes=2)


def test_a_last_file_that_is_longer_than_the_others_is_remarked_on(tmp_path):
    write(tmp_path / "a.jsonl", range(3))
    write(tmp_path / "b.jsonl", range(30))
    assert text_lines(find_text(tmp_path))[-1].startswith("b.jsonl is longer than all that is trained on; --data.val")
    (tmp_path / "a.jsonl").rename(tmp_path / "z.jsonl")
    assert len(text_lines(find_text(tmp_path))) == 1


def test_a_run_is_refused_before_its_first_stage(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    pq.write_table(pa.table({"text": [f"cat {i}" for i in range(9)]}), folder / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "z.parquet")
    message = refusal(start(tmp_path / "run", f"--data={folder}", "--stages=tokenizer"))
    assert "a.parquet holds at most " in message and "fewer than the 65 of one row" in message
    assert not (tmp_path / "run" / "tokenizer" / "stage.json").exists()
