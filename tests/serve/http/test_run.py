"""The files of a run over HTTP: whole, while they grow, and when others take their place."""

import json
import re
import subprocess
import sys
import threading

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from jaxchat.config import Experiment, ModelConfig
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import Metrics, in_force, read_metrics
from jaxchat.serve.http import errors, run


def client_of(directory):
    handlers = {errors.ApiError: errors.on_api_error}
    return TestClient(Starlette(routes=run.routes(directory), exception_handlers=handlers))


def tail(client, reply=None):
    """The reply that goes on from another one."""
    parameters = {} if reply is None else {"from": reply["next"], "mark": reply["mark"]}
    return client.get("/api/run/metrics", params=parameters).json()


def steps(reply):
    return [record["step"] for record in reply["records"]]


@pytest.fixture
def client(tmp_path):
    return client_of(tmp_path)


def test_the_file_is_followed_while_it_grows(client, tmp_path):
    empty = tail(client)
    assert empty == {"records": [], "next": 0, "mark": "", "size": 0, "restart": False}
    with Metrics(tmp_path, "pretrain", total_steps=9, live=False) as metrics:
        metrics.log(0, loss=float("nan"), text="ü\u2028")
        first = tail(client, empty)
        metrics.log(1, loss=0.5)
        metrics.log(2, loss=0.25)
    assert first["records"][0]["loss"] is None and first["records"][0]["total_steps"] == 9
    second = tail(client, first)
    assert (steps(first), steps(second), second["restart"]) == ([0], [1, 2], False)
    assert second["next"] == second["size"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert tail(client, second) == {**second, "records": []}


def test_only_whole_lines_are_given_and_damaged_ones_are_left_out(client, tmp_path):
    file = tmp_path / "metrics.jsonl"
    line = b'{"stage": "sft", "step": 1, "loss": 2.5}\n'
    file.write_bytes(line + b'\xff\xfe{\n{"loss": 1}\n\0\0\n' + line + line[:20])
    reply = tail(client)
    assert steps(reply) == [1, 1] and reply["next"] == reply["size"] - 20
    with file.open("ab") as end:
        end.write(line[20:])
    assert steps(tail(client, reply)) == [1]
    file.write_bytes(rb'{"stage": "sft", "step": 7, "sample": "\ud800"}' + b"\n")
    assert steps(tail(client)) == [7]


@pytest.mark.parametrize("others", [1, 5, 50], ids=["shorter", "as-long", "longer"])
def test_another_file_in_its_place_is_read_from_its_start(client, tmp_path, others):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"stage": "sft", "step": step}) + "\n" for step in range(5)))
    before = tail(client)
    file.write_text("".join(json.dumps({"stage": "sft", "step": step}) + "\n" for step in range(5, 5 + others)))
    after = tail(client, before)
    assert after["restart"] and steps(after) == list(range(5, 5 + others))
    file.unlink()
    assert tail(client, after) == {"records": [], "next": 0, "mark": "", "size": 0, "restart": True}


def test_a_reply_is_bounded(client, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PIECE", 200)
    lines = [json.dumps({"stage": "sft", "step": step, "loss": step / 7}) for step in range(50)]
    lines[20] = json.dumps({"stage": "sft", "step": 20, "sample": "x" * 1000})  # passed over: longer than a reply
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found, reply = [], None
    for _ in range(100):
        reply = tail(client, reply)
        assert len(json.dumps(reply["records"])) < 250 and not reply["restart"]
        found += steps(reply)
        if reply["next"] == reply["size"]:
            break
    assert found == [step for step in range(50) if step != 20]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 120), st.data())
