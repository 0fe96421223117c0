"""Folders as people have them: what is for training, what for validation, what is left out and why."""

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path, PurePath

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from jaxchat.data.manifest import Manifest, Origin, Record
from jaxchat.data.text.describe import text_lines, text_record
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import iterate_texts
from jaxchat.errors import UserError
from jaxchat.tokenizer import Tokenizer


def texts_of(name: str) -> list[str]:
    return [f"{name}, number {i}." for i in range(8)]


def write(path: Path, texts: list[str] | None = None) -> None:
    """A file of texts, in the form of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = texts_of(path.name) if texts is None else texts
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    name = path.name.lower()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    else:
        plain = "\n\n".join(texts).encode() if ".txt" in name else lines
        path.write_bytes(packed(plain, name.rpartition(".")[2]))


def packed(data: bytes, ending: str) -> bytes:
    codec = {"zst": "zstd", "lz4": "lz4", "br": "brotli"}.get(ending)
    if codec is not None:
        buffer = pa.BufferOutputStream()
        with pa.CompressedOutputStream(buffer, codec) as file:
            file.write(data)
        return buffer.getvalue().to_pybytes()
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(ending, bytes)(data)


def names(side) -> list[str]:
    return [path.name for path in side.files]


def fails(pattern: str):
    return pytest.raises(UserError, match=re.compile(rf"\A[^\n]*{pattern}[^\n]*\Z"))


SPLITS = {
    "dev.jsonl train.jsonl": ("train.jsonl", "dev.jsonl"),
    "test-00000-of-00001.parquet train-00000-of-00001.parquet":
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    "test-0-of-1.parquet train-0-of-2.parquet train-1-of-2.parquet validation-0-of-1.parquet":
        ("train-0-of-2.parquet train-1-of-2.parquet", "validation-0-of-1.parquet"),
    "TRAIN.JSONL VAL.JSONL": ("TRAIN.JSONL", "VAL.JSONL"),
    "a.jsonl b.jsonl c.jsonl": ("a.jsonl b.jsonl", "c.jsonl"),
    "contest.txt evaluate.txt trainspotting.txt": ("contest.txt evaluate.txt", "trainspotting.txt"),
    "extra.jsonl train.jsonl": ("train.jsonl", "extra.jsonl"),
    "train-0.jsonl train-1.jsonl": ("train-0.jsonl", "train-1.jsonl"),
    "extra.jsonl train.jsonl val.jsonl": ("extra.jsonl train.jsonl", "val.jsonl"),
    "corpus.txt.gz heldout.txt": ("corpus.txt.gz", "heldout.txt"),
    "train.jsonl eval.jsonl dev.jsonl": ("train.jsonl", "dev.jsonl"),
    "train.jsonl eval.jsonl": ("train.jsonl", "eval.jsonl"),
    "train.parquet valid.jsonl": ("train.parquet", "valid.jsonl"),
    "train.jsonl val.txt": ("train.jsonl", "val.txt"),
    "train/0.jsonl train/1.jsonl validation/0.jsonl test/0.jsonl": ("0.jsonl 1.jsonl", "0.jsonl"),
    "valid1.txt valid2.txt z.txt": ("z.txt", "valid1.txt valid2.txt"),
    "README.txt a.txt b.txt": ("a.txt", "b.txt"),
    "LICENSE.txt a.jsonl b.jsonl": ("a.jsonl", "b.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("files", SPLITS)
def test_names_that_say_what_they_are_are_believed(tmp_path, files):
    for name in files.split():
        write(tmp_path / name)
    train, val = SPLITS[files]
    split = find_text(tmp_path)
    assert (names(split.train), names(split.val)) == (train.split(), val.split())
    assert not {*split.train.files} & {*split.val.files} and split.train.hold_out is None
    said = " ".join(text_lines(split))
    for path in tmp_path.rglob("*.*"):
        assert path.name in said or len(files.split()) > 4
    unread = {path for path in tmp_path.rglob("*.*") if path not in (*split.train.files, *split.val.files)}
    assert {entry.name for entry in split.left_out} == {str(path.relative_to(tmp_path)) for path in unread}


@pytest.mark.parametrize("name", ["test.jsonl", "dev.txt", "validation-00000-of-00001.parquet", "test/a.jsonl"])
def test_only_text_for_validation_or_test_is_not_trained_on(tmp_path, name):
    write(tmp_path / name)
    with fails(f"no text for training: {name} is for validation or test by name; add a file, or rename it"):
        find_text(tmp_path)


def test_the_named_shard_and_the_manifest_come_before_names(tmp_path):
    for name in ("train.jsonl", "val.jsonl", "more.jsonl", "test.jsonl"):
        write(tmp_path / name)
    split = find_text(tmp_path, "more")
    assert names(split.val) == ["more.jsonl"] and split.how_split == "as --data.val-shard says"
    assert names(split.train) == ["train.jsonl"]
    assert dict(split.left_out) == {
        "test.jsonl": "called test, so never trained on", "val.jsonl": "called val, so never trained on"}  # fmt: skip
    assert names(find_text(tmp_path, "train.jsonl").train) == ["more.jsonl"]
    record = {name: Record("d", 1, "", ()) for name in ("more.jsonl",)}
    Manifest(tmp_path, {"d": Origin("", "", "more.jsonl")}, record).write()
    assert names(find_text(tmp_path).val) == ["more.jsonl"]


def test_a_shard_in_a_sub_folder_is_named_by_its_path(tmp_path):
    for name in ("a/0.jsonl", "b/0.jsonl", "b/1.jsonl"):
        write(tmp_path / name)
    assert find_text(tmp_path, "b/0.jsonl").val.files == (tmp_path / "b" / "0.jsonl",)
    assert find_text(tmp_path, "1").val.files == (tmp_path / "b" / "1.jsonl",)
    assert find_text(tmp_path, "b/1").val.files == (tmp_path / "b" / "1.jsonl",)
    with fails("validation shard '0.jsonl' is any of a/0.jsonl, b/0.jsonl; write one of these"):
        find_text(tmp_path, "0.jsonl")
    with fails("validation shard 'c' is not in"):
        find_text(tmp_path, "c")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst", "lz4", "br"])
@pytest.mark.parametrize("form", ["jsonl", "txt", "ndjson", "json"])
def test_compressed_text_is_read(tmp_path, form, ending):
    write(tmp_path / f"a.{form}.{ending}")
    write(tmp_path / f"B.{form.upper()}.{ending.upper()}")
    expected = texts_of(f"B.{form.upper()}.{ending.upper()}")
    found = list(iterate_texts(find_text(tmp_path, "a").train))
    assert found == (["\n\n".join(expected)] if form == "txt" else expected)
    whole = (tmp_path / f"a.{form}.{ending}").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not compressed"):
        (tmp_path / f"a.{form}.{ending}").write_bytes(damaged)
        with fails(rf"a.{form}.{ending} cannot be read"):
            list(iterate_texts(find_text(tmp_path, f"B.{form.upper()}.{ending.upper()}").train))


def test_json_is_lines_or_one_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts_of("a")], indent=1))
    write(tmp_path / "b.json", texts_of("b"))
    (tmp_path / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string"}}}')
    split = find_text(tmp_path)
    assert list(iterate_texts(split.train)) == texts_of("a") and list(iterate_texts(split.val)) == texts_of("b")
    assert [*split.left_out] == [("dataset_info.json", "json without a field 'text'")]
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"text": 3}, 5]')
    with fails(r"a.json: item 2: field 'text' is a number, not a string"):
        list(iterate_texts(find_text(tmp_path).train))
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"text": ')
    with fails(r"a.json: broken JSON"):
        list(iterate_texts(find_text(tmp_path).train))


def test_forms_may_be_mixed(tmp_path):
    for name in ("a.parquet", "b.jsonl", "c.JSON", "d.jsonl.zst"):
        write(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    write(tmp_path / "about.txt")
    split = find_text(tmp_path)
    assert list(iterate_texts(split.train)) == [
        text for name in ("a.parquet", "b.jsonl", "c.JSON") for text in texts_of(name)
    ]
    assert list(iterate_texts(split.val)) == texts_of("d.jsonl.zst")
    assert [name for name, _ in split.left_out] == ["about.txt", "notes.md"]


def test_sub_folders_links_and_everything_else_is_named(tmp_path):
    for name in (
        "text/a.txt",
        "text/books/one.txt",
        "text/books/old/two.TXT",
        "elsewhere/three.txt",
        "text/.hidden.txt",
    ):
        write(tmp_path / name)
    folder = tmp_path / "text"
    (folder / "books" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "self").symlink_to(folder / "self")
    (folder / "empty.txt").write_text("")
    os.mkfifo(folder / "pipe.txt")
    for name in ("b.zip", "c.pdf", "d.txt.bak", "e.parquet.gz", "table.csv"):
        (folder / name).write_text("x")
    split = find_text(folder)
    assert [path.relative_to(folder).as_posix() for path in split.train.files] == [
        "a.txt", "books/old/two.TXT", "books/one.txt", "more/three.txt"]  # fmt: skip
    assert split.train.hold_out and split.val.files == split.train.files
    assert dict(split.left_out) == {
        "again.txt": "a link to what a.txt is", "b.zip": "compressed or an archive; unpack it", "c.pdf": "not text",
        "books/loop": "a link to a folder that is read already", "up": "a link to a folder that is read already",
        "d.txt.bak": "not text", "e.parquet.gz": "compressed or an archive; unpack it", "empty.txt": "empty",
        "gone.txt": "a link to nothing", "pipe.txt": "not a file", "self": "a link to nothing",
        "table.csv": "csv is not read as it is"}  # fmt: skip
    lines = text_lines(split)
    assert lines[0].startswith("text: 4 files of txt (0.") and "one in " in lines[0] and "\n" not in "".join(lines)
    assert all(name in lines[-1] for name, _ in split.left_out)
    json.dumps(text_record(split))


def test_runs_in_the_folder_are_not_text(tmp_path):
    """Their metrics would be, and each start would have another text."""
    write(tmp_path / "a.jsonl")
    for run, mark in (("runs/new", ".lock"), ("runs/of an earlier version", "tokenizer/tokenizer.json")):
        for name in (mark, "config.json", "metrics.jsonl", "data/pretrain/0.txt"):
            (tmp_path / run / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / run / name).write_text('{"text": "a"}\n')
    split = find_text(tmp_path)
    assert [path.name for path in split.train.files] == ["a.jsonl"]
    assert split.left_out == (("runs/new", "a run"), ("runs/of an earlier version", "a run"))
    with fails("runs/new is the directory of a run, not of data; what it generated is in .*runs/new/data"):
        find_text(tmp_path / "runs" / "new")


def test_many_files_of_a_kind_are_counted(tmp_path):
    write(tmp_path / "a.jsonl")
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_text("x")
    assert text_record(find_text(tmp_path))["left_out"] == ["00.png, 01.png, 02.png, 27 more (not text)"]


def test_a_folder_with_other_data_beside_its_text(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "chat/train.jsonl", "eval/gsm8k/test.jsonl"):
        write(tmp_path / name)
    split = find_text(tmp_path)
    assert (names(split.train), names(split.val), split.left_out) == (["a.jsonl"], ["b.jsonl"], ())
    write(tmp_path / "pretrain" / "c.jsonl")
    write(tmp_path / "more" / "d.jsonl")
    split = find_text(tmp_path)
    assert names(split.train) == ["c.jsonl"]
    beside = ["../a.jsonl", "../b.jsonl", "../more/"]
    assert dict(split.left_out) == dict.fromkeys(beside, "beside pretrain/, which has the text")


@pytest.mark.parametrize("ending", ["txt", "md"])
def test_many_files_take_time_in_proportion(tmp_path, monkeypatch, ending):
    for i in range(400):
        (tmp_path / f"{i}.{ending}").write_text("a story")
    write(tmp_path / ("train.jsonl" if ending == "md" else "train.txt"))
    compared, equal = 0, PurePath.__eq__

    def count(one, other):
        nonlocal compared
        compared += 1
        return equal(one, other)

    monkeypatch.setattr(PurePath, "__eq__", count)
    text_lines(find_text(tmp_path))
    assert compared < 40 * 400


def test_one_text_in_several_forms_is_read_once(tmp_path):
    for name in ("a.parquet", "a.jsonl", "b.jsonl.gz", "b.jsonl", "c.jsonl"):
        write(tmp_path / name)
    split = find_text(tmp_path)
    assert (names(split.train), names(split.val)) == (["a.parquet", "b.jsonl"], ["c.jsonl"])
    assert dict(split.left_out) == {
        "a.jsonl": "the name of a.parquet with another ending",
        "b.jsonl.gz": "the name of b.jsonl with another ending",
    }


@pytest.mark.parametrize("last", ["z.parquet", "z.jsonl", "z.txt", "validation.parquet"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_last_file_without_text_is_not_for_validation(tmp_path, last, texts):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.{last.rpartition('.')[2]}")
    write(tmp_path / last, texts)
    split = find_text(tmp_path)
    assert (names(split.train), names(split.val)) == (
        [f"a.{last.rpartition('.')[2]}"],
        [f"b.{last.rpartition('.')[2]}"],
    )
    assert [entry.name for entry in split.left_out] == [last]
    with fails("has no text, so it cannot be for validation|is not in"):
        find_text(tmp_path, last)


def test_a_shard_without_rows_keeps_its_place(tmp_path):
    for name, texts in (("a.parquet", None), ("b.parquet", []), ("c.parquet", None)):
        write(tmp_path / name, texts)
    split = find_text(tmp_path)
    assert names(split.train) == ["a.parquet", "b.parquet"]  # positions in earlier runs count its row group
    assert [*split.left_out] == [("b.parquet", "no rows")] and "to train on a.parquet (" in text_lines(split)[0]


def test_nothing_to_train_on_is_said(tmp_path):
    write(tmp_path / "train.jsonl", ["", ""])
    write(tmp_path / "val.jsonl")
    with fails("there is no text to train on in .*, only in val.jsonl"):
        find_text(tmp_path)
    write(tmp_path / "val.jsonl", [""])
    with fails("contains no text"):
        find_text(tmp_path)


TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
         pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.binary())]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_columns_of_any_kind_of_string(tmp_path, kind):
    texts = ["das Straßenschild", "", "日本語", "the cat sat", "das Straßenschild"] * 50
    values = pa.array([*texts, None], pa.string())
    column = values.cast(pa.binary()).dictionary_encode() if kind == TYPES[-1] else values.cast(kind)
    pq.write_table(
        pa.table({"id": list(range(len(values))), "text": column}), tmp_path / "a.parquet", row_group_size=100
    )
    write(tmp_path / "b.parquet")
    side = find_text(tmp_path).train
    assert list(iterate_texts(side)) == [text for text in texts if text]
    fast = Tokenizer.train_from_files([tmp_path / "a.parquet"], 270)
    assert fast.mergeable_ranks == Tokenizer.train_from_iterator([text for text in texts if text], 270).mergeable_ranks


def test_columns_that_are_no_text(tmp_path):
    write(tmp_path / "b.parquet")
    for values in ([["x"]], [{"text": "x"}], [1.5]):
        pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        with fails("a.parquet: column 'text' contains .*, not strings"):
            find_text(tmp_path)
    pq.write_table(pa.table({"text": pa.nulls(5)}), tmp_path / "a.parquet")
    with fails("there is no text to train on in .*, only in b.parquet"):
        find_text(tmp_path)
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xff"], pa.binary())}), tmp_path / "a.parquet")
    with fails(r"a.parquet: row group 0, document 1 is not UTF-8 \(byte 0\)"):
        list(iterate_texts(find_text(tmp_path).train))
    (tmp_path / "a.parquet").write_bytes(b"")
    with fails("a.parquet is not a parquet file"):
        find_text(tmp_path)


# --- the commands in messages do what they say ------------------------------------------------------------------------


def run_command_in(error: pytest.ExceptionInfo[UserError]) -> None:
    found = re.search(r"(?:python -c|iconv) .*?(?=; --data\.on-bad|$)", str(error.value))
    assert found is not None
    command = found[0].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "a b.txt"), ("cp1252", "a.txt"), ("latin-1", "it's.jsonl")])
def test_text_in_an_older_encoding_is_converted(tmp_path, encoding, name):
    texts = [f"Satz {i} in einem Café, “ohne” Müll" for i in range(60)]
    texts = [text.replace("“", "").replace("”", "") if encoding == "latin-1" else text for text in texts]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts] if name.endswith("jsonl") else texts
    (tmp_path / name).write_bytes("\n\n".join(lines).encode(encoding))
    with fails(r"not UTF-8.*; if the file is (LATIN1|WINDOWS-1252), convert it with: iconv") as error:
        list(iterate_texts(find_text(tmp_path).train))
    run_command_in(error)
    split = find_text(tmp_path)
    read = " ".join([*iterate_texts(split.train), *iterate_texts(split.val)])
    assert all(text in read for text in texts)


def test_text_that_is_partly_utf8_is_not_called_latin_1(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe ".encode() * 50 + b"\xe9")
    with fails("not UTF-8 text .*; convert or remove it"):
        list(iterate_texts(find_text(tmp_path).train))


def test_a_column_of_lists_is_joined(tmp_path):
    pq.write_table(
        pa.table({"id": range(8), "text": [[text, "second"] for text in texts_of("a")]}), tmp_path / "a.parquet"
    )
    with fails(r"contains list<.*, not strings; to join the strings of each row: python -c") as error:
        find_text(tmp_path)
    run_command_in(error)
    split = find_text(tmp_path)
    read = [*iterate_texts(split.train), *iterate_texts(split.val)]
    assert sorted(read) == sorted(f"{text}\nsecond" for text in texts_of("a"))


def test_a_column_of_numbers_is_refused_and_another_of_strings_named(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with fails("contains int64, not strings; write the file again with strings in it"):
        find_text(tmp_path)
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with fails("contains int64, not strings; to train on 'body', give it the name 'text'"):
        find_text(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.xz"])
def test_a_file_that_is_not_compressed_as_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a cat"}\n' * 9)
    with fails(rf"{name} cannot be read: it is not compressed as its name says; take {Path(name).suffix} off the name"):
        find_text(tmp_path)


def test_plain_text_of_another_ending_and_conversations_have_their_remedy(tmp_path):
    (tmp_path / "a.md").write_text("a story")
    with fails(r"put .* there, and rename to .txt what is plain text"):
        find_text(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n')
    with fails(r"chats.jsonl:1: no field 'text'; .*conversations belong in the folder chat/"):
        find_text(tmp_path)


@pytest.mark.parametrize("name", ["a b.parquet", "it's.jsonl"])
def test_a_column_is_renamed(tmp_path, name):
    rows = [{"id": i, "content": text} for i, text in enumerate(texts_of("a"))]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "z.jsonl")
    with pytest.raises(UserError, match="no (column|field) 'text'; .* id, content") as error:
        find_text(tmp_path)
    run_command_in(error)
    assert list(iterate_texts(find_text(tmp_path).train)) == texts_of("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "z.jsonl"])


def test_one_of_two_columns_is_kept(tmp_path):
    columns = [pa.array(texts_of("a")), pa.array(texts_of("b"))]
    pq.write_table(pa.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has 2 columns 'text'; to keep the first alone: python") as error:
        find_text(tmp_path)
    run_command_in(error)
    split = find_text(tmp_path)
    assert sorted([*iterate_texts(split.train), *iterate_texts(split.val)]) == texts_of("a")


@pytest.mark.parametrize("kind", ["csv", "tsv", "arrow", "feather", "TSV"])
@pytest.mark.parametrize("beside", ["other.jsonl", "README.txt", None])
def test_a_table_is_converted(tmp_path, kind, beside):
    texts = [*texts_of("a"), "with\na line break, and a comma"]
    path = tmp_path / f"train.{kind}"
    if kind.lower() in ("csv", "tsv"):
        mark = "\t" if kind.lower() == "tsv" else ","
        path.write_text(f"id{mark}text\n" + "".join(f'{i}{mark}"{text}"\n' for i, text in enumerate(texts)))
    elif kind == "arrow":
        table = pa.table({"text": texts})
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    else:
        feather.write_feather(pa.table({"text": texts}), path)
    if beside:
        write(tmp_path / beside)
    with pytest.raises(UserError, match=f"{kind.lower()} is not read as it is; convert it with: python") as error:
        find_text(tmp_path)
    run_command_in(error)
    split = find_text(tmp_path)
    assert "train.parquet" in names(split.train)
    found = [*iterate_texts(split.train), *(iterate_texts(split.val) if split.train.hold_out else [])]
    assert sorted(found) == sorted(texts)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_utf_16_is_converted(tmp_path, form, encoding):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.{form}")
    path = tmp_path / f"a.{form}"
    text = path.read_text()
    path.write_bytes(text.encode(encoding))
    with pytest.raises(
        UserError, match=rf"a.{form} is UTF-(16|16LE|16BE|32), not UTF-8; convert it with: iconv"
    ) as error:
        find_text(tmp_path)
    said = []
    skipping = find_text(tmp_path, on_bad="skip", say=said.append)
    assert names(skipping.train) == [f"b.{form}"] and len(said) == 1 and said[0].endswith("; left out")
    run_command_in(error)
    assert path.read_text() == text and names(find_text(tmp_path).train) == [f"a.{form}"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"text", mtime=0), r"is gzip-compressed; rename it so that its name ends in .gz"),
        (b"PAR1....PAR1", "is parquet; rename it so that its name ends in .parquet"),
        (b"PK\x03\x04....", "is a zip archive; unpack it"),
        (b"%PDF-1.7", "is a PDF; convert it to plain text"),
        (b"some text\0\0\0\0 and more", "contains zero bytes, so it is not text; remove it"),
    ],
)
def test_files_that_are_not_what_they_are_called(tmp_path, data, message):
    write(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_bytes(data)
    with fails(f"a.txt {message}; --data.on-bad=skip leaves it out"):
        find_text(tmp_path)


def test_lines_as_editors_leave_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": null}\r\n{"text": "two", "id": 3}')
    write(tmp_path / "b.jsonl")
    assert list(iterate_texts(find_text(tmp_path).train)) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_packed_text_is_utf_8_too(tmp_path, name):
    write(tmp_path / "b.jsonl")
    write(tmp_path / "train.txt.gz")
    (tmp_path / name).write_bytes(gzip.compress('{"text": "some text"}\n'.encode("utf-16-le")))
    (tmp_path / name).rename(tmp_path / f"train_{name}")
    with fails(f"train_{name}, unpacked, is UTF-16LE, not UTF-8; convert it with: iconv"):
        list(iterate_texts(find_text(tmp_path).train))
