"""Finding, splitting and reading text folders; every kind of bad input gives one clear line."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.data.text import plain, reading
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import TextBlocks, TextFiles, iterate_texts
from jaxchat.errors import UserError


def write_parquet(path: Path, texts, column: str = "text", row_group_size: int = 3) -> None:
    pq.write_table(pa.table({column: texts}), path, row_group_size=row_group_size)


def write_jsonl(path: Path, texts) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def numbered(start: int, stop: int) -> list[str]:
    return [f"document {i}" for i in range(start, stop)]


def fails(pattern: str):
    """Expects a UserError whose message is one line that matches."""
    return pytest.raises(UserError, match=re.compile(rf"\A[^\n]*{pattern}[^\n]*\Z"))


@pytest.mark.parametrize("inside", ["", "pretrain"])
def test_last_parquet_file_is_for_validation_and_row_groups_are_blocks(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / "README.txt").write_text("about this text")
    for shard in range(3):
        write_parquet(folder / f"shard_{shard}.parquet", numbered(10 * shard, 10 * shard + 10), row_group_size=4)
    split = find_text(tmp_path)
    assert list(iterate_texts(split.train)) == numbered(0, 20)
    assert list(iterate_texts(split.val)) == numbered(20, 30)
    blocks = TextBlocks(split.train)
    assert [len(blocks[i]) for i in range(len(blocks))] == [4, 4, 2, 4, 4, 2]
    assert blocks[4] == numbered(14, 18)


@pytest.mark.parametrize("name", ["shard_0.parquet", "shard_0"])
def test_named_validation_shard(tmp_path, name):
    for shard in range(3):
        write_parquet(tmp_path / f"shard_{shard}.parquet", numbered(10 * shard, 10 * shard + 10))
    split = find_text(tmp_path, name)
    assert list(iterate_texts(split.val)) == numbered(0, 10)
    assert list(iterate_texts(split.train)) == numbered(10, 30)


def test_folders_of_jsonl_and_of_txt_split_by_file(tmp_path):
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "1.jsonl", numbered(0, 5))
    (tmp_path / "a" / "2.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
    write_jsonl(tmp_path / "a" / "3.jsonl", numbered(5, 7))
    split = find_text(tmp_path / "a")
    assert list(iterate_texts(split.train)) == [*numbered(0, 5), "packed"]
    assert list(iterate_texts(split.val)) == numbered(5, 7)

    (tmp_path / "b").mkdir()
    for name in "xyz":
        (tmp_path / "b" / f"{name}.txt").write_bytes(f"\ufefftext {name}\r\nmore".encode())
    split = find_text(tmp_path / "b")
    assert list(iterate_texts(split.train)) == ["text x\nmore", "text y\nmore"]
    assert list(iterate_texts(split.val)) == ["text z\nmore"]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_one_file_gives_about_every_fiftieth_document_to_validation(tmp_path, write):
    texts = numbered(0, 5000)
    write(tmp_path / f"all.{'jsonl' if write is write_jsonl else 'parquet'}", texts)
    split = find_text(tmp_path)
    train, val = list(iterate_texts(split.train)), list(iterate_texts(split.val))
    assert sorted([*train, *val]) == sorted(texts)
    assert 60 <= len(val) <= 140


def test_one_small_file_still_has_both_sides(tmp_path):
    write_jsonl(tmp_path / "all.jsonl", numbered(0, 8))
    split = find_text(tmp_path)
    train, val = list(iterate_texts(split.train)), list(iterate_texts(split.val))
    assert train and val and sorted([*train, *val]) == numbered(0, 8)


def test_a_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * (i % 700) for i in range(600)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    pieces = list(iterate_texts(TextFiles((tmp_path / "book.txt",))))
    assert "\n\n".join(pieces).split("\n\n") == paragraphs
    assert all(len(piece) < plain.DOCUMENT_CHARS + 4000 for piece in pieces)
    split = find_text(tmp_path)
    assert sorted([*iterate_texts(split.train), *iterate_texts(split.val)]) == sorted(pieces)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 90), min_size=2, max_size=30), block=st.integers(1, 200))
def test_each_line_and_paragraph_is_read_once_whatever_the_block_size(tmp_path_factory, lengths, block):
    folder = tmp_path_factory.mktemp("text")
    texts = [f"{i}:" + "é" * length for i, length in enumerate(lengths)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n\n" for t in texts))
    (folder / "a.txt").write_text("\n\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        patch.setattr(plain, "LONG_FILE_BYTES", 1)
        assert list(iterate_texts(TextFiles((folder / "a.jsonl",)))) == texts
        found = list(iterate_texts(TextFiles((folder / "a.txt",))))
        assert [part for text in found for part in text.split("\n\n") if part] == texts


def test_documents_without_text_are_left_out(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "", None, "two"])
    assert list(iterate_texts(TextFiles((tmp_path / "a.parquet",)))) == ["one", "two"]


def test_small_txt_files_share_blocks(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}")
    blocks = TextBlocks(find_text(tmp_path).train)
    assert len(blocks) == 1 and blocks[0] == [f"file {i}" for i in range(19)]


def test_missing_empty_or_mixed_folders(tmp_path):
    with fails("does not exist"):
        find_text(tmp_path / "nowhere")
    (tmp_path / "file.jsonl").write_text("{}")
    with fails("file.jsonl is not a folder"):
        find_text(tmp_path / "file.jsonl")
    (tmp_path / "empty").mkdir()
    with fails("no text in .*empty; it is empty"):
        find_text(tmp_path / "empty")
    (tmp_path / "empty" / "table.csv").write_text("a,b")
    (tmp_path / "empty" / "chat").mkdir()
    with fails("table.csv: csv is not read as it is; convert it with: python -c"):
        find_text(tmp_path / "empty")
    (tmp_path / "empty" / "table.csv").rename(tmp_path / "empty" / "table.xls")
    with fails("no text in .*; it contains chat, table.xls; put .parquet"):
        find_text(tmp_path / "empty")


def test_bad_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["x", "y"])
    with fails("validation shard 'b.parquet' is not in .*, did you mean 'a.parquet'"):
        find_text(tmp_path, "b.parquet")
    write_parquet(tmp_path / "b.parquet", ["x"], column="content")
    with fails("b.parquet has no column 'text'; its columns are: content"):
        find_text(tmp_path)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with fails("b.parquet: column 'text' contains int64"):
        find_text(tmp_path)
    (tmp_path / "b.parquet").write_text("this is no parquet file\n" * 10)
    with fails("b.parquet is not a parquet file"):
        find_text(tmp_path)
    write_parquet(tmp_path / "b.parquet", ["x"])
    with fails("validation shard 'c' is not in"):
        find_text(tmp_path, "c")


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": numbered(0, 2000)}), path, row_group_size=1000, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset : group.data_page_offset + group.total_compressed_size] = (
        b"\xff" * group.total_compressed_size
    )
    path.write_bytes(data)
    blocks = TextBlocks(TextFiles((path,)))
    assert blocks[0] == numbered(0, 1000)
    with fails("a.parquet: row group 1 cannot be read"):
        blocks[1]


BROKEN_LINES = [
    ('{"text": "x"', "broken JSON"),
    ("[1]", "not a JSON object but a list"),
    ('{"content": "x", "id": 1}', "no field 'text'; the fields are: content, id"),
    ('{"text": ["x"]}', "field 'text' is a list, not a string"),
    ('{"text": 1, "id": 2}', "field 'text' is a number, not a string"),
    (r'{"text": "\ud83d"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_a_broken_line_of_text_is_named_by_file_and_line(tmp_path, line, message):
    good = json.dumps({"text": "fine " * 20}) + "\n"
    lines = (good * 50 + "\n" + line + "\n" + good).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", 1000)
        for name in ("a.jsonl", "a.jsonl.gz"):
            with fails(rf"{name}:52: {message}"):
                list(iterate_texts(TextFiles((tmp_path / name,))))


def test_broken_txt_and_gzip(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine \xff")
    with fails(r"a.txt is not UTF-8 text \(byte 5\)"):
        list(iterate_texts(TextFiles((tmp_path / "a.txt",))))
    for data in (b"not gzip", gzip.compress(b'{"text": "x"}\n' * 100)[:-20]):
        (tmp_path / "a.jsonl.gz").write_bytes(data)
        with fails("a.jsonl.gz cannot be read"):
            list(iterate_texts(TextFiles((tmp_path / "a.jsonl.gz",))))
