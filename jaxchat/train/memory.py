"""Compiles the training step so that it fits into a device's memory, as XLA's own analysis sees it.

A step that needs too much keeps fewer activations and computes them a second time for the gradients
(rematerialisation). The least of it that suffices is found by compiling: first the plain step, then, only if that is
too large, those that keep less. The step that was compiled is the step that runs, so where the plain one fits, the
search costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import KEPT, Params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import Compute, Remat
from jaxchat.train.loss import Objective
from jaxchat.train.step import AbstractBatch, Batch, State, init_state, make_train_step

LEVELS = ("none", *KEPT)  # from the least rematerialisation to the most
# The part of a device's memory left for what the analysis does not see: the next batch, gaps between arrays.
SPARE = 0.05
GIB = 1 << 30
MakeStep = Callable[[Remat], Any]  # from a level of rematerialisation to the jitted step


@dataclass(frozen=True)
class StepMemory:
    """Bytes per device: `held` by parameters, optimizer state and batch, and `used` by a step in addition."""

    held: int
    used: int

    @property
    def total(self) -> int:
        return self.held + self.used

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> StepMemory:
        """XLA's analysis of a compiled step; all zero on a backend that has none."""
        found = compiled.memory_analysis()
        if found is None:
            return cls(0, 0)
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return cls(held, found.temp_size_in_bytes)


@dataclass(frozen=True)
class CompiledStep:
    """A compiled training step, its level of rematerialisation, and the memory of every level that was tried.

    `limit` is what a step may take, in bytes per device, or None if that is unknown; `fits` says whether this one
    stays within it in all processes. `seconds` is the time spent on tracing and on compiling all levels.
    """

    remat: str
    compiled: jax.stages.Compiled
    memories: dict[str, StepMemory]
    limit: int | None
    fits: bool
    seconds: dict[str, float]

    @property
    def memory(self) -> StepMemory:
        return self.memories[self.remat]

    def __str__(self) -> str:
        """Such as `remat mlp: a step takes 50.10 of 74.30 GiB per device (with none 93.20)`."""
        of = "" if self.limit is None else f" of {self.limit / GIB:.2f}"
        others = [f"{name} {memory.total / GIB:.2f}" for name, memory in self.memories.items() if name != self.remat]
        beside = f" (with {', '.join(others)})" if others else ""
        return f"remat {self.remat}: a step takes {self.memory.total / GIB:.2f}{of} GiB per device{beside}"

    def too_large(self, stage: str, device_rows: int) -> str:
        """The message for the user where no level fits: one line, with the settings to change."""
        spread = "spread parameters and optimizer over more devices with mesh.fsdp"
        lower = f"lower {stage}.device-rows, now {device_rows}, or {spread}"
        fewer_rows_help = device_rows > 1 and self.limit is not None and self.memory.held < self.limit
        return f"{stage} does not fit into memory: {self}; {lower if fewer_rows_help else spread}"


def plan_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    compute: Compute,
    objective: Objective | None = None,
) -> tuple[State, MakeStep]:
    """The training state as ShapeDtypeStructs with their shardings, and a function that builds the jitted step.

    `params` may be arrays or ShapeDtypeStructs; nothing is allocated.
    """
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    placed = shardings(compute.mesh, state)  # pyright: ignore[reportArgumentType]

    def make_step(remat: Remat):
        return make_train_step(
            config, optimizer, compute.with_remat(remat), objective=objective, state_shardings=placed
        )

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed), make_step


def usable_memory() -> int | None:
    """Bytes that a step may take on each device of this process; None where a device does not report its memory."""
    reported = [device.memory_stats() or {} for device in jax.local_devices()]
    if not all("bytes_limit" in stats for stats in reported):
        return None
    return int((1 - SPARE) * min(stats["bytes_limit"] for stats in reported))


def compile_step(
    make_step: MakeStep, setting: str, limit: int | None, state: State, batch: Batch | AbstractBatch
) -> CompiledStep:
    """Compiles the step for `state` and `batch`: arrays, or ShapeDtypeStructs with shardings; nothing is allocated.

    Args:
      setting: a level of rematerialisation, which is taken whether it fits or not; or "auto": the lowest level that
        takes at most `limit` bytes per device, or, if none does, the highest; without a limit, "none".

    Raises:
      UserError: the compiler refuses every level, as a TPU's does where a step needs more memory than a chip has.
    """
    levels: tuple[Any, ...] = LEVELS if setting == "auto" else (setting,)
    memories, seconds = {}, {"trace": 0.0, "compile": 0.0}
    taken, refusal = None, ""
    for level in levels:
        began = time.perf_counter()
        lowered = make_step(level).lower(state, batch)
        traced = time.perf_counter()
        compiled, refused = _compile(lowered)
        seconds["trace"] += traced - began
        seconds["compile"] += time.perf_counter() - traced
        fits = False
        if compiled is not None:
            taken = level, compiled
            memories[level] = StepMemory.of(compiled)
            fits = limit is None or memories[level].total <= limit
        refusal = refused or refusal
        if fits := _everywhere(fits):
            break
    if taken is None:
        raise UserError(
            f"a training step does not fit into memory ({refusal}); lower device-rows, or spread parameters and "
            "optimizer over more devices with mesh.fsdp"
        )
    return CompiledStep(*taken, memories, limit, fits, seconds)


def _compile(lowered: Any) -> tuple[jax.stages.Compiled | None, str]:
    """The program of a lowered step, or None and why the compiler refuses it for want of memory, in a line."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2].rstrip(".")


def _everywhere(fits: bool) -> bool:
    """Whether it fits in all processes: they must run the same program, and their devices may differ a little."""
    return fits if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(fits))))


class TrainStep:
    """The training step as a function of state and batch, compiled by `compile_step` once per shape of batch.

    `on_compiled` is called with each CompiledStep before it runs, and may refuse it by raising. A state with another
    layout than the first one's is an error, never a silent recompilation.
    """

    def __init__(
        self, make_step: MakeStep, setting: str, limit: int | None, on_compiled: Callable[[CompiledStep], None]
    ):
        self._make, self._setting, self._limit, self._on_compiled = make_step, setting, limit, on_compiled
        self._by_shapes: dict[tuple, CompiledStep] = {}

    def compile(self, state: State, batch: Batch | AbstractBatch) -> CompiledStep:
        """The step for batches of this shape; compiles it the first time."""
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        if shapes not in self._by_shapes:
            step = compile_step(self._make, self._setting, self._limit, state, batch)
            self._on_compiled(step)
            self._by_shapes[shapes] = step
        return self._by_shapes[shapes]

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        return self.compile(state, batch).compiled(state, batch)
