"""A run of all stages that takes seconds: the quickstart experiment with everything made small."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from jaxchat.cli.launch import main
from jaxchat.runs.metrics import read_metrics

ROOT = Path(__file__).parent.parent
STEPS = 6
# The same settings for all supervised stages, so that they share one compiled step.
TRAINING = ["device-rows=1", "batch-tokens=512", f"num-iterations={STEPS}", "lr-fraction=0.5", "save-every=2",
            "eval-every=3", "eval-tokens=256", "sample-every=0", "schedule.decay-ratio=0.5"]  # fmt: skip
ARGUMENTS = [
    "--experiment=quickstart", "--data.synthetic-documents=200", "--data.synthetic-conversations=200",
    "--tokenizer.vocab-size=300", "--model.depth=1", "--model.sequence-len=64",
    *(f"--{stage}.{setting}" for stage in ("pretrain", "midtrain", "sft") for setting in TRAINING),
    "--rl.tasks=sums", "--rl.questions-per-step=2", "--rl.samples-per-question=4", "--rl.num-iterations=3",
    "--rl.max-new-tokens=8", "--rl.eval-questions=8", "--rl.pass-k=2",
    "--rl.eval-every=2", "--rl.device-rows=2", "--rl.save-every=1",
    "--evaluate.tasks=sums,letters", "--evaluate.of=pretrain,sft,rl", "--evaluate.limit=8",
    "--evaluate.max-new-tokens=8", "--evaluate.batch-rows=8",
]  # fmt: skip


def start(directory, *arguments):
    """Runs `launch.py` in this process; returns exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*ARGUMENTS, f"--run-dir={directory}", *arguments])
    return code, out.getvalue(), err.getvalue()


def start_process(*arguments, program=("launch.py",), cwd=ROOT):
    """Runs a program in a separate process with four devices and this process's cache of compiled programs."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "COLUMNS": "60"}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return subprocess.run([sys.executable, *program, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def refusal(result):
    """The message of a refused start: one line, with exit code 2 and no traceback."""
    code, err = (result[0], result[2]) if isinstance(result, tuple) else (result.returncode, result.stderr)
    lines = err.splitlines()
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert "Traceback" not in err
    return lines[0].removeprefix("error: ")


def copy(finished, directory, *stages):
    """Copies a finished run as it was after `stages`."""
    shutil.copytree(finished / "data", directory / "data")
    shutil.copy(finished / "config.json", directory / "config.json")
    for stage in ("tokenizer", *stages):
        shutil.copytree(finished / stage, directory / stage)
    return directory


def values(directory, stage, name="loss"):
    """(step, value) pairs of a metric, in the order in which they were written."""
    lines = [line for line in read_metrics(directory) if line["stage"] == stage and name in line]
    return [(line["step"], line[name]) for line in lines]


def record(directory, stage):
    return json.loads((Path(directory) / stage / "stage.json").read_text())


def damage(path, group):
    """Overwrites the data of a row group of a parquet file."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    data = bytearray(path.read_bytes())
    size = column.total_compressed_size
    data[column.data_page_offset : column.data_page_offset + size] = b"\xff" * size
    path.write_bytes(data)
