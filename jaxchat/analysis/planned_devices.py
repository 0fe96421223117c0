"""TPUs that are planned for and not here: the TPU's own compiler compiles for them on any Linux machine with an x86-64.

It comes with `pip install '.[tpu]'` as libtpu. Nothing that is compiled for them can run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxchat.config import CostConfig
from jaxchat.errors import UserError, check, closest


class Generation(NamedTuple):
    """A kind of TPU.

    Attributes:
      names: what it is called, the first one by libtpu, after "TPU "; another one by JAX as `device_kind`.
      memory: GiB of a chip's memory that programs may use: what the compiler says that it has.
      slices: from the numbers of chips that there are together to libtpu's name of their topology.
      options: what a topology needs besides, so that a chip is one device, as it is on the TPU's own machine.
    """

    names: tuple[str, ...]
    memory: float
    slices: dict[int, str]
    options: dict[str, Any]


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    **{1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
    **{512: "8x8x8", 1024: "8x8x16"},
}
# Of 16, 32, 95 and 32 GiB.
GENERATIONS = (
    Generation(("v5e", "v5 lite"), 15.75, _FLAT, {}),
    Generation(("v6e", "v6 lite"), 31.25, _FLAT, {}),
    Generation(("v5p", "v5"), 95.74, _CUBES, {}),
    Generation(("v4",), 30.75, _CUBES, {"chip_config_name": "megacore"}),
)


@dataclass(frozen=True)
class Chips:
    """TPUs that programs can be compiled for: `devices` for a mesh, each with `memory` bytes for programs."""

    devices: Sequence[Any]
    memory: int


def generation(name: str) -> Generation | None:
    """The TPUs that are called `name`, such as `TPU v5e` or, as JAX says, `TPU v5 lite`; None for other devices.

    Raises:
      UserError: a TPU that is not known here.
    """
    if not name.lower().startswith("tpu"):
        return None
    known = {f"TPU {other}": chip for chip in GENERATIONS for other in chip.names}
    check(name in known, f"{name!r} is not a TPU that is known here{closest(name, known)}")
    return known[name]


def check_slice(chip: Generation, count: int) -> None:
    """Checks that there are slices of `count` chips.

    Raises:
      UserError: there are none; the message names the nearest that there are.
    """
    below = [size for size in chip.slices if size < count][-1:]
    above = [size for size in chip.slices if size > count][:1]
    nearest = " or ".join(map(str, below + above))
    check(count in chip.slices, f"TPU {chip.names[0]} come in slices of other sizes than {count}; nearest: {nearest}")


def tpus_here() -> bool:
    """Whether JAX would use TPUs of this machine, as far as can be told before it looks for devices."""
    return "tpu" in (jax.config.jax_platforms or "")  # pyright: ignore[reportAttributeAccessIssue]


def stand_in(cost: CostConfig) -> None:
    """Has a CPU stand for the TPUs that an experiment is planned for, if it is and there are none here.

    To be called before JAX looks for devices.

    Raises:
      UserError: there are no such TPUs, or no slices of so many.
    """
    chip = None if tpus_here() else generation(cost.device)
    if chip is not None:
        check_slice(chip, cost.devices)
        without_tpus()


def planned_chips(cost: CostConfig) -> tuple[Chips | None, str | None]:
    """The TPUs that an experiment is planned for, if there are none here, and what prevents compiling for them.

    Raises:
      UserError: as `stand_in`, which comes first.
    """
    chip = None if tpus_here() else generation(cost.device)
    if chip is None:
        return None, None
    check_slice(chip, cost.devices)
    try:
        return chips(chip, cost.devices), None
    except UserError as error:
        return None, str(error)


def why_not() -> str | None:
    """Why programs for TPUs cannot be compiled here, and what to do; None if they can be."""
    if importlib.util.find_spec("libtpu") is not None:
        return None
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the TPU's compiler runs on Linux on an x86-64 only"
    return "the TPU's compiler is missing; install it with pip install '.[tpu]'"


def without_tpus() -> None:
    """Has JAX use the CPU for what it computes itself, and libtpu not look for the machine it is on.

    To be called before JAX looks for devices.
    """
    jax.config.update("jax_platforms", "cpu")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # else only one process of a machine may compile at a time
    ):
        os.environ.setdefault(name, value)


def chips(chip: Generation, count: int) -> Chips:
    """A slice of `count` chips; `without_tpus` comes first.

    Raises:
      UserError: as `check_slice`; or there is no compiler for it, or one that this JAX cannot use.
    """
    from jax.experimental import topologies

    check_slice(chip, count)
    problem = why_not()
    check(problem is None, problem or "")
    alone = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}
    try:
        slice_ = topologies.get_topology_desc(f"{chip.names[0]}:{chip.slices[count]}", "tpu", **chip.options, **alone)
    except Exception as error:  # of many kinds, when libtpu does not belong to this JAX
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the TPU's compiler does not work ({reason}); pip install '.[tpu]' fixes it") from None
    return Chips(slice_.devices, int(chip.memory * (1 << 30)))


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Has XLA leave out what makes programs faster and takes minutes; the memory that they need stays about equal."""
    before = jax.config.jax_optimization_level  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_optimization_level", "O1")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)
