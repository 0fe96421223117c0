"""Whether a training step fits into a device's memory, by XLA's own analysis, and what it computes twice to do so.

The least recomputation that fits is found by compiling: first the plain step, then, only if that is too large, those
that keep less. What was compiled is what runs, so that a step that fits as it is costs nothing here.
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
from jax.sharding import Mesh

from jaxchat.devices.mesh import shardings
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import KEPT, Params
from jaxchat.train.step import Batch, State, init_state, make_train_step

LEVELS = ("none", *KEPT)  # from the least recomputation to the most
# Of a device's memory, for what a step's analysis does not know: the next batch, gaps between arrays.
SPARE = 0.05
GIB = 1 << 30
MakeStep = Callable[[str], Any]  # from a level to the jitted step


@dataclass(frozen=True)
class StepMemory:
    """Bytes a device: `held` by parameters, optimizer and batch, `used` by a step beside them."""

    held: int
    used: int

    @property
    def total(self) -> int:
        return self.held + self.used

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> StepMemory:
        """XLA's analysis; all zero on a backend that gives none."""
        found = compiled.memory_analysis()
        if found is None:
            return cls(0, 0)
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return cls(held, found.temp_size_in_bytes)


@dataclass(frozen=True)
class Fit:
    """A compiled step with the recomputation `remat`, and the memory of it and of those that were too large.

    `limit`: bytes a device that a step may take, None if unknown. `seconds`: what tracing and compiling took in all.
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
        """Such as `remat mlp: a step takes 50.1 of 74.3 GiB a device (with none 93.2)`."""
        of = "" if self.limit is None else f" of {self.limit / GIB:.2f}"
        others = [f"{name} {memory.total / GIB:.2f}" for name, memory in self.memories.items() if name != self.remat]
        beside = f" (with {', '.join(others)})" if others else ""
        return f"remat {self.remat}: a step takes {self.memory.total / GIB:.2f}{of} GiB a device{beside}"

    def too_large(self, stage: str, device_rows: int) -> str:
        """One line for the user: that nothing fits, and what to lower."""
        spread = "spread parameters and optimizer over more devices with mesh.fsdp"
        lower = f"lower {stage}.device-rows, now {device_rows}, or {spread}"
        helps = device_rows > 1 and self.memory.held < self.limit
        return f"{stage} does not fit into memory: {self}; {lower if helps else spread}"


def plan_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    *,
    mesh: Mesh,
    dtype,
    in_fp8: bool = False,
) -> tuple[State, MakeStep]:
    """The state for `params` (arrays or ShapeDtypeStructs) as ShapeDtypeStructs with their places on the mesh, and what
    makes its jitted step."""
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    placed = shardings(mesh, state)

    def make_step(remat: str):
        return make_train_step(
            config, optimizer, mesh=mesh, state_shardings=placed, dtype=dtype, remat=remat, in_fp8=in_fp8
        )

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed), make_step


def usable_memory() -> int | None:
    """Bytes that a step may take of each device of this process; None where a device does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return None if None in limits else int((1 - SPARE) * min(limits))


def _fits_everywhere(memory: StepMemory, limit: int | None) -> bool:
    """In all processes, since they must run the same program, and their devices or compilers may differ a little."""
    fits = limit is None or memory.total <= limit
    return fits if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(fits))))


def fit_step(make_step: MakeStep, setting: str, limit: int | None, state: State, batch: Batch) -> Fit:
    """The step compiled for `state` and `batch` (arrays, or ShapeDtypeStructs with shardings: nothing is allocated).

    With the setting "auto" it is the one with the least recomputation that takes at most `limit` bytes a device, or, if
    none does, the one with the most; without a limit it is the plain one. Any other setting is obeyed.
    """
    levels = LEVELS if setting == "auto" else (setting,)
    memories, seconds = {}, {"trace": 0.0, "compile": 0.0}
    for level in levels:
        began = time.perf_counter()
        lowered = make_step(level).lower(state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        seconds["trace"] += traced - began
        seconds["compile"] += time.perf_counter() - traced
        memories[level] = StepMemory.of(compiled)
        fits = _fits_everywhere(memories[level], limit)
        if fits:
            break
    return Fit(level, compiled, memories, limit, fits, seconds)


class FittedStep:
    """A training step that is compiled, by `fit_step`, once for each shape of batch; `accept` is told of each.

    It calls what was compiled and nothing else: a state that is laid out otherwise is an error, not a recompilation.
    """

    def __init__(self, make_step: MakeStep, setting: str, limit: int | None, accept: Callable[[Fit], None]):
        self._make, self._setting, self._limit, self._accept = make_step, setting, limit, accept
        self._fits: dict[tuple, Fit] = {}

    def fit(self, state: State, batch: Batch) -> Fit:
        """The step for batches of this shape."""
        shapes = tuple((name, batch[name].shape) for name in sorted(batch))
        if shapes not in self._fits:
            fit = fit_step(self._make, self._setting, self._limit, state, batch)
            self._accept(fit)
            self._fits[shapes] = fit
        return self._fits[shapes]

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        return self.fit(state, batch).compiled(state, batch)
