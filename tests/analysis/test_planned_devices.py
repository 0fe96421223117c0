"""TPUs that are planned for: their names and slices, and what is said where their compiler is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxchat.analysis.planned_devices import check_slice, chips, generation, quick_compilation, tpus_here, why_not
from jaxchat.devices.machine import device_peak_flops
from jaxchat.errors import UserError

ROOT = Path(__file__).parents[2]
COMPILER = importlib.util.find_spec("libtpu") is not None
NAMES = ["TPU v4", "TPU v5", "TPU v5p", "TPU v5e", "TPU v5 lite", "TPU v6e", "TPU v6 lite"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tpu_has_both_of_its_names_memory_and_a_peak(name):
    chip = generation(name)
    assert chip and name.removeprefix("TPU ") in chip.names
    gibibytes = 95 if name in ("TPU v5", "TPU v5p") else 16 if name in ("TPU v5e", "TPU v5 lite") else 32
    assert 0.95 * gibibytes < chip.memory < gibibytes + 1
    assert device_peak_flops(name)


@pytest.mark.parametrize("name, near", [("tpu v5e", "TPU v5e"), ("TPU v6 lit", "TPU v6 lite"), ("TPU v6p", "TPU v6e")])
def test_an_unknown_tpu_is_told_the_nearest_name(name, near):
    with pytest.raises(UserError, match=f"{name!r} is not a TPU that is known here, did you mean {near!r}"):
        generation(name)


def test_other_devices_are_no_tpus():
    assert generation("NVIDIA H100") is generation("cpu") is None and not tpus_here()


@pytest.mark.parametrize("name", NAMES)
def test_slices_have_as_many_chips_as_their_topology(name):
    chip = generation(name)
    assert chip
    for count, topology in chip.slices.items():
        sides = [int(side) for side in topology.split("x")]
        assert len(sides) == (3 if chip.options or "p" in chip.names[0] else 2)
        check_slice(chip, count)
        assert count == eval("*".join(map(str, sides)))


@pytest.mark.parametrize("count, nearest", [(2, "1 or 4"), (6, "4 or 8"), (1000, "256")])
def test_a_slice_that_there_is_not_is_told_the_nearest(count, nearest):
    chip = generation("TPU v5e")
    assert chip
    with pytest.raises(UserError, match=f"TPU v5e come in slices of other sizes than {count}; nearest: {nearest}$"):
        check_slice(chip, count)


@pytest.mark.skipif(COMPILER, reason="the TPU's compiler is installed")
def test_without_the_compiler_it_says_what_to_install():
    chip = generation("TPU v5e")
    assert chip and why_not() and "the TPU's compiler" in str(why_not())
    with pytest.raises(UserError, match="the TPU's compiler"):
        chips(chip, 8)


def level():
    return jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]


def test_quick_compilation_ends():
    before = level()
    with quick_compilation():
        assert level() == "O1"
        assert jax.jit(lambda x: x + 1)(1) == 2
    assert level() == before


TINY = "--experiment=d12 --dry-run --model.depth=2 --model.sequence-len=256 --pretrain.batch-tokens=16384".split()


def planned(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code and both outputs of a dry run in a process of its own, whose JAX has not looked for devices."""
    command = [sys.executable, str(ROOT / "launch.py"), *TINY, f"--run-dir={folder / 'run'}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(COMPILER, reason="the TPU's compiler is installed")
def test_a_dry_run_without_the_compiler_goes_on_with_a_cpu(tmp_path):
    code, out, error = planned(tmp_path, "--cost.device=TPU v5e", "--model.depth=1", "--tokenizer.vocab-size=512")
    assert code == 0, error
    assert "note          the TPU's compiler" in out and "; a CPU's stands for it" in out
    assert "expected on   1 x TPU v5e" in out and "compiled for cpu" in out


def test_a_dry_run_refuses_a_slice_that_there_is_not(tmp_path):
    code, _, error = planned(tmp_path, "--cost.device=TPU v5e", "--cost.devices=6")
    assert code == 2
    assert error.splitlines()[-1] == "error: TPU v5e come in slices of other sizes than 6; nearest: 4 or 8"


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs libtpu, the TPU's compiler")
def test_a_dry_run_compiles_for_eight_chips(tmp_path):
    code, out, error = planned(tmp_path, "--cost.device=TPU v5e", "--cost.devices=8")
    assert code == 0, error
    assert "compiled for TPU v5 lite" in out and "note " not in out
    assert re.search(r"8 rows, remat none: a step takes 0\.\d\d of 14\.96 GiB per device", out), out
