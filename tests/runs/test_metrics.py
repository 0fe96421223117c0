"""Metrics: the file and what a resume makes of it, the live line, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import DataConfig, Experiment, LoggingConfig
from jaxchat.errors import UserError
from jaxchat.runs import progress
from jaxchat.runs.metrics import Metrics, read_metrics
from jaxchat.runs.progress import format_count, format_duration, format_live
from jaxchat.stages.settings import check_settings


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]]


def losses(run_dir, stage="pretrain"):
    return [(r["step"], r["loss"]) for r in read_metrics(run_dir) if r["stage"] == stage and "loss" in r]


def log_losses(run_dir, steps, loss, stage="pretrain"):
    with Metrics(run_dir, stage, live=False) as metrics:
        for step in steps:
            metrics.log(step, loss=loss)


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    metrics = Metrics(tmp_path / "new" / "run", "sft", live=False)
    metrics.log(3, loss=1.5, **{"score/sums": 0.25})
    (record,) = lines(tmp_path / "new" / "run")
    assert record.pop("time") > 1.7e9
    assert record == {"stage": "sft", "step": 3, "start": True, "loss": 1.5, "score/sums": 0.25}
    metrics.log(4, loss=1.0)
    assert "start" not in lines(tmp_path / "new" / "run")[1]
    metrics.close()
    metrics.close()


def test_the_first_line_says_how_many_steps_there_are_to_take(tmp_path):
    for total in (500, 900):  # the second process goes on with more of them
        with Metrics(tmp_path, "sft", total_steps=total, live=False) as metrics:
            metrics.log(3, loss=1.5)
            metrics.log(4, loss=1.5)
    assert [line.get("total_steps") for line in lines(tmp_path)] == [500, None, 900, None]
    assert [set(record) for record in read_metrics(tmp_path)] == [{"stage", "step", "time", "loss"}] * 2


def test_scalars_of_every_kind_become_json(tmp_path):
    with Metrics(tmp_path, "sft", live=False) as metrics:
        metrics.log(np.int64(1), a=jnp.float32(0.5), b=np.float32(0.25), c=np.int32(7), d=True, e="ü\u2028x", f=None)
        with pytest.raises(ValueError):
            metrics.log(2, vector=np.zeros(3))
    (record,) = read_metrics(tmp_path)
    del record["time"]
    assert record == {"stage": "sft", "step": 1, "a": 0.5, "b": 0.25, "c": 7, "d": True, "e": "ü\u2028x", "f": None}


def test_values_that_are_not_finite_are_null_and_the_file_stays_json(tmp_path):
    with Metrics(tmp_path, "sft", live=False) as metrics:
        metrics.log(1, loss=float("nan"), a=float("inf"), b=jnp.float32(-jnp.inf), c=np.float64("nan"))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [record[name] for name in ("loss", "a", "b", "c")] == [None] * 4


def test_a_resume_supersedes_what_came_after_its_step(tmp_path):
    log_losses(tmp_path, range(1, 11), loss=1.0)
    log_losses(tmp_path, range(6, 9), loss=2.0)
    # The second process stopped at 8: what the first one logged for 9 and 10 belongs to a history that did not happen.
    assert losses(tmp_path) == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 9)]
    log_losses(tmp_path, range(9, 11), loss=3.0)
    assert losses(tmp_path)[-3:] == [(8, 2.0), (9, 3.0), (10, 3.0)]


def test_an_evaluation_made_before_the_stop_holds_when_the_training_goes_on_from_its_step(tmp_path):
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        metrics.log(99, loss=1.0)
        metrics.log(100, bpb=1.25)
        metrics.log(100, loss=1.0, grad_norm=1.0)
        metrics.log(101, bpb=9.0)
    log_losses(tmp_path, [100], loss=2.0)
    assert losses(tmp_path) == [(99, 1.0), (100, 2.0)]
    assert [r["bpb"] for r in read_metrics(tmp_path) if "bpb" in r] == [1.25]


def test_a_resume_leaves_other_stages_alone(tmp_path):
    log_losses(tmp_path, range(1, 6), loss=1.0)
    log_losses(tmp_path, range(1, 6), loss=2.0, stage="sft")
    assert len(losses(tmp_path)) == len(losses(tmp_path, "sft")) == 5


def test_an_evaluation_logged_late_is_no_resume(tmp_path):
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        metrics.log(100, loss=1.0)
        metrics.log(101, loss=1.0)
        metrics.log(100, bpb=1.25)
        metrics.log(102, loss=1.0)
    assert [s for s, _ in losses(tmp_path)] == [100, 101, 102]
    assert [r["bpb"] for r in read_metrics(tmp_path) if "bpb" in r] == [1.25]


def test_of_lines_with_the_same_names_the_last_counts(tmp_path):
    with Metrics(tmp_path, "pretrain", live=False) as metrics:
        metrics.log(5, loss=1.0)
        metrics.log(5, bpb=0.9)
        metrics.log(5, loss=2.0)
        metrics.sample(5, "One", "a")
        metrics.sample(5, "Two", "b")
        metrics.sample(5, "One", "c")
    records = read_metrics(tmp_path)
    assert [r["loss"] for r in records if "loss" in r] == [2.0]
    assert [(r["prompt"], r["sample"]) for r in records if "sample" in r] == [("Two", "b"), ("One", "c")]
    assert len(records) == 4


def test_evaluating_one_stage_again_keeps_the_others(tmp_path):
    for of, score in (("midtrain", 0.5), ("sft", 0.6), ("sft", 0.7)):
        with Metrics(tmp_path, "evaluate", live=False) as metrics:
            metrics.log(0, of=of, **{"score/sums": score})
    assert [(r["of"], r["score/sums"]) for r in read_metrics(tmp_path)] == [("midtrain", 0.5), ("sft", 0.7)]


def test_a_line_cut_short_by_a_crash_costs_only_itself(tmp_path):
    log_losses(tmp_path, [1, 2], loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "pretrain", "st')
    log_losses(tmp_path, [3], loss=2.0)
    assert losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_no_file_means_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_plain_live_lines_come_at_the_start_at_the_end_and_seldom_between(tmp_path, capsys):
    with Metrics(tmp_path, "pretrain", total_steps=5000) as metrics:
        metrics.log(1, bpb=1.2345)
        metrics.note("resuming at [step 1]")
        for step in range(1, 301):
            metrics.live(step, loss=2.345, tokens_per_second=412_345.0, mfu=0.479)
        metrics.sample(300, "The sky is", " blue.\x1b[31m")
    note, first, sample, last = capsys.readouterr().err.splitlines()
    assert first == "pretrain     1/5000  loss 2.345  bpb 1.234  412k tok/s  MFU 48%"
    assert note == "pretrain  resuming at [step 1]"
    assert sample == "pretrain  sample at step 300: The sky is blue.[31m"
    assert last.startswith("pretrain   300/5000  loss 2.345  bpb 1.234  412k tok/s  MFU 48%  ") and "left" in last
    with Metrics(tmp_path, "sft", live=False) as metrics:
        metrics.live(1, loss=1.0)
        metrics.sample(1, "a", "b")
    assert capsys.readouterr() == ("", "")


def test_plain_live_lines_keep_coming(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with Metrics(tmp_path, "rl", total_steps=3) as metrics:
        for step in range(1, 4):
            metrics.live(step, reward=0.5)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:3] for line in printed] == [["rl", f"{s}/3", "reward 0.50"] for s in (1, 2, 3)]
    assert printed[-1].endswith("0s left")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal_one_line_is_redrawn_and_samples_stand_above_it(tmp_path):
    script = """
        import sys
        from jaxchat.runs import metrics, progress
        progress.REDRAW_SECONDS = 0.0
        with metrics.Metrics(sys.argv[1], "sft", total_steps=9) as m:
            for step in range(1, 10):
                m.live(step, loss=[1.0, 0.5][step > 4])
                if step == 4:
                    m.sample(4, "What is [bold]2 + 2[/bold]?", " 4.")
    """
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert process.wait() == 0 and process.stdout.read() == b""
    process.stdout.close()
    screen = seen.decode()
    sample = screen.index("What is [bold]2 + 2[/bold]?")
    assert screen.index("sft  1/9  loss 1.000") < sample < screen.index("sft  5/9  loss 0.500")
    assert "\r" in screen and screen.rstrip("\r\n").count("\n") <= 6
    assert "sft  9/9  loss 0.500" in screen


def test_format_live_leaves_out_what_is_not_known():
    assert format_live("rl", 7, None, {}, None) == "rl  7"
    values = {"loss": 2.3451, "bpb": 1.2, "tokens_per_second": 412e3, "mfu": 0.48}
    expected = "pretrain  1234/5000  loss 2.345  bpb 1.200  412k tok/s  MFU 48%  12m 00s left"
    assert format_live("pretrain", 1234, 5000, values, 720.0) == expected
    assert format_live("sft", 1, 10, {"loss": float("nan")}, None) == "sft   1/10  loss nan"


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (950, "950"), (999.7, "1.00k"), (1234, "1.23k"), (9999, "10.0k"), (99960, "100k"), (412_345, "412k"),
     (999_600, "1.00M"), (1.31e6, "1.31M"), (10.54e9, "10.5B"), (4e19, "40000000T")],
)  # fmt: skip
def test_format_count(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (581, "9m 41s"), (3599.4, "59m 59s"), (3599.6, "1h 00m"),
     (3900, "1h 05m"), (86399, "1d 00h"),
     (2 * 86400 + 3 * 3600, "2d 03h")],
)  # fmt: skip
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_tensorboard_event_files_read_back(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with Metrics(tmp_path, "sft", tensorboard=True, live=False) as metrics:
        metrics.log(7, loss=1.5, note="hello", missing=None)
    (path,) = (tmp_path / "tensorboard" / "sft").glob("events.*")
    # The record format: length (8 bytes), its checksum (4), the event, its checksum (4).
    data, values = path.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        body, checksum = data[12 : 12 + size], int.from_bytes(data[12 + size : 16 + size], "little")
        assert checksum == masked_crc32c(body)
        event = Event.FromString(body)
        values.update({(event.step, v.tag): v for v in event.summary.value})
        data = data[16 + size :]
    assert values[7, "loss"].simple_value == 1.5
    assert any(b"hello" in v.tensor.string_val for v in values.values())


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.json").write_text('{"name": "tiny"}')
    with Metrics(tmp_path, "sft", wandb=True, live=False) as metrics:
        metrics.log(7, loss=1.5)
    run_id = (tmp_path / "wandb" / "sft.id").read_text()
    (recorded,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert b"loss" in recorded.read_bytes()
    with Metrics(tmp_path, "sft", wandb=True, live=False) as metrics:
        metrics.log(8, loss=1.0)
    assert (tmp_path / "wandb" / "sft.id").read_text() == run_id


@pytest.mark.parametrize("option, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_option_says_what_to_install(tmp_path, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'jaxchat\[{option}\]'"):
        Metrics(tmp_path, "sft", **{option: True})
    experiment = Experiment(data=DataConfig(generate=True), logging=LoggingConfig(**{option: True}))
    with pytest.raises(UserError, match="logging needs"):  # before the first stage
        check_settings(experiment)
