"""The benchmark that compiles for TPUs says what it needs, and compiles where it has that."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tpu

ROOT = Path(__file__).parents[2]
COMPILER = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(COMPILER, reason="the TPU's compiler is installed")
def test_without_the_compiler_it_says_what_to_install(capsys):
    assert tpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: the TPU's compiler ")


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs libtpu, the TPU's compiler")
def test_the_step_compiles_with_splash_attention_for_eight_chips(tmp_path):
    small = "--depth 2 --chips v5e-8 --rows 1 --fsdp 8 --pretrain.batch-tokens=2048 --model.sequence-len=256".split()
    command = [sys.executable, "benchmarks/tpu.py", *small, "--json", tmp_path / "all.json"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "all.json").read_text())
    assert record["fits"] and record["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert record["splash_calls"] == 2 * 3, "of each layer: forward, dq, and dk with dv"
    assert record["memory_bytes"] == 15.75 * 2**30 and min(record["held_bytes"], record["used_bytes"]) > 1 << 20
