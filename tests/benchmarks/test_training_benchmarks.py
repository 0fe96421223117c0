"""The benchmarks of training run, and measure what they say."""

import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchat.model.config import GPTConfig
from jaxchat.train.budget import count_parameters, flops_per_token

ROOT = Path(__file__).parents[2]
SMALL = "--rows 2 --sequence-len 32 --steps 2 --windows 2 --precision fp32".split()

PEER = f"""#!{sys.executable}
import importlib.util, sys
spec = importlib.util.spec_from_file_location("nanochat_steps", {str(ROOT / "benchmarks" / "nanochat_steps.py")!r})
nanochat_steps = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nanochat_steps)
del sys.argv[0]
names = "depth rows sequence_len vocab_size accumulation steps window_pattern fp8".split()
nanochat_steps.measure = lambda options: dict(
    tokens_per_second=100.0, flops_per_token=1, peak_memory_bytes=3 << 30, first_loss=1.0, last_loss=1.0, torch="2",
    device="none", attention="none", options=[getattr(options, name) for name in names],
)
nanochat_steps.main()
"""


def run(script, *arguments, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **environment}
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def measured(file, *arguments, **environment):
    done = run("train.py", *SMALL, *arguments, "--json", file, **environment)
    assert done.returncode == 0, done.stderr
    return list(map(json.loads, file.read_text().splitlines())), done.stdout


def check_figures(record, tokens):
    assert record["tokens_per_step"] == tokens
    assert record["tokens_per_second"] == pytest.approx(1000 * tokens / record["step_ms"])
    assert len(record["window_step_ms"]) == 2 and record["compilations_while_measuring"] == 0
    assert record["first_loss"] == pytest.approx(math.log(270), rel=1e-4), "the head starts at zero"
    assert math.isfinite(record["last_loss"]) and record["last_loss"] != record["first_loss"]
    parts = [record[f"{part}_seconds"] for part in ("start", "data", "init", "trace", "compile", "first_step")]
    assert record["first_step_seconds_from_start"] == pytest.approx(sum(parts)) and min(parts) > 0


@pytest.mark.slow
def test_train_on_one_device_and_two(tmp_path):
    options = ["--depth", 1, "--devices", 1, 2, "--vocab-size", 270, "--accumulation", 3]
    records, table = measured(tmp_path / "all.json", *options)
    for devices, record in zip((1, 2), records, strict=True):
        assert record["devices"] == devices == record["machine"]["device_count"]
        assert record["mesh"] == {"data": devices, "fsdp": 1, "tensor": 1}
        check_figures(record, 3 * 2 * devices * 32)
        assert f"| 2 x 3 | {record['tokens_per_second']:,.0f} |" in table
    assert records[0]["state_bytes_per_device"] == records[1]["state_bytes_per_device"], "held by each"
    times = records[1]["tokens_per_second"] / records[0]["tokens_per_second"]
    assert f"d1: 1 device, and 2 {times:.3f} times that speed" in table


