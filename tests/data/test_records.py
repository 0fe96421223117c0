"""Every record of a file comes with its line, however the file is called, packed and broken."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.data.records import find_records, has_records, place, read_records, stem_of
from jaxchat.data.text.reading import Unreadable
from jaxchat.errors import UserError

OBJECTS = [{"n": 1}, {"n": "zwei, 二 \u2028 \U0001f600"}, {"n": [3, {"m": None}]}]


def zstd(data):
    return pa.Codec("zstd").compress(data).to_pybytes()


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("ending", [".jsonl", ".NDJSON", ".json"])
def test_lines_are_numbered_with_the_blank_ones(tmp_path, ending, packing):
    lines = ["\ufeff", json.dumps(OBJECTS[0]), "", "  ", json.dumps(OBJECTS[1], ensure_ascii=False) + "\r", "{broken"]
    path = tmp_path / f"a{ending}{packing}"
    path.write_bytes(PACKED[packing]("\n".join(lines).encode()))
    found = list(read_records(path))
    assert found[:2] == [(2, OBJECTS[0]), (5, OBJECTS[1])]
    number, error = found[2]
    assert number == 6 and isinstance(error, ValueError) and "broken JSON" in str(error)
    assert place(path, 6) == f"{path}:6"


@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers()), max_size=5),
    indent=st.sampled_from([None, 1]),
)
def test_a_list_has_the_records_that_its_lines_would_have(tmp_path_factory, values, indent):
    folder = tmp_path_factory.mktemp("lists")
    text = json.dumps(values, indent=indent)
    (folder / "a.json").write_text(text)
    found = list(read_records(folder / "a.json"))
    assert [value for _, value in found] == values
    if values and indent:
        assert all(text.split("\n")[number - 1].strip().startswith("{") for number, _ in found)


@pytest.mark.parametrize(
    ("text", "number", "wrong"),
    [
        ('{"a": 1}\n[1, 2]\n', 2, "a list; write one object a line"),
        ('{"a": 1}\n"text"\n', 2, "a string"),
        ('{"a": 1}\n{\n "b": 2\n}\n', 2, "goes on in the next line"),
        ('{"a": "\\ud800"}\n', 1, "surrogate"),
        ('[{"a": 1},\n 7]', 2, "a number"),
        ('[{"a": 1},\n {"b": ]', 2, "broken JSON"),
        ('[{"a": 1}\n {"b": 1}]', 2, "comma"),
        ('[{"a": 1}]\n[{"a": 1}]', 1, "after the end of the list"),
        ("[" * 100_000, 1, "broken JSON"),
    ],
)
def test_what_is_no_record_says_why(tmp_path, text, number, wrong):
    (tmp_path / "a.jsonl").write_text(text)
    errors = [(at, str(value)) for at, value in read_records(tmp_path / "a.jsonl") if isinstance(value, ValueError)]
    assert errors[0][0] == number and wrong in errors[0][1]


def test_bytes_that_are_not_utf8_are_one_bad_record_and_utf16_is_converted_by_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    found = list(read_records(tmp_path / "a.jsonl"))
    assert [at for at, _ in found] == [1, 2, 3] and str(found[1][1]) == "not UTF-8 (byte 7 of the line)"
    assert "if the file is LATIN1" in found[1][1].remedy
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(UserError, match=r"UTF-16.*iconv"):
        list(read_records(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".XZ", ".zst"])
def test_a_file_cut_short_or_of_something_else_is_unreadable(tmp_path, packing):
    path, data = tmp_path / f"a.jsonl{packing}", PACKED[packing]("\n".join(map(json.dumps, OBJECTS)).encode())
    for damaged in (data[:-9], b"not packed at all"):
        path.write_bytes(damaged)
        with pytest.raises(Unreadable, match="cannot be read"):
            list(read_records(path))
    path.unlink()
    with pytest.raises(Unreadable, match="is missing"):
        list(read_records(path))


def test_rows_of_parquet_are_records(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"n": str(i)} for i in range(5)]), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [(i + 1, {"n": str(i)}) for i in range(5)]
    assert place(tmp_path / "a.parquet", 3) == f"{tmp_path / 'a.parquet'}: row 3"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Unreadable):
        list(read_records(tmp_path / "b.parquet"))


def test_a_file_is_found_by_its_name_without_endings(tmp_path):
    assert find_records(tmp_path / "none" / "train.jsonl") is None
    (tmp_path / "train.JSONL.gz").write_bytes(gzip.compress(b"{}"))
    assert find_records(tmp_path / "train") == find_records(tmp_path / "train.jsonl") == tmp_path / "train.JSONL.gz"
    assert find_records(tmp_path / "test.jsonl") is None
    (tmp_path / "train.jsonl").write_text("{}")
    for name in ("train", "train.jsonl"):
        with pytest.raises(UserError, match=r"has train.JSONL.gz and train.jsonl, of which only one"):
            find_records(tmp_path / name)
    assert stem_of("a.b.jsonl.gz") == "a.b" and not has_records("a.txt") and not has_records(".jsonl")
