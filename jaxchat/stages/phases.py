"""The batches of pretraining in phases: what a step does (`train/phases.py`) comes with its batch."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxchat.data import IGNORE
from jaxchat.devices.mesh import NOWHERE, put_batch, put_whole
from jaxchat.stages.training import Batches
from jaxchat.stages.workspace import Workspace
from jaxchat.train.budget import BatchPlan
from jaxchat.train.phases import Phases, StepPlan
from jaxchat.train.step import MICRO_BATCH_SPEC, AbstractBatch, Batch, Reach


class PhasedBatches(Batches):
    """The batches of `phases`, put together from those of a loader, which have `unit_tokens` each.

    So rows come in the same order whatever the phases. A batch that is smaller than the last phase's has its shape, and
    says how many of its micro-batches are to be computed.
    """

    def __init__(
        self,
        workspace: Workspace,
        plans: tuple[BatchPlan, ...],
        iterator: Iterator[dict[str, np.ndarray]],
        phases: Phases,
    ):
        super().__init__(workspace, plans, iterator)
        self.phases, self._tokens = phases, 0

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        plan = self.phases(step)
        self._tokens = plan.tokens
        units = [next(self.iterator) for _ in range(plan.tokens // self.phases.config.unit_tokens)]
        computed = self._computed(plan)
        batch = {}
        for name in units[0]:
            rows = np.concatenate([unit[name] for unit in units])
            parts = rows.reshape(-1, computed, rows.shape[-1]).swapaxes(0, 1)
            nothing = IGNORE if name == "targets" else 0
            missing = np.full((self.plan.accumulation - computed, *parts.shape[1:]), nothing, np.int32)
            batch[name] = put_batch(self.workspace.mesh, np.concatenate([parts, missing]), MICRO_BATCH_SPEC)
        extra = {"reach": plan.reach} if self.phases.config.phases.windows else {}
        return {**batch, **self._settings(plan)}, extra

    def tokens(self, batch: Batch) -> int:
        return self._tokens

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        return self._abstract(plan, self.phases(self.phases.num_steps - 1))

    def others(self) -> list[AbstractBatch]:
        begins: list[int] = sorted({*self.phases.begins, self.phases.steps_ahead})
        return [self._abstract(self.plan, self.phases(step)) for step in begins if step < self.phases.num_steps]

    def _computed(self, plan: StepPlan) -> int:
        """How many micro-batches a step has."""
        return self.plan.accumulation * plan.tokens // self.phases.config.batch_tokens

    def _abstract(self, plan: BatchPlan, of_step: StepPlan) -> AbstractBatch:
        place = NamedSharding(self.workspace.mesh, NOWHERE)
        settings = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), self._settings(of_step)
        )
        return {**super().abstract(plan), **settings}

    def _settings(self, plan: StepPlan) -> Batch:
        """What of a step's plan its program must know."""
        settings: Batch = {}
        if self.phases.grows:
            settings["rate"] = self._whole(np.array(self.phases.config.lr_fraction * plan.rate, np.float32))
            settings["micro_batches"] = self._whole(np.array(self._computed(plan), np.int32))
        if plan.ahead:
            settings["ahead"] = self._whole(np.array(plan.ahead, np.float32))
        if plan.reach < 1:
            settings["reach"] = Reach(plan.reach)
        return settings

    def _whole(self, array: np.ndarray) -> jax.Array:
        return put_whole(self.workspace.mesh, array, NOWHERE)
