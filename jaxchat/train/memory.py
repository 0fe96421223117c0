"""Compiles the training step so that it fits into a device's memory, as XLA's own analysis sees it.

A step that needs too much computes fewer rows at once, or keeps fewer activations and computes them a second time for
the gradients (rematerialisation). Which of these is taken is found by compiling (`choice`). The step that was compiled
is the step that runs, so where the first one fits, the search costs nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxchat.devices.host import available_memory
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import KEPT, Params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import Compute, Remat
from jaxchat.train.choice import Choice, Expected, by_preference, choose
from jaxchat.train.loss import Objective
from jaxchat.train.step import AbstractBatch, Batch, State, init_state, make_train_step

LEVELS = ("none", *KEPT)  # from the least rematerialisation to the most
# The part of a device's memory left for what the analysis does not see: the next batch, gaps between arrays.
SPARE = 0.05
# Of the memory that is free on a host whose devices use it, and what is taken to be free where the system does not say:
# the rest is for the text that is read, for saving, and for other programs.
HOST_SHARE, HOST_BYTES = 0.6, 4 << 30
# What a step keeps for the gradients, in numbers per token, layer and unit of the model's width, and in bytes per token
# besides. From XLA's analysis of steps of d6 to d32 for an H200; it only says what to compile first.
KEPT_NUMBERS, KEPT_BYTES = {"none": 10.5, "mlp": 5.0, "full": 2.5}, 20_000
GIB = 1 << 30
MakeStep = Callable[[Remat], Any]  # from a level of rematerialisation to the jitted step
Shown = Callable[[Choice], AbstractContextManager]  # what tells the user that a choice is being compiled


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
    """A compiled training step, the choice it is, and the memory of every choice that was tried.

    `limit` is what a step may take, in bytes per device, or None if that is unknown; `fits` says whether this one
    stays within it in all processes. `seconds` is the time spent on tracing and on compiling all choices.
    """

    choice: Choice
    compiled: jax.stages.Compiled
    memories: dict[Choice, StepMemory]
    limit: int | None
    fits: bool
    seconds: dict[str, float]

    @property
    def remat(self) -> str:
        return self.choice.remat

    @property
    def memory(self) -> StepMemory:
        return self.memories[self.choice]

    def __str__(self) -> str:
        """Such as `32 rows, remat mlp: a step takes 50.10 of 74.30 GiB per device (32 rows, remat none: 93.20)`."""
        of = "" if self.limit is None else f" of {self.limit / GIB:.2f}"
        others = [
            f"{tried}: {memory.total / GIB:.2f}" for tried, memory in self.memories.items() if tried != self.choice
        ]
        beside = f" ({'; '.join(others)})" if others else ""
        return f"{self.choice}: a step takes {self.memory.total / GIB:.2f}{of} GiB per device{beside}"

    def too_large(self, stage: str) -> str:
        """The message for the user where no choice fits: one line, with the settings to change."""
        spread = "spread parameters and optimizer over more devices with mesh.fsdp"
        rows = self.choice.device_rows
        if self.limit is not None and self.memory.held < self.limit:
            if rows > 1:
                spread = f"lower {stage}.device-rows, now {rows}, or {spread}"
            else:
                spread = f"lower model.sequence-len or model.depth, or {spread}"
        return f"{stage} does not fit into memory: {self}; {spread}"


@dataclass(frozen=True)
class PlannedStep:
    """A training step before it is compiled.

    Attributes:
      state: the training state as ShapeDtypeStructs with their shardings.
      make: builds the jitted step for a level of rematerialisation.
      token_bytes: what a token may be expected to take at each level, in bytes.
    """

    state: State
    make: MakeStep
    token_bytes: dict[str, float]

    def expected(self, sequence_len: int) -> Expected:
        """What a step may be expected to take: the state, gradients of a micro-batch and their sum, and its rows."""
        held, gradients = bytes_per_device(self.state), bytes_per_device(self.state["params"])
        per_row = {level: taken * sequence_len for level, taken in self.token_bytes.items()}
        return Expected(held + 2 * gradients, per_row)


def plan_step(
    config: GPTConfig,
    optimizer: optax.GradientTransformation,
    params: Params,
    compute: Compute,
    objective: Objective | None = None,
) -> PlannedStep:
    """The training step of a model. `params` may be arrays or ShapeDtypeStructs; nothing is allocated."""
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    placed = shardings(compute.mesh, state)  # pyright: ignore[reportArgumentType]

    def make_step(remat: Remat):
        return make_train_step(
            config, optimizer, compute.with_remat(remat), objective=objective, state_shardings=placed
        )

    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)
    itemsize = jnp.dtype(compute.dtype).itemsize
    layers = config.depth * config.width * itemsize
    of_values = len(config.value_layers) * config.kv_heads * config.head_dim * itemsize  # looked up before the blocks
    kept = KEPT_NUMBERS | ({"none": KEPT_NUMBERS["none"] + 1} if config.residual_scales else {})
    besides = KEPT_BYTES + of_values
    return PlannedStep(state, make_step, {name: numbers * layers + besides for name, numbers in kept.items()})


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays or ShapeDtypeStructs with shardings on one of the devices that share it."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def usable_memory(of_host: bool = False, taken_over: int = 0) -> int | None:
    """Bytes that a step may take on each device; None where a device does not report its memory.

    Of several processes, which call it together, the least of all.

    Args:
      of_host: whether to go by the host's memory in that case, which the devices then share: a CPU's, or Apple's GPU.
      taken_over: bytes of what is on each device now that a step takes over; the rest stays beside it.
    """
    reported = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in stats for stats in reported):
        free = min(
            (1 - SPARE) * stats["bytes_limit"] - max(0, stats.get("bytes_in_use", 0) - taken_over) for stats in reported
        )
    else:
        free = HOST_SHARE * (_host_memory() or HOST_BYTES) / len(reported) if of_host else math.inf
    free = _in_all_processes(free, np.min)
    return int(free) if math.isfinite(free) else None


def _host_memory() -> int | None:
    free = available_memory()
    if free is None and hasattr(os, "sysconf"):  # macOS says only how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return free


def levels(setting: str, mesh: Mesh) -> tuple[str, ...]:
    """The levels of rematerialisation to choose from: all for "auto", except on a CPU, whose compiler undoes them."""
    if setting != "auto":
        return (setting,)
    return LEVELS[:1] if mesh.devices.flat[0].platform == "cpu" else LEVELS


def compile_step(
    planned: PlannedStep,
    choices: Sequence[Choice],
    limit: int | None,
    batch_of: Callable[[int], Batch | AbstractBatch],
    *,
    first: Choice | None = None,
    shown: Shown = lambda choice: nullcontext(),
) -> CompiledStep:
    """Compiles the best choice that fits; nothing is allocated. All processes, which call it together, choose the same.

    Args:
      choices: the best one first. If none takes at most `limit` bytes per device, the one that takes least is returned
        all the same; without a limit, the best one.
      batch_of: from a choice's number of rows to its batch: arrays, or ShapeDtypeStructs with shardings.
      first: a choice that is taken if it fits, whether a better one would or not.
      shown: is entered while a choice is compiled.

    Raises:
      UserError: the compiler refuses every choice, as a TPU's does where a step needs more memory than a chip has.
    """
    memories: dict[Choice, StepMemory] = {}
    seconds = {"trace": 0.0, "compile": 0.0}
    kept: dict[Choice, jax.stages.Compiled] = {}
    refusals: list[str] = []
    within = math.inf if limit is None else limit

    def measure(choice: Choice) -> float:
        began = traced = time.perf_counter()
        compiled = None
        with shown(choice):
            try:
                lowered = planned.make(choice.remat).lower(planned.state, batch_of(choice.device_rows))  # pyright: ignore[reportArgumentType]
                traced = time.perf_counter()
                compiled, refused = _compile(lowered)
            except UserError as error:  # more elements than a kernel can count
                refused = str(error)
        seconds["trace"] += traced - began
        seconds["compile"] += time.perf_counter() - traced
        if compiled is None:
            refusals.append(refused)
        else:
            memories[choice] = StepMemory.of(compiled)
            kept[choice] = compiled
        return _in_all_processes(math.inf if compiled is None else memories[choice].total, np.max)

    expected = planned.expected(_device_shape(batch_of(choices[0].device_rows))[1])
    taken = choose(choices, within, measure, expected, first)
    if taken is None and not kept:
        raise UserError(
            f"a training step does not fit into memory ({refusals[-1]}); lower device-rows, or spread parameters and "
            "optimizer over more devices with mesh.fsdp"
        )
    least = min(memories, key=lambda choice: memories[choice].total) if taken is None else taken
    return CompiledStep(least, kept[least], memories, limit, taken is not None, seconds)


def _compile(lowered: Any) -> tuple[jax.stages.Compiled | None, str]:
    """The program of a lowered step, or None and why the compiler refuses it for want of memory, in a line."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2].rstrip(".")


