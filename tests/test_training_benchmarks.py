"""The benchmarks of training run, and measure what they say."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
SMALL = "--rows 2 --sequence-len 32 --steps 2 --windows 2 --precision fp32".split()


def run(script, *arguments, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", **environment}
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_train(tmp_path):
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text("Some words, some more words, and 12 others. " * 300)
    file = tmp_path / "all.json"
    options = ["--vocab-size", 270, "--accumulation", 3, "--mesh.fsdp", 2, "--json", file]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for data in ("random", tmp_path / "text"):
        done = run("train.py", "--depth", 1, *SMALL, *options, "--data", data, **cache)
        assert done.returncode == 0, done.stderr
        (record,) = map(json.loads, file.read_text().splitlines())
        assert record["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
        assert record["tokens_per_step"] == 3 * 2 * 2 * 32
        assert record["tokens_per_second"] == pytest.approx(1000 * record["tokens_per_step"] / record["step_ms"])
        assert len(record["window_step_ms"]) == 2 and record["compilations_while_measuring"] == 0
        assert record["first_loss"] == pytest.approx(math.log(270), rel=1e-4), "the head starts at zero"
        assert math.isfinite(record["last_loss"]) and record["last_loss"] != record["first_loss"]
        assert f"| d1 | {record['tokens_per_second']:,.0f} |" in done.stdout


def test_what_does_not_fit_is_a_line(tmp_path):
    done = run("train.py", "--depth", 1, *SMALL, "--vocab-size", 2_000_000_000, "--json", tmp_path / "all.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "all.json").read_text())["error"].startswith("out of memory")
    assert "| d1 | out of memory" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "17"], "model.depth 17"),
        (["--depht", "1"], "did you mean '--depth'"),
        (["--precision", "int3"], "--precision 'int3' is unknown"),
        (["--data", "nowhere"], "data folder 'nowhere' does not exist"),
        (["--rows", "0"], "--rows must be at least 1"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert importlib.import_module("train").main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_against_nanochat(tmp_path, capsys):
    against = importlib.import_module("against_nanochat")
    assert against.main(["--checkout", str(tmp_path)]) == 2
    assert "is not a nanochat checkout" in capsys.readouterr().err
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
        against._run("nanochat", command, dict(os.environ), tmp_path / "result.json")
    with pytest.raises(against.UserError, match="give --python a Python"):
        against._run("nanochat", ["/no/such/python"], dict(os.environ), tmp_path / "result.json")
