"""How much the rollouts have to teach: answers to one question that all earn the same reward teach nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxchat.config import RLConfig
from jaxchat.rl.advantages import differ

TOLD = (10, 100, 1000)  # steps in a row without any signal, after which the user is told
MOST_CUT = 0.5  # share of answers without room to end from which that is the likely cause


@dataclass
class Signal:
    """Sums over the steps of a training so far."""

    steps: int = 0
    steps_without_signal: int = 0
    groups: int = 0  # questions, as often as they were asked
    groups_without_signal: int = 0
    answers: int = 0  # with a reward
    unscored: int = 0  # without one
    cut: int = 0  # of both
    reward: float = 0.0
    since: dict[str, Any] = field(default_factory=dict)  # the same sums over the steps since the last with a signal

    def add(self, rewards: Float[np.ndarray, "Q N"], cut: Bool[np.ndarray, "Q N"]) -> dict[str, float]:
        """Counts a batch of answers; returns its metrics. Rewards that are NaN are not there.

        `reward` is the mean, `groups_without_signal` the share of questions whose answers all earned the same, and
        `cut` the share of answers that had no room to end.
        """
        equal, known = ~differ(rewards), ~np.isnan(rewards)
        self._count(rewards, cut)
        quiet = self.quiet
        if equal.all():
            quiet._count(rewards, cut)
        self.since = quiet.state() if equal.all() else {}
        return {
            "reward": float(rewards[known].mean()) if known.any() else 0.0,
            "groups_without_signal": float(equal.mean()),
            "cut": float(cut.mean()),
        }

    def _count(self, rewards: Float[np.ndarray, "Q N"], cut: Bool[np.ndarray, "Q N"]) -> None:
        equal, known = ~differ(rewards), ~np.isnan(rewards)
        self.steps += 1
        self.steps_without_signal += bool(equal.all())
        self.groups += len(equal)
        self.groups_without_signal += int(equal.sum())
        self.answers += int(known.sum())
        self.unscored += int((~known).sum())
        self.cut += int(cut.sum())
        self.reward += float(rewards[known].sum())

    @property
    def quiet(self) -> Signal:
        """The steps since the last one with a signal."""
        return Signal(**self.since)

    def warning(self, config: RLConfig, room: int) -> str | None:
        """What to tell the user after a step, if there has been no signal for long; `room` as for `advice`."""
        quiet = self.quiet
        if quiet.steps not in TOLD:
            return None
        updates = quiet.steps * config.updates_per_batch
        return f"{quiet.lack} in the last {updates:,} steps {quiet.advice(config, room)}"

    @property
    def absent(self) -> bool:
        """Whether no step had anything to teach: only KL divergence and entropy can have changed the parameters."""
        return self.steps > 0 and self.steps_without_signal == self.steps

    @property
    def lack(self) -> str:
        """What is wrong with a training whose signal is absent."""
        return "all answers of each question had the same reward" if self.answers else "no answer had a reward"

    def facts(self) -> dict[str, float]:
        """For the stage's record: over all steps, the shares of `add`, and the number of steps without any signal."""
        if not self.groups:
            return {}
        return {
            "groups_without_signal": self.groups_without_signal / self.groups,
            "cut": self.cut / (self.answers + self.unscored),
            "steps_without_signal": self.steps_without_signal,
        }

    def state(self) -> dict[str, Any]:
        """The sums, as JSON."""
        return asdict(self)

    def advice(self, config: RLConfig, room: int) -> str:
        """The mean reward, and what a training that has no signal should try.

        Args:
          room: the tokens that the context leaves for the answer to most of the questions.
        """
        if not self.answers:
            return f"({self.unscored:,} answers); mend {config.reward or 'what scores --rl.tasks'}"
        mean, cut = self.reward / self.answers, self.cut / (self.answers + self.unscored)
        return f"({mean:.2g} on average); {_advice(config, room, mean, cut)}"


def _advice(config: RLConfig, room: int, reward: float, cut: float) -> str:
    if cut >= MOST_CUT and room < config.max_new_tokens:
        return (
            f"{cut:.0%} of them had no room to end: model.sequence-len leaves {room:,} tokens for most; train a model "
            "with a longer one, or name --rl.tasks with shorter questions"
        )
    if cut >= MOST_CUT:
        return f"{cut:.0%} of them had no room to end: raise --rl.max-new-tokens above {config.max_new_tokens}"
    if reward > 0.5:
        return "the model knows the answers: name harder --rl.tasks"
    if config.temperature < 0.5:
        return f"they hardly differ: raise --rl.temperature above {config.temperature:g}"
    more = f"raise --rl.samples-per-question above {config.samples_per_question}"
    return f"the model does not find the right ones: train it longer before rl, name easier --rl.tasks, or {more}"
