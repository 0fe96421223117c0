"""Task files and archives are downloaded and converted to what tasks read, or refused."""

import hashlib
import io
import zipfile

import pytest

from jaxchat.data.hub.catalogue import Archive, Dataset, Request
from jaxchat.data.hub.download import Download
from jaxchat.data.manifest import Manifest
from jaxchat.errors import UserError
from jaxchat.tasks import load_task
from tests.data.hub_server import Fault, get, parquet

CHAT = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}] for i in range(5)]
SETS = {
    "HuggingFaceTB/smol-smoltalk": {
        "data/train-00000-of-00002.parquet": {"messages": CHAT[:2], "source": ["a", "b"]},
        "data/train-00001-of-00002.parquet": {"messages": [CHAT[2], [CHAT[0][1]]], "source": ["a", None]},
        "data/test-00000-of-00001.parquet": {"messages": CHAT[3:], "source": ["c", "c"]},
    },
    "openai/gsm8k": {
        f"main/{split}-00000-of-00001.parquet": {"question": [f"1 + {n}?"], "answer": [f"#### {n + 1}"]}
        for n, split in enumerate(("train", "test"))
    },
    "allenai/ai2_arc": {
        f"ARC-{kind}/{split}-00000-of-00001.parquet": {
            "question": ["which?", "who?"], "answerKey": ["B", "1"],
            "choices": [{"text": ["x", "y"], "label": ["A", "B"]}, {"text": ["u", "v"], "label": ["1", "2"]}],
        }
        for kind in ("Easy", "Challenge") for split in ("train", "validation", "test")
    },
    "cais/mmlu": {
        f"all/{split}-00000-of-00001.parquet": {
            "question": [f"{split} {i}" for i in range(20)], "subject": ["law"] * 20,
            "choices": [["a", "b", "c", "d"]] * 20, "answer": [3] * 20,
        }
        for split in ("dev", "validation", "test")
    },
    "openai/openai_humaneval": {
        "openai_humaneval/test-00000-of-00001.parquet": {
            "task_id": ["0"], "prompt": ["def f():\n"], "canonical_solution": ["    return 1\n"],
            "test": ["def check(f):\n    assert f() == 1\n"], "entry_point": ["f"],
        }
    },
}  # fmt: skip


@pytest.fixture
def tasks(server):
    for repo, files in SETS.items():
        server.repos[repo] = {name: parquet(columns) for name, columns in files.items()}
    return server


def test_tasks_read_what_was_downloaded(tasks, tmp_path):
    said = []
    get(tmp_path, "smoltalk", "gsm8k", "arc", "mmlu", "humaneval", said=said)
    assert [conversation["messages"] for conversation in load_task("smoltalk", "train", tmp_path)] == CHAT[:3]
    assert "chat/smoltalk/train.jsonl.gz: 1 rows that no task can use are left out" in said
    assert len(load_task("smoltalk", "val", tmp_path)) == 2
    assert "1 + 1?" in str(load_task("gsm8k", "test", tmp_path)[0])
    item = {"question": "who?", "choices": ["u", "v"], "gold": 0, "labels": ["1", "2"]}
    assert load_task("arc_easy", "val", tmp_path).items[1] == item
    assert load_task("nanochat_arc_easy", "val", tmp_path)[0]["letters"] == ("1", "2")
    assert len(load_task("arc_challenge", "test", tmp_path)) == 2
    assert len(load_task("mmlu", "test", tmp_path)) == 20 and len(load_task("mmlu", "train", tmp_path)) == 38
    assert len(load_task("humaneval", "test", tmp_path)) == 1
    record = Manifest.read(tmp_path).files["chat/smoltalk/train.jsonl.gz"]
    assert record.made_of == ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    before = (tmp_path / "chat/smoltalk/train.jsonl.gz").read_bytes()
    (tmp_path / "chat/smoltalk/train.jsonl.gz").unlink()
    get(tmp_path, "smoltalk")
    assert (tmp_path / "chat/smoltalk/train.jsonl.gz").read_bytes() == before


def test_a_data_set_whose_format_has_changed(tasks, tmp_path):
    tasks.repos["openai/gsm8k"]["main/train-00000-of-00001.parquet"] = parquet({"problem": ["1"]})
    with pytest.raises(
        UserError, match="train-00000-of-00001.parquet.* does not have the format that jaxchat knows: Key"
    ):
        get(tmp_path / "a", "gsm8k")
    tasks.repos["openai/gsm8k"]["main/train-00000-of-00001.parquet"] = b"no parquet"
    with pytest.raises(UserError, match="is not a parquet file"):
        get(tmp_path / "b", "gsm8k")
    del tasks.repos["openai/gsm8k"]["main/train-00000-of-00001.parquet"]
    with pytest.raises(UserError, match=r"has no main/train-\*.parquet; the data set has changed"):
        get(tmp_path / "c", "gsm8k")


def archive(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name, text in files.items():
            zipped.writestr(name, text)
    return packed.getvalue()


def get_archive(server, folder, data: bytes, sha256: str | None = None) -> None:
    server.files["/bundle.zip"] = data
    content = Archive(f"{server.url}/bundle.zip", sha256 or hashlib.sha256(data).hexdigest(), "bundle", "eval/bundle")
    dataset = Dataset("bundle", "tasks", "none", "", content, len(data))
    Download(folder, [Request(dataset)], say=lambda line: None, backoff=0.01).run()


def test_an_archive(server, tmp_path):
    data = archive(
        {"bundle/core.yaml": "tasks", "bundle/data/a.jsonl": "{}" * 9_000, "__MACOSX/bundle/._core.yaml": ""}
    )
    server.faults["/bundle.zip"].append(Fault(first=100))
    get_archive(server, tmp_path, data)
    assert (tmp_path / "eval/bundle/data/a.jsonl").read_text() == "{}" * 9_000
    assert sorted(Manifest.read(tmp_path).files) == ["eval/bundle/core.yaml", "eval/bundle/data/a.jsonl"]
    assert server.gets("/bundle.zip") == [None, "bytes=100-"]
    get_archive(server, tmp_path, data)
    assert len(server.gets("/bundle.zip")) == 2
    with pytest.raises(UserError, match="bundle.zip arrived with the wrong bytes"):
        get_archive(server, tmp_path / "b", data, "0" * 64)
    with pytest.raises(UserError, match=r"bundle/\.\./\.\./x leads out of the archive's folder"):
        get_archive(server, tmp_path / "c", archive({"bundle/../../x": "evil"}))
    with pytest.raises(UserError, match="bundle.zip.* is damaged"):
        get_archive(server, tmp_path / "d", b"no zip")
