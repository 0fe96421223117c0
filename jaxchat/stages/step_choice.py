"""How a stage's batches are split over a device's memory: what was chosen, told and kept for the stage's next start."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
from rich.console import Console

from jaxchat.devices.machine import machine_info
from jaxchat.devices.processes import on_process_zero
from jaxchat.stages.workspace import Workspace
from jaxchat.train.budget import BatchPlan
from jaxchat.train.choice import Choice
from jaxchat.train.loop import Source
from jaxchat.train.memory import TrainStep
from jaxchat.train.step import AbstractBatch

# What tells a machine from others for which something else might fit. The memory is the host's, which a CPU uses.
DEVICES = ("platform", "device_kind", "device_count", "hosts", "memory_bytes")


@runtime_checkable
class Planned(Protocol):
    """A source whose batches can be split over the devices and micro-batches in the ways `plans`; `plan` is taken."""

    plans: tuple[BatchPlan, ...]
    plan: BatchPlan

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """The largest batch that `next_batch` returns with `plan`, as ShapeDtypeStructs."""
        ...


def choose_plan(workspace: Workspace, stage: str, step: TrainStep, source: Source) -> None:
    """Has the source split its batches so that the step fits, and compiles it; a stage that goes on does as before.

    Where the largest batch is rare, as in RL, and far smaller than the memory, it is not compiled.

    Raises:
      UserError: no step fits into memory.
    """
    if not isinstance(source, Planned):
        return
    plans = {plan.device_rows: plan for plan in source.plans}
    best, kept = source.plans[0], on_process_zero(lambda: _kept(workspace, stage))
    as_best = kept is None or kept[0] == best.device_rows
    if source.samples and as_best and step.surely_fits(source.abstract(best)):
        return
    found = step.choose(
        list(plans),
        lambda rows: source.abstract(plans[rows]),
        first=None if kept is None else Choice(*kept),
        shown=lambda choice: _shown(f"{stage:<9} compiling a step of {choice}"),
    )
    source.plan = plans[found.choice.device_rows]


def keep_choice(workspace: Workspace, stage: str, choice: Choice) -> None:
    """Records what a stage is trained with, for when it goes on."""
    facts = {"device_rows": choice.device_rows, "remat": choice.remat, "devices": _devices()}
    on_process_zero(lambda: workspace.directory.note(stage, step=facts))


def _kept(workspace: Workspace, stage: str) -> list[Any] | None:
    """The choice with which the stage was begun on devices like these; None if there is none."""
    before = (workspace.directory.begun(stage) or {}).get("step")
    return [before["device_rows"], before["remat"]] if before and before["devices"] == _devices() else None


def _devices() -> dict[str, Any]:
    info = machine_info()
    return {name: info[name] for name in DEVICES}


@contextlib.contextmanager
def _shown(text: str) -> Iterator[None]:
    """Shows a text and a sign of life on a terminal."""
    if jax.process_index() or not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(text):
        yield