def test_pieces_of_any_size_give_what_the_file_has(tmp_path_factory, sizes, piece, data):
    path = tmp_path_factory.mktemp("pieces") / "metrics.jsonl"
    lines = [
        json.dumps({"stage": "sft", "step": i, "text": "ö" * size}).encode() + b"\n" for i, size in enumerate(sizes)
    ]
    whole, longest = b"".join(lines), max(map(len, lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "PIECE", max(piece, longest))
        found, offset, mark, written = [], 0, None, 0
        while offset < len(whole):
            written = max(written, data.draw(st.integers(written, len(whole))))
            path.write_bytes(whole[:written])
            got = run.read_tail(path, offset, mark)
            assert not got.restart and got.next >= offset
            found, offset, mark = found + got.records, got.next, got.mark
            if got.next == offset and written < len(whole):
                written += 1
    assert found == [json.loads(line) for line in lines]


@pytest.mark.parametrize("given", ["-1", "x", "1.5", "", "9" * 30, "../config.json"])
def test_an_offset_that_is_none(client, given):
    reply = client.get("/api/run/metrics", params={"from": given})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "from"


def test_what_cannot_be_read_is_said(client, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    reply = client.get("/api/run/metrics")
    assert reply.status_code == 503 and "cannot be read" in reply.json()["error"]["message"]


@pytest.fixture
def half(tmp_path):
    """A run whose pretraining is finished and whose midtraining is under way."""
    experiment = Experiment(name="tiny", model=ModelConfig(depth=1))
    directory = RunDirectory(tmp_path / "runs" / "half")
    directory.open(experiment)
    for stage in ("tokenizer", "pretrain", "midtrain"):
        directory.begin(stage, experiment)
    directory.write_record("tokenizer", {"stage": "tokenizer", "seconds": 1.5})
    directory.write_record("pretrain", {"stage": "pretrain", "steps": 4, "tokens": 99, "seconds": 3.5, "finished": 5.0})
    with Metrics(directory.path, "pretrain", live=False) as metrics:
        for step in range(4):
            metrics.sample(step, "Once", f" upon {step}")
    with Metrics(directory.path, "pretrain", live=False) as metrics:  # resumed at step 2
        metrics.sample(2, "Once", " again")
        metrics.log(2, loss=1.0)
    (directory.path / "evaluate" / "pretrain").mkdir(parents=True)
    answer = {"question": "1+1?", "answer": "2", "right": "2", "score": 1.0, "cut": False}
    lines = [json.dumps({**answer, "question": f"{i}+1?"}) for i in range(10)]
    (directory.path / "evaluate" / "pretrain" / "sums.jsonl").write_text("\n".join([*lines, "{", ""]))
    return directory.path


def test_stages_of_a_run_that_is_under_way(half):
    reply = client_of(half).get("/api/run/stages").json()
    assert (reply["name"], reply["folder"]) == ("tiny", "half")
    found = {entry["stage"]: entry for entry in reply["stages"]}
    assert list(found) == list(Experiment().stages)
    states = {stage: entry["state"] for stage, entry in found.items()}
    assert states == {**dict.fromkeys(found, "waiting"), "tokenizer": "finished", "pretrain": "finished",
                      "midtrain": "begun"}  # fmt: skip
    assert found["pretrain"]["total_steps"] == found["pretrain"]["steps"] == 4
    assert found["midtrain"]["started"] <= reply["now"]
    facts = {"stage": "pretrain", "steps": 4, "result_step": 2, "turned": {"bpb": 1.0, "bpb_at_end": 1.5}}
    RunDirectory(half).write_record("pretrain", facts)
    pretrain = client_of(half).get("/api/run/stages").json()["stages"][1]
    assert {name: pretrain[name] for name in facts} == facts


def test_a_damaged_record_is_a_remark(half):
    (half / "pretrain" / "stage.json").write_text("{")
    found = {entry["stage"]: entry for entry in client_of(half).get("/api/run/stages").json()["stages"]}
    assert "stage.json is damaged" in found["pretrain"]["problem"] and "problem" not in found["midtrain"]
    (half / "config.json").unlink()
    reply = client_of(half).get("/api/run/stages")
    assert reply.status_code == 200 and "config.json is missing" in reply.json()["problem"]


def test_samples_and_answers(half):
    reply = client_of(half).get("/api/run/samples").json()
    said = [(sample["step"], sample["completion"]) for sample in reply["samples"]]
    assert said == [(0, " upon 0"), (1, " upon 1"), (2, " again")]
    (answers,) = reply["answers"]["pretrain"].values()
    assert [answer["question"] for answer in answers] == ["0+1?", "2+1?", "5+1?", "7+1?"]


def test_samples_are_those_of_the_library(half):
    lines = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    assert [record["sample"] for record in in_force(lines) if "sample" in record] == [
        record["sample"] for record in read_metrics(half) if "sample" in record
    ]


def test_the_report(half):
    client = client_of(half)
    assert client.get("/api/run/report").json() == {"markdown": None, "report": None}
    (half / "report.md").write_text("# ü\n")
    (half / "report.json").write_text('{"name": "tiny"}')
    assert client.get("/api/run/report").json() == {"markdown": "# ü\n", "report": {"name": "tiny"}}
    (half / "report.json").write_text("{")
    assert client.get("/api/run/report").json()["report"] is None


def test_an_empty_folder_and_none_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        client = client_of(folder)
        assert client.get("/api/run/samples").json() == {"samples": [], "answers": {}}
        assert client.get("/api/run/report").json() == {"markdown": None, "report": None}
        assert "not a run" in client.get("/api/run/stages").json()["problem"]


def test_nothing_else_of_the_run_is_served(half):
    client = client_of(half)
    for path in ("/api/run/../config.json", "/api/run/report/../../config.json", "/api/run/config.json", "/api/run/"):
        assert client.get(path).status_code == 404
    (half / "secret").write_text("secret")
    (half / "evaluate" / "pretrain" / "note.txt").write_text("secret")
    names = ("metrics?from=0&path=secret", "samples?file=secret", "report?name=../secret", "stages")
    assert not any("secret" in client.get(f"/api/run/{name}").text for name in names)


def test_a_run_is_watched_without_jax(half):
    """JAX would take seconds, and a GPU's memory. `-X importtime` lists all modules that are imported."""
    command = [sys.executable, "-X", "importtime", "-m", "jaxchat", "serve", "--run", half, "--watch", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout and server.stderr
        imported = threading.Thread(target=lambda: lines.extend(server.stderr))
        lines: list[str] = []
        imported.start()
        try:
            address = re.search(r"http://\S+", server.stdout.readline())
            assert address
            assert httpx.get(f"{address[0]}api/run/stages").json()["name"] == "tiny"
            assert httpx.get(f"{address[0]}api/info").json()["model"] is None
            assert httpx.get(address[0]).text.startswith("<!doctype html>")
        finally:
            server.terminate()
        imported.join()
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "jaxchat.serve.http.run" in modules
    assert modules.isdisjoint({"jax", "jaxlib", "matplotlib", "orbax"})
