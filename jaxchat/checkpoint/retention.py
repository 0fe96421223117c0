"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxchat.config import CheckpointConfig


class Retention(preservation_policy.PreservationPolicy):
    """The newest, the best by `worths` (of steps that were evaluated, the more the better), and every n-th step's."""

    def __init__(self, config: CheckpointConfig):
        self._config = config
        self.worths: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        config = self._config
        stay = set(steps[-config.keep :])
        if config.keep_every:
            stay.update(step for step in steps if step % config.keep_every == 0)
        if config.keep_best:
            worths = {step: worth for step, worth in self.worths.items() if step in steps}
            stay.update(sorted(worths, key=worths.__getitem__)[-1:])
        return [step in stay for step in steps]
