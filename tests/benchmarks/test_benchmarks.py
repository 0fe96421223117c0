"""The benchmarks run, and measure what they say."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timing

ROOT = Path(__file__).parents[2]


def panic():
    raise type("PanicException", (BaseException,), {})("index out of range")


def take(megabytes):
    return len(b"a" * (megabytes << 20))


def test_a_process_of_its_own():
    ballast = b"a" * (300 << 20)
    (_, small), (size, large) = timing.alone(take, 1), timing.alone(take, 200)
    assert size == 200 << 20 and 190 < (large - small) / (1 << 20) < 210
    assert small < len(ballast), "the peak is not that of the process that asks"
    with pytest.raises(timing.Failed, match="panics"):
        timing.alone(panic)
    with pytest.raises(timing.Failed, match="not done after 1 s"):
        timing.alone(time.sleep, 100, timeout=1)
    with pytest.raises(timing.Failed, match="ValueError"):
        timing.alone(int, "x")


def test_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("Some words, some more words, and 12 others. " * 3000)
    options = "--train-mb 0.1 --encode-mb 0.1 --unbroken-mb 0.01 --vocab-size 280 --runs 2 --threads 1 --json".split()
    done = subprocess.run(
        [sys.executable, "benchmarks/tokenizer.py", tmp_path, *options, tmp_path / "all.json"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "all.json").read_text())
    sections = ["training", "memory", "linearity", "encoding", "patterns", "unbroken", "decoding"]
    assert list(data) == ["machine", *sections]
    assert {"jaxchat", "jaxchat, from the files"} <= set(data["training"]["same_vocabulary"])
    assert data["encoding"]["1"]["tiktoken"]["megabytes"] == pytest.approx(0.132)
    assert isinstance(data["unbroken"]["random letters"]["tiktoken"], float)
    assert "| tiktoken |" in done.stdout and "run 2 of 2" in done.stderr


def test_data(tmp_path):
    texts = [f"{i} some words, some more words, and 12 others. " * (1 + i % 40) for i in range(300)]
    for number in range(3):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{number}.parquet", row_group_size=64)
    options = "--vocab-size 300 --rows 2 --sequence-len 128 --batches 20 --rounds 1".split()
    command = [sys.executable, "benchmarks/data.py", tmp_path, *options]
    run = partial(subprocess.run, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    done = run([*command, "--json", tmp_path / "all.json"])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text())["1"]
    assert list(found) == ["jaxchat, best-fit", "jaxchat, concat"]
    assert all(figures["tokens"] == 20 * 2 * 128 and figures["cropped"] == 0 for figures in found.values())
    assert 0.95 < found["jaxchat, best-fit"]["utilisation"] <= found["jaxchat, concat"]["utilisation"] == 1
    assert "| jaxchat, best-fit | 1 |" in done.stdout
    done = run([*command, "--checkout", tmp_path])
    assert done.returncode == 2 and "is not a nanochat checkout" in done.stderr.splitlines()[-1]
