"""Text and tasks are used while they are still downloading, with the same result as if they had been there."""

import json
import threading
import time

import numpy as np
import pytest
from huggingface_hub import constants

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.options import configure
from jaxchat.data.hub.background_download import BackgroundDownload
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.loader import pretrain_batches
from jaxchat.data.manifest import Manifest
from jaxchat.data.text.shards import TextBlocks, TextFiles, iterate_texts
from jaxchat.errors import UserError
from jaxchat.runs.metrics import read_metrics
from jaxchat.tokenizer import Tokenizer
from tests.data.hub_server import LAST, REPO, SHARDS, TEXT, Fault, parquet
from tests.tiny import record, refusal, start

TOKENIZER = Tokenizer.train_from_iterator(["the cat sat on a mat"] * 3, 265)
NAMES = ["shard_00000.parquet", "shard_00001.parquet"]


def background_download(folder, *entries, said=None, **options):
    say = (lambda line: None) if said is None else said.append
    return BackgroundDownload(folder, parse_requests(entries), say, **{"backoff": 0.01} | options)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The same text without any download."""
    folder = tmp_path_factory.mktemp("there")
    for name in SHARDS:
        (folder / name).write_bytes(SHARDS[name])
    return TextFiles(tuple(folder / name for name in NAMES))


def batches(side, **options):
    return pretrain_batches(side, TOKENIZER, **{"rows": 2, "sequence_len": 512, "seed": 0} | options)


def assert_same(left, right, count):
    for _ in range(count):
        a, b = next(left), next(right)
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
        np.testing.assert_array_equal(a["targets"], b["targets"])


def test_training_begins_with_the_first_shard(server, tmp_path, there):
    server.held = {NAMES[1]}
    said = []
    source = background_download(tmp_path, f"{TEXT}:2", said=said)
    text = source.text()
    iterator, whole = batches(text.train), batches(there)
    assert_same(iterator, whole, 5)
    assert len(list(iterate_texts(text.val))) == 400
    assert not (tmp_path / "pretrain" / NAMES[1]).exists()
    # A position saved now can be resumed when all files are there, and the reverse.
    early = json.loads(json.dumps(iterator.get_state()))
    assert early["lanes"]["0"]["blocks"] is None
    server.gate.set()
    assert_same(iterator, whole, 800)  # into the second epoch
    place = iterator.get_state()["lanes"]["0"]
    assert place["epoch"] == 1 and place["blocks"] == 8
    resumed = batches(there)
    resumed.set_state(early)
    again = batches(there)
    for _ in range(5):
        next(again)
    assert_same(resumed, again, 3)
    assert any("in the background" in line for line in said) and "download complete" in said[-1]


def test_lanes_begin_with_the_first_shard_too(server, tmp_path, there):
    server.held = {NAMES[1]}
    iterator, whole = batches(background_download(tmp_path, f"{TEXT}:2").text().train, lanes=2), batches(there, lanes=2)
    assert_same(iterator, whole, 5)
    early = json.loads(json.dumps(iterator.get_state()))
    assert early["of"] == 2 and all(place["blocks"] is None for place in early["lanes"].values())
    server.gate.set()
    assert_same(iterator, whole, 800)  # into the second epoch
    resumed, again = batches(there, lanes=2), batches(there, lanes=2)
    resumed.set_state(early)
    for _ in range(5):
        next(again)
    assert_same(resumed, again, 3)


def test_a_reader_that_waits_for_a_shard_can_be_interrupted(server, tmp_path, there):
    server.held = {NAMES[1]}
    iterator, whole = batches(background_download(tmp_path, f"{TEXT}:2").text().train), batches(there)
    state = iterator.get_state()
    for ends in (lambda: iterator.set_state(state), iterator.close):
        assert_same(iterator, whole, 5)
        time.sleep(0.5)  # the thread is ahead, and waits
        began = time.monotonic()
        ends()
        assert time.monotonic() - began < 2 and not server.gate.is_set()
        whole = batches(there)


def test_shards_in_any_order_give_the_same_blocks(server, tmp_path, there):
    server.held = {NAMES[0]}
    text = background_download(tmp_path, f"{TEXT}:2").text()
    threading.Timer(0.3, server.gate.set).start()
    assert list(TextBlocks(text.train)) == list(TextBlocks(there))


def test_a_failed_download_is_an_error_where_its_text_is_read(server, tmp_path):
    del server.repos[REPO][NAMES[1]]
    iterator = batches(background_download(tmp_path, f"{TEXT}:2").text().train, repeat=False)
    with pytest.raises(UserError, match=rf"{NAMES[1]}: the server has no http\S+ \(404\)"):
        for _ in iterator:
            pass


def test_a_background_download_never_gives_up(server, tmp_path):
    server.faults[NAMES[0]].extend(Fault(status=503) for _ in range(12))
    assert len(list(iterate_texts(background_download(tmp_path, f"{TEXT}:1", backoff=1e-4).text().train))) == 400


def test_several_processes_share_one_download(server, tmp_path):
    server.seconds_per_piece = 0.002
    sources = [background_download(tmp_path, f"{TEXT}:2") for _ in range(3)]
    sides = [source.text().train for source in sources]
    assert [len(list(iterate_texts(side))) for side in sides] == [800] * 3
    assert [len(server.gets(f"/{name}")) for name in NAMES] == [1, 1]


def test_another_shard_may_be_for_validation_but_the_pinned_one_is_never_trained_on(server, tmp_path):
    text = background_download(tmp_path, f"{TEXT}:2").text("shard_00001")
    assert [path.name for path in text.train.files] == NAMES[:1] and text.val.files[0].name == NAMES[1]
    with pytest.raises(UserError, match="'shard_00009' is not among those of fineweb-edu"):
        background_download(tmp_path, f"{TEXT}:2").text("shard_00009")
    with pytest.raises(UserError, match="the only shard requested is for validation; request more"):
        background_download(tmp_path, f"{TEXT}:1").text("shard_00000")


def test_the_users_text_is_used_instead(server, tmp_path):
    said = []
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"my text {i}")
    source = background_download(tmp_path, f"{TEXT}:2", said=said)
    assert list(iterate_texts(source.text().train)) == ["my text 0"]
    assert said == [f"data      {tmp_path} contains text of your own, which is used instead of {TEXT}"]
    assert not server.asked


def test_tasks_are_waited_for_and_the_users_stay(server, tmp_path):
    question = {"question": ["1 + 1?"], "answer": ["#### 2"]}
    name = "main/train-00000-of-00001.parquet"
    server.repos["openai/gsm8k"] = {name: parquet(question), name.replace("train", "test"): parquet(question)}
    server.held = {name}
    source = background_download(tmp_path, "gsm8k")
    threading.Timer(0.3, server.gate.set).start()
    began = time.monotonic()
    source.wait_for_tasks()
    assert time.monotonic() - began > 0.25 and (tmp_path / "eval/gsm8k/train.jsonl").exists()
    own = tmp_path / "own" / "eval" / "gsm8k" / "test.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    background_download(tmp_path / "own", "gsm8k").wait_for_tasks()
    assert own.read_text() == "{}" and not (own.parent / "train.jsonl").exists()


def test_offline_a_run_fails_at_once_if_something_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and .* lacks 3 of 3 files of fineweb-edu"):
        background_download(tmp_path, f"{TEXT}:2").text()
    assert not server.asked


def test_an_experiment_downloads_what_it_names(server, tmp_path, monkeypatch):
    """From the command to checkpoints, with a server that fails at times; a second start needs no server."""
    server.faults[NAMES[0]].extend([Fault(first=70_000), Fault(wrong=True)])
    server.early[LAST].append(Fault(status=429, headers={"Retry-After": "0"}))
    folder = tmp_path / "data"
    folder.mkdir()
    arguments = ["--stages=tokenizer,pretrain", f"--data={folder}", f"--data.download={TEXT}:2"]
    arguments.append("--data.packing=best-fit")
    code, out, err = start(tmp_path / "run", *arguments)
    assert code == 0, err
    assert "arrived with the wrong bytes" in out and "429" in out
    assert record(tmp_path / "run", "pretrain")["steps"] == 6
    assert any("bpb" in line for line in read_metrics(tmp_path / "run"))
    assert Manifest.read(folder).datasets[TEXT].validation == f"pretrain/{LAST}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(server.asked)
    assert start(tmp_path / "run2", "--stages=tokenizer", *arguments[1:])[0] == 0
    assert len(server.asked) == before


def test_with_the_users_text_nothing_is_downloaded_unless_requested(tmp_path):
    def downloads(*overrides):
        return configure("d12", list(overrides), str(tmp_path), ()).data.download

    names = load_experiment("d12").data.download
    assert names[0] == f"{TEXT}:60" and downloads() == names
    assert configure("d12", [], None, ()).data.folder == "data"
    (tmp_path / "mine.jsonl").write_text("")
    assert downloads() == () and downloads("--data.download=gsm8k") == ("gsm8k",)
    (tmp_path / "mine.jsonl").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "datasets": {}, "files": {
        "pretrain/shard_00000.parquet": {"dataset": TEXT, "size": 1, "sha256": "", "made_of": []}}}))  # fmt: skip
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "shard_00000.parquet").write_text("x")
    assert downloads() == names


def test_bad_downloads_stop_a_run_before_any_work(tmp_path):
    for name, expected in [("fineweb", "data.download: unknown data set 'fineweb', did you mean 'fineweb-edu'"),
                           ("gsm8k:2", "data.download: gsm8k:2: gsm8k is not pretraining text")]:  # fmt: skip
        assert expected in refusal(start(tmp_path / "run", f"--data.download={name}"))
    assert not (tmp_path / "run").exists()
