"""Text, tasks and runs in the storage of a cloud, which here is a folder that answers to s3://."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

import launch
from jaxchat.config import UserError
from jaxchat.data.manifest import Manifest, Record, Source
from jaxchat.data.shards import find_text, iterate_texts
from jaxchat.metrics import read_metrics
from jaxchat.storage import is_folder, size_of, to_path
from jaxchat.tasks import load_task
from tests.tiny import refusal, start


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that s3://bucket stands for."""

    class Storage(DirFileSystem):
        protocol = "s3"

        def __init__(self, **_):
            super().__init__(path=str(tmp_path), fs=LocalFileSystem(auto_mkdir=True))

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("s3://")

        def _join(self, path):
            return super()._join(self._strip_protocol(path) if isinstance(path, str) else path)

    monkeypatch.setitem(_registry, "s3", Storage)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    (tmp_path / "bucket").mkdir()
    yield tmp_path / "bucket"
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def write(path, start, stop):
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"document {i}: the cat sat on a mat" for i in range(start, stop)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    return texts


def test_text_in_a_bucket(bucket):
    for number in range(3):
        write(bucket / "text" / "pretrain" / f"{number}.parquet", 100 * number, 100 * number + 100)
    (bucket / "lines").mkdir()
    for number in range(2):
        (bucket / "lines" / f"{number}.jsonl").write_text(f'{{"text": "line {number}"}}\n' * 3)
    for folder in ("text", "lines"):
        here, there = find_text(bucket / folder), find_text(f"s3://bucket/{folder}")
        for side in ("train", "val"):
            assert list(iterate_texts(getattr(there, side))) == list(iterate_texts(getattr(here, side)))
    assert size_of(to_path("s3://bucket/lines/0.jsonl")) == (bucket / "lines" / "0.jsonl").stat().st_size
    record = Record("text", 1, "", ())
    names = [f"pretrain/{number}.parquet" for number in range(3)]
    Manifest(bucket / "text", {"text": Source("", "", names[0])}, dict.fromkeys(names, record)).write()
    assert [path.name for path in find_text("s3://bucket/text").val.files] == ["0.parquet"]
    (bucket / "text" / "pretrain" / "1.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="s3://bucket/text/pretrain/1.parquet is not a parquet file"):
        find_text("s3://bucket/text")


def test_tasks_in_a_bucket(bucket):
    (bucket / "chat").mkdir()
    (bucket / "chat" / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    assert len(load_task("chat", "train", "s3://bucket")) == 1
    assert len(load_task("s3://bucket/chat/train.jsonl", "train", "nowhere")) == 1


def test_a_run_reads_its_text_from_a_bucket_and_lives_in_one(bucket):
    for number in range(2):
        write(bucket / "text" / f"{number}.parquet", 0, 500)
    arguments = ("--data=s3://bucket/text", "--stages=tokenizer")
    code, out, err = start("s3://bucket/run", *arguments)
    assert code == 0, err
    assert (bucket / "run" / "tokenizer" / "tokenizer.json").exists()
    code, out, err = start("s3://bucket/run", *arguments)
    assert code == 0 and "tokenizer finished before" in out
    assert launch.configure("d12", [], "s3://bucket/text", ()).data.download == ()
    assert read_metrics("s3://bucket/run") == []
    code, out, err = start("s3://bucket/made-up", "--stages=tokenizer")
    assert code == 0, err
    assert list((bucket / "made-up" / "data" / "pretrain").glob("*.parquet"))
    assert "--fresh moves aside what is on this machine" in refusal(start("s3://bucket/run", "--fresh", *arguments))


@pytest.mark.parametrize(
    "path, expected",
    {
        "s4://bucket": "s4://bucket: no such storage, did you mean 's3'? There are: gs://, s3://, az://, hf://",
        "az://bucket": "az://bucket needs adlfs, which is not installed; pip install adlfs",
    }.items(),
)
def test_storage_that_is_not_there(path, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)  # as if it were not installed
    for arguments in ([f"--data={path}"], [f"--run-dir={path}/run"]):
        assert expected.partition(" ")[2] in refusal(start(tmp_path / "run", *arguments))


def test_storage_that_does_not_answer(bucket, monkeypatch):
    def fail(self, path):
        raise ConnectionError("no credentials\nat all")

    monkeypatch.setattr(DirFileSystem, "isdir", fail)
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be reached \(no credentials\); check the name and your"):
        is_folder(to_path("s3://bucket/x"))