def _in_all_processes(number: float, which: Callable[[Any], Any]) -> float:
    """The least or the largest of all processes' numbers: they must choose the same, and their devices may differ."""
    if jax.process_count() == 1:
        return number
    return float(which(multihost_utils.process_allgather(np.array(number, np.float64))))


class OutOfMemory(UserError):
    """A step that should have fitted ran out of memory; `choice` and `total` say which, and its bytes per device."""

    def __init__(self, step: CompiledStep):
        self.choice, self.total = step.choice, step.memory.total
        super().__init__(
            f"the first step ran out of memory, with {step.choice} and {self.total / GIB:.2f} GiB per device by XLA's "
            "analysis; end other programs that use the device, or lower device-rows"
        )


class TrainStep:
    """The training step as a function of state and batch, compiled by `compile_step` once per form of batch.

    `on_compiled` is called with each CompiledStep before it runs, and may refuse it by raising. A state with another
    layout than the first one's is an error, never a silent recompilation.
    """

    def __init__(
        self,
        planned: PlannedStep,
        levels: Sequence[str],
        limit: int | None,
        on_compiled: Callable[[CompiledStep], None],
    ):
        self.planned, self._levels, self._limit, self._on_compiled = planned, levels, limit, on_compiled
        self._by_shapes: dict[tuple, CompiledStep] = {}
        self._has_run: set[tuple] = set()

    def choose(
        self,
        rows: Sequence[int],
        batch_of: Callable[[int], AbstractBatch],
        *,
        first: Choice | None = None,
        shown: Shown = lambda choice: nullcontext(),
    ) -> CompiledStep:
        """The step for one of several numbers of rows; the arguments are those of `compile_step`."""
        rows = tuple(rows)
        length = _device_shape(batch_of(rows[0]))[1]
        choices = by_preference(rows, length, self._levels)
        step = compile_step(self.planned, choices, self._limit, batch_of, first=first, shown=shown)
        return self._accept(step, batch_of(step.choice.device_rows))

    def surely_fits(self, batch: AbstractBatch) -> bool:
        """Whether so little is expected of a batch that the step need not be compiled to know that it fits."""
        rows, length = _device_shape(batch)
        expected = self.planned.expected(length)(Choice(rows, self._levels[0]))
        return self._limit is not None and expected < self._limit / 4

    def compile(self, batch: Batch | AbstractBatch) -> CompiledStep:
        """The step for batches of this shape; compiles it the first time."""
        if _shapes(batch) in self._by_shapes:
            return self._by_shapes[_shapes(batch)]
        choices = by_preference([_device_shape(batch)[0]], _device_shape(batch)[1], self._levels)
        step = compile_step(self.planned, choices, self._limit, lambda _: batch)
        return self._accept(step, batch)

    def _accept(self, step: CompiledStep, batch: Batch | AbstractBatch) -> CompiledStep:
        self._on_compiled(step)
        self._by_shapes[_shapes(batch)] = step
        return step

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step.

        Raises:
          OutOfMemory: the first one for batches of this shape has no room.
        """
        step = self.compile(batch)
        if _shapes(batch) in self._has_run:
            return step.compiled(state, batch)
        try:
            result = jax.block_until_ready(step.compiled(state, batch))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise OutOfMemory(step) from None
        self._has_run.add(_shapes(batch))
        return result


def _device_shape(batch: Batch | AbstractBatch) -> tuple[int, int]:
    """Rows that a device computes at once, and tokens of a row."""
    inputs = batch["inputs"]
    _, rows, length = inputs.sharding.shard_shape(inputs.shape)  # pyright: ignore[reportOptionalMemberAccess]
    return rows, length


def _shapes(batch: Batch | AbstractBatch) -> tuple:
    arrays, structure = jax.tree.flatten(batch)
    return structure, *(array.shape for array in arrays)
