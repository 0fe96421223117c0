"""Damaged text is refused with a line that names it, or named, counted and left out, but never silently."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.data.loader import pretrain_batches
from jaxchat.data.manifest import Manifest, Origin, Record
from jaxchat.data.text import plain, reading, shards
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import TextBlocks, TextFiles, iterate_texts
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer
from tests.tiny import damage, record, refusal, start

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on a mat"] * 3, 265)
GROUP = 50


def numbered(start, stop):
    return [f"document {i}: the cat sat on a mat" for i in range(start, stop)]


def write(path, texts, **options):
    pq.write_table(pa.table({"text": texts}), path, row_group_size=GROUP, use_dictionary=False, **options)


def read(side, on_bad):
    """The documents, what was left out by kind, and the lines that were printed."""
    said = []
    side = TextFiles(side.files, on_bad=on_bad, say=said.append)
    source = TextBlocks(side)
    blocks = [source[i] for i in range(len(source))]
    counts = {}
    for block in blocks:
        for kind, count in block.left_out.items():
            counts[kind] = counts.get(kind, 0) + count
    return [text for block in blocks for text in block], counts, said


def check_bad(files, expected, *, left, counts):
    """Refused by a line, or left out with the same line."""
    side = TextFiles(tuple(files))
    with pytest.raises(UserError, match=expected) as raised:
        read(side, "refuse")
    assert str(raised.value).endswith("--data.on-bad=skip leaves it out") and "\n" not in str(raised.value)
    texts, found, said = read(side, "skip")
    assert (texts, found) == (left, counts)
    assert len(said) == sum(count for name, count in counts.items() if name != "empty_documents")
    assert all(line.endswith("; left out") for line in said)


def test_a_row_group(tmp_path):
    write(tmp_path / "a.parquet", numbered(0, 150))
    damage(tmp_path / "a.parquet", 1)
    left = numbered(0, 50) + numbered(100, 150)
    check_bad([tmp_path / "a.parquet"], "a.parquet: row group 1 cannot be read", left=left,
              counts={"unreadable_blocks": 1})  # fmt: skip


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_flipped_bits_are_found_where_pages_have_checksums(tmp_path, compression):
    texts = numbered(0, 100)
    write(tmp_path / "a.parquet", texts, write_page_checksum=True, compression=compression)
    whole, metadata = (tmp_path / "a.parquet").read_bytes(), pq.ParquetFile(tmp_path / "a.parquet").metadata
    column = metadata.row_group(0).column(0)
    draw = random.Random(compression)
    found = 0
    for _ in range(80):
        data = bytearray(whole)
        data[draw.randrange(column.data_page_offset, column.data_page_offset + column.total_compressed_size)] ^= (
            1 << draw.randrange(8)
        )
        (tmp_path / "a.parquet").write_bytes(data)
        kept, counts, said = read(TextFiles((tmp_path / "a.parquet",)), "skip")
        assert kept in (texts, texts[50:]), "other text"
        assert (kept != texts) == (counts == {"unreadable_blocks": 1}) == (len(said) == 1)
        found += kept != texts
    assert found > 40


def test_cuts_and_flips_anywhere_never_end_in_a_traceback(tmp_path):
    write(tmp_path / "a.parquet", numbered(0, 100))
    whole, draw = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    for _ in range(150):
        data = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(4)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8) if data else 0
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            read(TextFiles((tmp_path / "a.parquet",)), "skip")
        except UserError as error:
            assert "a.parquet" in str(error)  # the damage may change the columns' names


def test_a_truncated_file_and_one_that_is_missing(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.parquet", numbered(100 * number, 100 * number + 100))
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"1.parquet is not a parquet file: .*; --data.on-bad=skip leaves out files"):
        find_text(tmp_path)
    said = []
    split = find_text(tmp_path, on_bad="skip", say=said.append)
    assert list(iterate_texts(split.train)) == numbered(0, 100) + numbered(200, 300)
    assert len(said) == 1 and "1.parquet is not a parquet file" in said[0]
    (tmp_path / "3.parquet").write_bytes(whole[:-100])  # the validation file
    with pytest.raises(UserError, match="3.parquet is not a parquet file"):
        find_text(tmp_path, on_bad="skip")
    blocks = TextBlocks(split.train)
    (tmp_path / "2.parquet").unlink()  # while it is read
    assert [block.left_out for block in blocks] == [
        {}, {}, {"unreadable_files": 1}, {"missing_files": 1}, {"missing_files": 1}]  # fmt: skip


def test_a_shard_that_is_in_the_manifest_but_not_in_the_folder(tmp_path):
    names = [f"pretrain/shard_{number}.parquet" for number in (0, 1, 2, 9)]
    (tmp_path / "pretrain").mkdir()
    for name in names:
        write(tmp_path / name, numbered(0, 10))
    files = {name: Record("text", 1, "", ()) for name in names}
    Manifest(tmp_path, {"text": Origin("", "", names[-1])}, files).write()
    (tmp_path / names[1]).unlink()
    with pytest.raises(
        UserError, match=r"shard_1.parquet is missing; 'jaxchat data get' downloads it; --data.on-bad=skip"
    ):
        find_text(tmp_path)
    said = []
    split = find_text(tmp_path, on_bad="skip", say=said.append)
    assert len(list(iterate_texts(split.train))) == 20 and "shard_1.parquet is missing; left out" in said[0]


def test_only_documents_that_are_not_utf8_are_lost(tmp_path):
    good = [text.encode() for text in numbered(0, 8)]
    binary = pa.array([*good[:3], b"fine \xff\xfe", None, b"", *good[3:]], pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())  # unchecked, as other writers are
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    check_bad([tmp_path / "a.parquet"], r"row group 0, document 3 is not UTF-8 \(byte 5\)",
              left=numbered(0, 8), counts={"documents_not_utf8": 1, "empty_documents": 2})  # fmt: skip
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n')
    check_bad([tmp_path / "b.jsonl"], "b.jsonl:2: not UTF-8", left=["one", "two"], counts={"broken_lines": 1})
    (tmp_path / "c.txt").write_bytes(b"fine \xff")
    (tmp_path / "d.txt").write_bytes(b"fine")
    check_bad([tmp_path / "c.txt", tmp_path / "d.txt"], r"c.txt is not UTF-8 text \(byte 5\)", left=["fine"],
              counts={"documents_not_utf8": 1})  # fmt: skip


def test_a_long_text_loses_only_the_paragraph_that_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(plain, "LONG_FILE_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"first\r\n\nsecond \xff\n\nthird \xc3\xa9\n\nfourth")
    check_bad([tmp_path / "a.txt"], r"a.txt is not UTF-8 text \(byte 15\)", left=["first\n\nthird é\n\nfourth"],
              counts={"documents_not_utf8": 1})  # fmt: skip


def test_broken_lines_and_gzip(tmp_path):
    lines = [json.dumps({"text": text}) for text in numbered(0, 5)]
    lines[1:1] = ['{"text": "cut', "[1]", '{"text": ""}', '{"body": "x"}', r'{"text": "\ud800"}']
    data = "\n".join(lines).encode()
    for name, packed in (("a.jsonl", data), ("b.jsonl.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(packed)
        check_bad([tmp_path / name], f"{name}:2: broken JSON", left=numbered(0, 5),
                  counts={"broken_lines": 4, "empty_documents": 1})  # fmt: skip
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data)[:-20])
    check_bad([tmp_path / "b.jsonl.gz"], "b.jsonl.gz cannot be read", left=[], counts={"unreadable_blocks": 1})


def test_encoded_surrogates_are_not_utf8(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "good"}\n{"text": "bad \xed\xa0\x80"}\n')
    left, counts = ["good"] * 2, {"broken_lines": 2}
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    check_bad(files, r"a.jsonl:2: not UTF-8", left=left, counts=counts)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_long_text_is_read_in_blocks_whatever_ends_its_lines(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(plain, "LONG_FILE_BYTES", 1000)
    paragraphs = [f"{i} " + "words " * (i % 40) for i in range(200)]
    (tmp_path / "a.txt").write_bytes((end * 2).join(paragraphs).encode())
    source = TextBlocks(TextFiles((tmp_path / "a.txt",)))
    blocks = [source[i] for i in range(len(source))]
    assert max(len(text) for block in blocks for text in block) < 1500
    assert [p for block in blocks for text in block for p in text.split("\n\n") if p] == paragraphs


def test_a_failing_disk_is_not_damage(tmp_path):
    """If one of several processes, or of two runs, left text out because of it, they would read different text."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n')
    blocks = TextBlocks(TextFiles((path,), on_bad="skip"))
    path.unlink()
    path.mkdir()  # opening it is an error of the operating system
    with pytest.raises(UserError, match="a.jsonl cannot be read now: .*; fix that, and the same command continues"):
        blocks[0]


