"""What changes during pretraining, step by step: windows, batches, the weights of tokens ahead. No arrays.

A phase is a share of the run's tokens. Its first step follows from the number of all steps, so that a training that is
resumed does at each step what an uninterrupted one does.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxchat.config import PretrainConfig
from jaxchat.model.config import GPTConfig
from jaxchat.optim.schedules import multiplier


def sizes(config: PretrainConfig) -> tuple[int, ...]:
    """The tokens of a step of each phase."""
    early = config.phases.batch_tokens or (config.batch_tokens,) * (config.phases.count - 1)
    return (*early, config.batch_tokens)


def models(config: PretrainConfig, model: GPTConfig) -> tuple[GPTConfig, ...]:
    """The model with the windows of each phase."""
    reaches = config.phases.windows or (1.0,) * (config.phases.count - 1)
    return (*(dataclasses.replace(model, reach=reach) for reach in reaches), model)


class StepPlan(NamedTuple):
    """What a step does.

    Attributes:
      tokens: of its batch.
      reach: how far back layers see, as a share of their windows.
      ahead: the weights of the losses of the token after the next one and those after it; () without.
      rate: the factor on the learning rates: the schedule's, times that of the phase.
    """

    tokens: int
    reach: float
    ahead: tuple[float, ...]
    rate: float


@dataclass(frozen=True)
class Phases:
    """The phases of a pretraining of `num_steps` steps. `config.phases` has what changes."""

    config: PretrainConfig
    num_steps: int

    @property
    def grows(self) -> bool:
        """Whether the batch grows."""
        return bool(self.config.phases.batch_tokens)

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The step at which each phase begins."""
        steps = [share / size for share, size in zip(self.config.phases.shares, sizes(self.config), strict=True)]
        before = itertools.accumulate(steps[:-1], initial=0.0)
        return tuple(round(self.num_steps * part / sum(steps)) for part in before)

    def tokens_before(self, step: int) -> int:
        """The tokens of all steps before `step`."""
        ends = [min(step, end) for end in (*self.begins[1:], self.num_steps)]
        counts = [max(0, end - begin) for begin, end in zip(self.begins, ends, strict=True)]
        return sum(count * size for count, size in zip(counts, sizes(self.config), strict=True))

    @cached_property
    def tokens(self) -> int:
        """The tokens of all steps."""
        return self.tokens_before(self.num_steps)

    @property
    def steps_ahead(self) -> int:
        """How many steps, the first ones, predict tokens ahead."""
        return bisect.bisect_left(range(self.num_steps), True, key=lambda step: not self(step).ahead)

    def __call__(self, step: int) -> StepPlan:
        """What step number `step`, from 0, does."""
        phases = self.config.phases
        number = bisect.bisect_right(self.begins, step) - 1
        tokens, unit = sizes(self.config)[number], self.config.unit_tokens
        before, total = self.tokens_before(step), self.tokens
        early = number < phases.count - 1
        factor = 1.0
        if early and self.grows:
            factor = phases.rates[number] if phases.rates else math.sqrt(tokens / self.config.batch_tokens)
        # By tokens, in units: where the batch does not grow, these are the steps.
        schedule = multiplier(self.config.schedule, total // unit)
        left = 1 - before / (phases.ahead_until * total)
        return StepPlan(
            tokens,
            phases.windows[number] if early and phases.windows else 1.0,
            tuple(left * weight for weight in phases.ahead) if left > 0 else (),
            factor * float(schedule(before // unit)),  # pyright: ignore[reportArgumentType]
        )
