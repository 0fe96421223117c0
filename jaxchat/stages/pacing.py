"""What a training stage does where time decides how long it is: its rates come with its batches, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxchat.config import ScheduleConfig
from jaxchat.data.positions import epoch
from jaxchat.devices.mesh import NOWHERE, put_whole
from jaxchat.stages.workspace import Workspace
from jaxchat.train.budget import BatchPlan
from jaxchat.train.horizon import PASSES, Horizon
from jaxchat.train.loop import Evaluator, Source
from jaxchat.train.step import AbstractBatch, Batch

CHAT_PASSES = 4  # over conversations, at most: they are few, and their answers are soon learnt by heart


class Paced(Source):
    """The batches of another source, each with the factor on the learning rates of its step.

    The stage's `lr_fraction` is in it, so that stages whose batches have the same shapes run the same program.
    `moving` gives, for a number of steps, schedules of more that comes with the batches (`MOVING` of the step).
    """

    def __init__(
        self,
        source: Any,
        horizon: Horizon,
        workspace: Workspace,
        lr_fraction: float,
        moving: Callable[[int], dict[str, optax.Schedule]] = lambda steps: {},
    ):
        self.source, self.horizon, self.workspace, self.mesh = source, horizon, workspace, workspace.mesh
        self.lr_fraction, self.moving = lr_fraction, moving
        self._rate: tuple[float, jax.Array] | None = None
        self._taken = 0  # steps whose batches were taken; 0 before the first one here

    @property
    def samples(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.source.samples

    @property
    def plans(self) -> tuple[BatchPlan, ...]:
        return self.source.plans

    @property
    def plan(self) -> BatchPlan:
        return self.source.plan

    @plan.setter
    def plan(self, plan: BatchPlan) -> None:
        self.source.plan = plan

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """What `next_batch` returns with `plan`, as ShapeDtypeStructs."""
        return self._with_rates(self.source.abstract(plan))

    def others(self) -> list[AbstractBatch]:
        return [self._with_rates(batch) for batch in self.source.others()]

    def _with_rates(self, batch: AbstractBatch) -> AbstractBatch:
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(self.mesh, NOWHERE))
        return {**batch, "rate": rate, **dict.fromkeys(self.moving(1), rate)}

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        self.workspace.keep_time()
        batch, extra = self.source.next_batch(step, params)
        self._taken = step + 1
        rate = self.lr_fraction * self.horizon.rates[step]
        if self._rate is None or self._rate[0] != rate:  # constant for most steps
            self._rate = rate, self._put(rate)
        moving = self.moving(self.horizon.steps)
        return {**batch, "rate": self._rate[1], **{name: self._put(f(step)) for name, f in moving.items()}}, extra

    def _put(self, value: Any) -> jax.Array:
        return put_whole(self.mesh, np.array(value, np.float32), NOWHERE)

    def tokens(self, batch: Batch) -> int:
        return self.source.tokens(batch)

    def get_state(self) -> dict:
        state = self.source.get_state()
        if self._taken and not self.samples:
            self.horizon.saw(self._taken, epoch(state))
        return state

    def set_state(self, state: dict) -> None:
        self.source.set_state(state)

    def whole_state(self, state: dict) -> dict:
        return self.source.whole_state(state)


def horizon_of(workspace: Workspace, stage: str, schedule: ScheduleConfig) -> Horizon | None:
    """What finds the number of steps of a stage; None where it is known."""
    budget = workspace.budget
    if budget is None or stage in budget.fixed:
        return None
    passes = PASSES if stage == "pretrain" else CHAT_PASSES
    return Horizon(schedule, lambda: budget.left_of(stage), passes=passes, now=budget.now)


def timed(evaluators: Iterable[Evaluator], horizon: Horizon) -> tuple[Evaluator, ...]:
    """The evaluators, whose time the horizon counts."""
    return tuple(dataclasses.replace(each, run=horizon.timed(each.every, each.run)) for each in evaluators)
