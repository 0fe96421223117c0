"""`jaxchat profile` on a small model."""

import re

import jax
import pytest

from jaxchat.analysis.trace import MATMULS
from jaxchat.cli.main import main

SMALL = "--experiment=d12 --model.depth=1 --model.sequence-len 32 --tokenizer.vocab-size=300".split()
BATCH = "--pretrain.batch-tokens=256 --pretrain.device-rows=1".split()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command sets these for its own process."""
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")


def test_profile(tmp_path, capsys):
    assert main(["profile", *SMALL, *BATCH, "--steps", "2", f"--trace={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert f"d12: 2 steps of 256 tokens on {jax.device_count()} x cpu" in out
    shares = {part: float(share) for part, share in re.findall(r"^\| ([^|`]+) \| [-\d.]+ \| ([-\d.]+)% \|", out, re.M)}
    assert shares.pop("**a step**") == 100 and sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares[MATMULS] > 0 and shares["idle"] >= 0
    assert out.count("\n| `") == 10, "the longest kernels"
    assert next(tmp_path.glob("plugins/profile/*/*.trace.json.gz")).parent.name in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no experiment given; write --experiment="),
        (["--experiment=d21"], "unknown experiment 'd21'"),
        (["--experiment=d12", "--stesp=3"], "did you mean '--steps'"),
        (["--experiment=d12", "--steps=0"], "--steps is 0"),
        ([*SMALL, "--mesh.fsdp=3"], "does not divide"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
