"""Text named by its files and folders."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.data.text.given import given_files
from jaxchat.errors import UserError


def test_files_and_folders(tmp_path):
    folder = tmp_path / "texts"
    (folder / "pretrain").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["one", "", "two"]}), folder / "pretrain" / "a.parquet")
    (folder / "pretrain" / "b.jsonl").write_text('{"text": "three"}\n{"text": "vier ü"}\n')
    (folder / "pretrain" / "notes.md").write_text("no")
    (tmp_path / "story.txt").write_text("A story.\n\nIt has paragraphs.")
    (tmp_path / "README.md").write_text("# Read me\n")
    said = []
    names = [
        str(tmp_path / "story.txt"),
        f"{folder}/",
        str(folder / "pretrain" / "b.jsonl"),
        str(tmp_path / "README.md"),
    ]
    files = given_files(names, said.append)
    assert [one.name for one in files] == [
        names[0], f"{folder}/pretrain/a.parquet", f"{folder}/pretrain/b.jsonl", names[3],
    ]  # fmt: skip
    assert [[text for _, text in one.documents()] for one in files] == [
        ["A story.\n\nIt has paragraphs."], ["one", "two"], ["three", "vier ü"], ["# Read me\n"],
    ]  # fmt: skip
    assert {source for one in files for source, _ in one.documents()} == {one.name for one in files}
    assert files[0].bytes == 28 and all(one.bytes > 0 for one in files)
    assert said == ["not read: notes.md (not text)"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", None, "there is no {path}, did you mean 'a.text'? Name files or folders of text"),
        ("a.txt", b"", "{path} is empty; name a file with text"),
        ("a.bin", b"some text\x00and more", "{path} contains zero bytes, so it is not text; remove it"),
        ("a.txt", b"PK\x03\x04", "{path} is a zip archive; unpack it"),
        ("a.parquet", b"no", "{path} is not a parquet file: "),
        ("a.jsonl", b'{"text": 1}\n', "{path}:1: field 'text' is a number, not a string"),
        ("a.jsonl", json.dumps({"story": "x"}).encode(), "{path}:1: no field 'text'; the fields are: story"),
        ("a.md", b"caf\xe9", "{path} is not UTF-8 text (byte 3)"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, contents, message):
    path = tmp_path / name
    if contents is None:
        (tmp_path / "a.text").write_text("there")
    else:
        path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        for one in given_files([str(path)]):
            [*one.documents()]
    assert message.format(path=path) in str(error.value) and "--data." not in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is the directory of a run"):
        given_files([str(tmp_path / "run")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no text in .*empty; name a folder with"):
        given_files([str(tmp_path / "empty")])


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "json"])
def test_records_may_say_where_they_are_from(tmp_path, ending):
    records = [{"text": "one", "source": "books"}, {"text": "two", "source": "web"}, {"text": "", "source": "web"},
               {"text": "three", "source": ""}, {"text": "four", "source": "books"}]  # fmt: skip
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif ending == "json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (file,) = given_files([str(path)])
    assert [*file.documents()] == [("books", "one"), ("web", "two"), (str(path), "three"), ("books", "four")]
    if ending == "jsonl":
        path.write_text(path.read_text() + '{"text": 1, "source": "web"}\n')
        with pytest.raises(UserError, match="a.jsonl:6: 'text' is a number, not a string$"):
            [*file.documents()]
