"""Text, tasks and runs in cloud storage: here, servers on this machine that speak its protocols."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from etils import epath
from etils.epath import backend
from gcp_storage_emulator import server as emulator
from moto.server import ThreadedMotoServer

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.main import main as jaxchat
from jaxchat.cli.options import configure
from jaxchat.data.manifest import Manifest, Origin, Record
from jaxchat.data.text.folder import find_text
from jaxchat.data.text.shards import iterate_texts
from jaxchat.errors import UserError
from jaxchat.rl.record import Record as Rollouts
from jaxchat.runs import metrics
from jaxchat.runs.metrics import Metrics, read_metrics
from jaxchat.stages.training import Batches
from jaxchat.storage import is_folder, of_the_cloud, size_of, to_path
from jaxchat.tasks import load_task
from tests.devices.test_processes import free_port, train
from tests.rl.test_record import TOKENIZER, add
from tests.tiny import ROOT, STEPS, record, refusal, start, values


def forget():
    """Drops the clients that were made for another server."""
    s3fs.S3FileSystem.clear_instance_cache()
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


@pytest.fixture(scope="module")
def server():
    patch = pytest.MonkeyPatch()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=free_port(), verbose=False)
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server._port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_MAX_ATTEMPTS": "1",
    }.items():  # fmt: skip
        patch.setenv(name, value)
    patch.setattr(s3fs.S3FileSystem, "retries", 1)
    forget()
    yield server
    server.stop()
    patch.undo()
    forget()


@pytest.fixture
def bucket(server, request):
    """A bucket for one test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.replace("_", "-"))[:60].strip("-")
    s3fs.S3FileSystem().mkdir(name)
    return epath.Path(f"s3://{name}")


def write(path, start, stop):
    texts = [f"document {i}: the cat sat on a mat" for i in range(start, stop)]
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=20)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def test_text_in_a_bucket(bucket, tmp_path):
    for number in range(3):
        for place in (bucket, tmp_path):
            write(place / "text" / "pretrain" / f"{number}.parquet", 100 * number, 100 * number + 100)
    (tmp_path / "lines").mkdir()
    for number in range(2):
        for place in (bucket, tmp_path):
            (place / "lines" / f"{number}.jsonl").write_text(f'{{"text": "line {number}"}}\n' * 3)
    for folder in ("text", "lines"):
        here, there = find_text(tmp_path / folder), find_text(bucket / folder)
        for side in ("train", "val"):
            assert list(iterate_texts(getattr(there, side))) == list(iterate_texts(getattr(here, side)))
    assert size_of(to_path(bucket / "lines" / "0.jsonl")) == (tmp_path / "lines" / "0.jsonl").stat().st_size
    names = [f"pretrain/{number}.parquet" for number in range(3)]
    manifest = Manifest(
        tmp_path / "text", {"text": Origin("", "", names[0])}, dict.fromkeys(names, Record("text", 1, "", ()))
    )
    manifest.write()
    (bucket / "text" / "manifest.json").write_text((tmp_path / "text" / "manifest.json").read_text())
    assert [path.name for path in find_text(bucket / "text").val.files] == ["0.parquet"]
    (bucket / "text" / "pretrain" / "1.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{bucket}/text/pretrain/1.parquet is not a parquet file"):
        find_text(bucket / "text")


def test_listings_show_what_others_have_written(bucket):
    (bucket / "folder" / "0").write_text("x")
    forget()
    folder, other = to_path(f"{bucket}/folder"), s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    assert [path.name for path in folder.iterdir()] == ["0"]
    other.pipe_file(f"{bucket}/folder/1", b"y")  # as TensorStore or another process would
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"] and is_folder(folder)