def test_a_line_of_50_megabytes(tmp_path):
    long = "word " * 10_000_000
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("one", long, "two"))
    expected = (
        "a.jsonl: the document beginning 'word word word word ' has 50,000,000 characters, more than the 10,000,000"
    )
    check_bad([tmp_path / "a.jsonl"], expected, left=["one", "two"], counts={"long_documents": 1})
    (tmp_path / "a.jsonl").write_text("x" * 50_000_000 + "\n")  # and the line itself is not printed
    with pytest.raises(UserError, match="a.jsonl:1: broken JSON") as raised:
        read(TextFiles((tmp_path / "a.jsonl",)), "refuse")
    assert len(str(raised.value)) < 300


def test_only_the_first_are_named_and_all_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 100)
    said = []
    blocks = TextBlocks(TextFiles((tmp_path / "a.jsonl",), on_bad="skip", say=said.append))
    for _ in range(2):
        assert blocks[0].left_out == {"broken_lines": 100}
    assert len(said) == shards.REPORTED and said[-1].endswith("left out; any more are only counted")


@pytest.fixture
def bad_folder(tmp_path):
    """Ten row groups of fifty, of which the fourth is damaged; empty documents in the second and the last."""
    texts = numbered(0, 500)
    texts[60] = texts[490] = texts[491] = ""
    write(tmp_path / "0.parquet", texts)
    damage(tmp_path / "0.parquet", 3)
    write(tmp_path / "1.parquet", numbered(500, 600))
    return tmp_path