@pytest.mark.slow
def test_train_on_text_sharded_and_from_the_cache(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text("Some words, some more words, and 12 others. " * 300)
    options = ["--depth", 1, "--mesh.fsdp", 2, "--vocab-size", 270, "--data", tmp_path / "text", "--cold"]
    environment = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    (record,), table = measured(tmp_path / "all.json", *options, **environment)
    assert record["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    check_figures(record, 2 * 2 * 32)
    # fp32: the parameters, Adam's two moments for embedding and head, Muon's one for the matrices; half on each device.
    model = GPTConfig(depth=1, vocab_size=270)
    count = count_parameters(model)
    held = 4 * (count.total + 2 * (count.embedding + count.head) + count.matrices)
    assert 0 <= record["state_bytes_per_device"] - held / 2 < 100, "and a few counters"
    speeds = [record[f"{ready}tokens_per_second_mean"] for ready in ("", "ready_")]
    assert record["loader_cost_percent"] == pytest.approx(100 * (speeds[1] / speeds[0] - 1))
    assert len(record["ready_window_step_ms"]) == 2 and "with the batches ready" in table
    cold = record["cold"]
    assert cold["of_them_from_the_cache"] == 0 < record["of_them_from_the_cache"] <= cold["compilations_until_then"]
    assert "tokens_per_second" not in cold, "the cold process ends with its first step"
    assert f"first step {cold['first_step_seconds_from_start']:.1f} s after the start" in table


def test_fewer_rows_until_they_fit(monkeypatch):
    steps, train = importlib.import_module("jaxchat_steps"), importlib.import_module("train")
    parser = train._parser()
    options = parser.parse_args(["--depth", "1", *SMALL, "--rows", "4", "--vocab-size", "270", "--fit"])
    (work,) = train._works(options, ["--mesh.fsdp=1"], [])
    limits = iter([1, None])
    monkeypatch.setattr(steps, "device_memory_bytes", lambda: next(limits))
    figures = steps.measure(dataclasses.replace(work, only_first=True), time.time())
    assert (figures["rows"], figures["accumulation"]) == (2, 2)
    assert figures["tokens_per_step"] == 4 * 32 * figures["devices"]
    with pytest.raises(MemoryError, match="a step needs 3.0 GiB, but 2.0 GiB are available"):
        steps.check_fits(3 << 30, 2 << 30)


def test_what_does_not_fit_is_a_line(tmp_path):
    done = run("train.py", "--depth", 1, "--rows", 65_536, "--precision", "fp32", "--json", tmp_path / "all.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "all.json").read_text())["error"].startswith("out of memory")
    assert "| d1 |  | out of memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "17"], "model.depth is 17"),
        (["--depht", "1"], "did you mean '--depth'"),
        (["--precision", "int3"], "--precision 'int3' is unknown"),
        (["--data", "nowhere"], "data folder 'nowhere' does not exist"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--depth", "1", "2", "--rows", "8", "4", "2"], "--rows has 3 numbers for 2 depths"),
        (["--devices", "1", "0"], "--devices must be at least 1"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert importlib.import_module("train").main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_against_nanochat(tmp_path, capsys):
    """A stand-in for nanochat with the options of nanochat_steps.py and a possible report."""
    against = importlib.import_module("against_nanochat")
    assert against.main(["--checkout", str(tmp_path)]) == 2
    assert "is not a nanochat checkout" in capsys.readouterr().err
    for name in ("nanochat/gpt.py", "scripts/base_train.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    peer = tmp_path / "python"
    peer.write_text(PEER)
    peer.chmod(0o755)
    options = "--depth 1 17 --rows 2 --sequence-len 32 --vocab-size 270 --steps 2 --rounds 1".split()
    file = tmp_path / "all.json"
    assert against.main(["--checkout", str(tmp_path), "--python", str(peer), *options, "--json", str(file)]) == 2
    small, refused = map(json.loads, file.read_text().splitlines())
    assert "model.depth is 17" in refused["error"] and refused["depth"] == 17
    (figures,) = small["rounds"]
    assert figures["nanochat"]["options"] == [1, 2, 32, 270, 1, 2, "L", False]
    assert figures["jaxchat"]["devices"] == 1 and figures["jaxchat"]["tokens_per_step"] == 2 * 32
    assert small["ratio"] == pytest.approx(figures["jaxchat"]["tokens_per_second"] / 100)
    table = capsys.readouterr().out
    assert f"| d1 nanochat | 100 | {1000 * 64 / 100:.2f} | ? | 3.0 |" in table and "| d17 | jaxchat failed" in table


def test_ratios_of_rounds():
    against = importlib.import_module("against_nanochat")
    rounds = [
        {"jaxchat": {"tokens_per_second": ours}, "nanochat": {"tokens_per_second": theirs}}
        for ours, theirs in ((120.0, 100.0), (90.0, 50.0), (130.0, 130.0))
    ]
    summary = against._summary(rounds)
    assert summary["tokens_per_second"] == {"jaxchat": 120.0, "nanochat": 100.0}
    assert summary["ratio"] == 1.2 and summary["round_ratios"] == [1.2, 1.8, 1.0]


def test_what_nanochat_says_when_it_fails(tmp_path):
    against = importlib.import_module("against_nanochat")
    command = [sys.executable, "benchmarks/nanochat_steps.py", str(tmp_path)]
    with pytest.raises(against.UserError, match="nanochat failed: .*--depth"):
        against.run("nanochat", command, dict(os.environ), tmp_path / "result.json")
    with pytest.raises(against.UserError, match="give --python a Python"):
        against.run("nanochat", ["/no/such/python"], dict(os.environ), tmp_path / "result.json")


def growth_record(depth, kind="Some GPU", **more):
    model = GPTConfig(depth=depth)
    rate, flops = 1e14 * depth, flops_per_token(model)
    return {
        **{"depth": depth, "devices": 1, "rows": 8, "accumulation": 4, "precision": "bf16", "sequence_len": 2048},
        **{"parameters": count_parameters(model).total, "flops_per_token": flops, "tokens_per_second": rate / flops},
        **{"flops_per_second_per_device": rate, "mfu": rate / 1e15, "machine": {"device_kind": kind, "jax": "1"}},
        **more,
    }


def test_growth(tmp_path, capsys):
    growth = importlib.import_module("growth")
    file, picture = tmp_path / "all.json", tmp_path / "growth.png"

    def drawn(*records):
        file.write_text("\n".join(map(json.dumps, records)))
        return growth.main([str(file), str(picture)])

    # Without what failed, the later of two alike, the smallest model first.
    failed = {"depth": 6, "error": "out of memory"}
    records = [growth_record(4, mfu=0.9), growth_record(4), growth_record(2, mfu=None), failed]
    assert drawn(*records) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x Some GPU, bf16, rows of 2,048 tokens, jax 1"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| d2", "| d4"]
    assert lines[4].endswith("| 200 | ? |") and lines[5].endswith("| 400 | 40.0% |")
    for records, message in (
        ([growth_record(4)], "needs two depths"),
        ([growth_record(4), growth_record(2, "Another GPU")], "cannot be compared"),
        ([{"depth": 1}, 7], "is not what train.py --json writes"),
    ):
        assert drawn(*records) == 2 and message in capsys.readouterr().err