def test_the_configuration_of_fsspec_is_changed_only_for_what_is_opened(monkeypatch):
    program = """
import fsspec
from jaxchat.storage import to_path
print(fsspec.config.conf)
to_path("runs/x"), to_path("s3://bucket/run")
print(fsspec.config.conf)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["{}", "{'s3': {'use_listings_cache': False}}"]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"use_listings_cache": True, "anon": True})  # the user's own stays
    to_path("s3://bucket/run")
    assert fsspec.config.conf["s3"] == {"use_listings_cache": True, "anon": True}


def test_tasks_in_a_bucket(bucket):
    (bucket / "chat" / "train.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    assert len(load_task("chat", "train", str(bucket))) == 1
    assert len(load_task(f"{bucket}/chat/train.jsonl", "train", "nowhere")) == 1


def test_a_run_reads_its_text_from_a_bucket_and_lives_in_one(bucket):
    for number in range(2):
        write(bucket / "text" / f"{number}.parquet", 0, 500)
    arguments = (f"--data={bucket}/text", "--stages=tokenizer")
    code, out, err = start(bucket / "run", *arguments)
    assert code == 0, err
    assert (bucket / "run" / "tokenizer" / "tokenizer.json").exists()
    code, out, err = start(bucket / "run", *arguments)
    assert code == 0 and "tokenizer already finished" in out
    assert configure("d12", [], f"{bucket}/text", ()).data.download == ()
    assert read_metrics(bucket / "run") == []
    assert "--fresh renames runs on this machine only" in refusal(start(bucket / "run", "--fresh", *arguments))


@pytest.mark.slow
def test_a_training_in_a_bucket_is_the_same_and_resumes(bucket, whole):
    code, _, err = start(bucket / "run", "--stages=tokenizer,pretrain,sft,report")
    assert code == 0, err
    for stage in ("pretrain", "sft"):
        assert values(bucket / "run", stage) == values(whole, stage)
    report = json.loads((bucket / "run" / "report.json").read_text())
    assert list((bucket / "run" / "data" / "pretrain").glob("*.parquet"))  # generated there
    assert report["stages"]["pretrain"]["steps"] == STEPS and (bucket / "run" / "plots" / "loss.png").exists()
    # As after `kill -9` in the middle of the last save of the last stage.
    steps = bucket / "run" / "sft" / "checkpoints"
    (bucket / "run" / "sft" / "stage.json").unlink()
    (steps / str(STEPS) / "commit_success.txt").unlink()
    assert Checkpoints(steps).steps() == [STEPS - 2]
    code, out, err = start(bucket / "run", "--stages=sft")
    assert code == 0 and f"resuming at step {STEPS - 2} of {STEPS}" in err
    assert values(bucket / "run", "sft") == values(whole, "sft")
    assert Checkpoints(steps).steps() == [STEPS - 2, STEPS]
    # A change to the files is noticed.
    damaged = next(path for path in sorted((steps / str(STEPS) / "params" / "d").iterdir()))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (bucket / "run" / "sft" / "stage.json").unlink()
    message = refusal(start(bucket / "run", "--stages=sft"))
    assert f"checkpoint {steps / str(STEPS)} is damaged" in message and f"to resume from step {STEPS - 2}" in message


@pytest.mark.slow
def test_two_processes_train_in_a_bucket_and_one_resumes(bucket, whole):
    ends = train(bucket / "run", "--stages=tokenizer,pretrain,sft", fault="SIGTERM 1 3")
    assert [code for code, _ in ends] == [75, 75], ends
    assert Checkpoints(bucket / "run" / "pretrain" / "checkpoints").steps() == [4, 5]  # agreed on with step 4's metrics
    code, _, err = start(bucket / "run", "--stages=tokenizer,pretrain,sft")
    assert code == 0, err
    assert record(whole, "pretrain")["steps"] == STEPS
    for stage in ("pretrain", "sft"):
        got, want = values(bucket / "run", stage), values(whole, stage)
        assert [step for step, _ in got] == [step for step, _ in want]
        np.testing.assert_allclose([x for _, x in got], [x for _, x in want], rtol=1e-5)


def test_metrics_outlast_a_storage_that_does_not_answer(bucket, server, monkeypatch):
    monkeypatch.setattr(metrics, "REMOTE_FLUSH_SECONDS", 0.0)
    sink = Metrics(bucket, "pretrain", live=False)
    sink.log(0, loss=3.0)
    server.stop()
    forget()
    sink.log(1, loss=2.0)
    server.start()
    sink.log(2, loss=1.0)
    sink.log(3, loss=0.5)
    sink.close()
    assert [line["loss"] for line in read_metrics(bucket)] == [3.0, 2.0, 1.0, 0.5]
    sink = Metrics(bucket, "pretrain", live=False)
    server.stop()
    sink.log(4, loss=0.25)
    with pytest.raises(UserError, match=f"{bucket}/metrics.jsonl cannot be written .*; the same command resumes"):
        sink.close()
    server.start()


def test_rollouts_in_a_bucket(bucket, tmp_path, capsys):
    """They wait for the checkpoint, and a resume drops those after it; a page of them is made from there."""
    there, here = bucket / "run" / "rl" / "rollouts.jsonl", tmp_path / "rl" / "rollouts.jsonl"
    sampled, whole = Rollouts(there, TOKENIZER), Rollouts(here, TOKENIZER)
    for step in range(3):
        add(sampled, step)
    assert not there.exists()
    sampled.flush()
    resumed = Rollouts(there, TOKENIZER)
    for step in (1, 2, 3):
        add(resumed, step)
    resumed.close()
    for step in range(4):
        add(whole, step)
    assert there.read_bytes() == here.read_bytes()
    assert jaxchat(["rollouts", "--run", f"{bucket}/run", "--steps", "1", "3"]) == 0
    assert "| 3 | 2 | 4 | 0.444 |" in capsys.readouterr().out
    assert "Rollouts of" in (there.parent / "rollouts.html").read_text()


def test_a_bucket_that_is_gone_ends_the_run_with_a_line(bucket, monkeypatch):
    real, checkpoints = Batches.next_batch, bucket / "run" / "pretrain" / "checkpoints"

    def next_batch(self, step, params):
        if step == 3:
            while not (checkpoints / "2" / "commit_success.txt").exists():
                time.sleep(0.05)
            s3fs.S3FileSystem().rm(str(bucket), recursive=True)
            s3fs.S3FileSystem().rmdir(str(bucket))
        return real(self, step, params)

    monkeypatch.setattr(Batches, "next_batch", next_batch)
    code, _, err = start(bucket / "run", "--stages=tokenizer,pretrain")
    last = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert last.startswith(f"error: {bucket}/run/") and "The specified bucket does not exist" in last


def test_checkpoints_in_googles_storage(tmp_path, monkeypatch):
    port = free_port()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    # Do not look for credentials on this machine or in its network.
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    # Its own single thread would wait for a client that keeps its connection open, while other clients wait for it.
    monkeypatch.setattr(
        emulator, "server", SimpleNamespace(**vars(emulator.server) | {"HTTPServer": ThreadingHTTPServer})
    )
    # But what the requests change is not made for several threads.
    handle, alone = emulator.Router.handle, threading.Lock()

    def handle_alone(router, method):
        with alone:
            handle(router, method)

    monkeypatch.setattr(emulator.Router, "handle", handle_alone)
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    forget()
    try:
        checkpoints = Checkpoints("gs://bucket/run/checkpoints")
        states = {step: {"params": {"w": step + jnp.arange(1000.0)}, "step": jnp.asarray(step)} for step in (1, 2, 3)}
        for step, state in states.items():
            checkpoints.save(step, state, data={"at": step}, meta={})
        assert checkpoints.steps() == [2, 3]
        for step in (2, 3):
            got, data, _ = checkpoints.restore(states[step], step)
            np.testing.assert_array_equal(got["params"]["w"], states[step]["params"]["w"])
            assert data == {"at": step}
        checkpoints.close()
        there = {"bucket": True, "bucket/run": True, "bucket/none": False, "none": False}
        assert {name: is_folder(epath.Path(f"gs://{name}")) for name in there} == there
    finally:
        server.stop()
        forget()


@pytest.mark.parametrize(
    "path, expected",
    {
        "s4://bucket": "s4://bucket: unknown storage 's4', did you mean 's3'? Known: gs://, s3://, az://, hf://",
        "az://bucket": "az://bucket needs adlfs, which is not installed; pip install adlfs",
    }.items(),
)
def test_storage_that_is_not_there(path, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)  # as if it were not installed
    assert expected in refusal(start(tmp_path / "run", f"--data={path}"))
    assert "a run must be on this machine or in gs:// and s3://" in refusal(start(f"{path}/run"))


def test_errors_of_storage_and_others(bucket):
    with pytest.raises(FileNotFoundError) as missing:
        (bucket / "x").read_bytes()
    assert of_the_cloud(missing.value)
    with pytest.raises(FileNotFoundError) as missing:
        open("no such file")
    assert not of_the_cloud(missing.value) and not of_the_cloud(ValueError())


def test_storage_for_runs(server):
    assert "s3:// names no bucket; write s3://BUCKET/RUN" in refusal(start("s3://"))
    assert "a run must be on this machine or in gs:// and s3://" in refusal(start("hf://datasets/a/b"))
    assert refusal(start("s3://none/run")).startswith("the bucket s3://none does not exist; create it")


def test_storage_that_does_not_answer(bucket, server, capsys):
    server.stop()
    forget()
    try:
        for refused in (start(bucket / "run"), start("runs/none", f"--data={bucket}/text")):
            assert "cannot be reached (Could not connect to the endpoint" in refusal(refused)
            assert refusal(refused).endswith("; check the name and your credentials")
        with pytest.raises(UserError, match="cannot be reached"):
            is_folder(bucket / "x")
        with pytest.raises(Exception, match="Could not connect") as failed:
            (bucket / "x").read_bytes()
        assert of_the_cloud(failed.value)
        assert jaxchat(["chat", "--run", str(bucket / "run"), "-p", "hello"]) == 2
        err = capsys.readouterr().err
        assert "cannot be reached" in err and err.count("\n") == 1
    finally:
        server.start()
    assert not os.path.exists("runs/none")