@pytest.mark.parametrize("packing", ["best-fit", "concat"])
def test_the_count_is_of_the_text_read_once_and_survives_a_resume(bad_folder, packing):
    side = find_text(bad_folder, on_bad="skip", say=lambda line: None).train
    options = {"rows": 2, "sequence_len": 64, "seed": 0, "packing": packing}

    def batches():
        return pretrain_batches(side, TOKENIZER, **options)

    straight, seen = batches(), []
    for _ in range(400):
        next(straight)
        seen.append(json.loads(json.dumps(straight.get_state())))
    counts = [state["lanes"]["0"]["left_out"] for state in seen]
    assert seen[-1]["lanes"]["0"]["epoch"] > 0 and counts[-1] == {"empty_documents": 3, "unreadable_blocks": 1}
    if packing == "concat":
        assert counts[0] == {} and {"empty_documents": 1} in counts
    for state in seen[::40]:
        resumed = batches()
        resumed.set_state(state)
        for _ in seen[seen.index(state) + 1 :]:
            next(resumed)
        assert resumed.get_state() == seen[-1]


def test_a_run_refuses_bad_text_and_then_continues_without_it(bad_folder, tmp_path):
    arguments = [f"--data={bad_folder}", "--stages=tokenizer,pretrain,report", "--data.mask-borders=both"]
    arguments.append("--data.packing=best-fit")
    assert "0.parquet: row group 3 cannot be read" in refusal(start(tmp_path / "run", *arguments))
    code, out, err = start(tmp_path / "run", *arguments, "--data.on-bad=skip")
    assert code == 0, err
    assert "data      " in out and "row group 3 cannot be read" in out and "; left out" in out
    found = record(tmp_path / "run", "pretrain")
    assert found["left_out"] == {"empty_documents": 3, "unreadable_blocks": 1}
    assert 0.9 < found["packing"]["utilisation"] <= 1
    line = f"rows {found['packing']['utilisation']:.1%} full; 0 tokens cropped, "
    report = (tmp_path / "run" / "report.md").read_text()
    assert line in out and line in report and "left out: 3 empty documents, 1 unreadable block" in report
    assert np.isfinite(found["seconds"])
