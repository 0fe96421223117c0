"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxchat.config import CheckpointConfig


class Retention(preservation_policy.PreservationPolicy):
    """Keeps the newest steps, every n-th, and the best by `scores` (of the steps evaluated; higher is better)."""

    def __init__(self, config: CheckpointConfig):
        self._config = config
        self.scores: dict[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        config = self._config
        kept = set(steps[-config.keep :])
        if config.keep_every:
            kept.update(step for step in steps if step % config.keep_every == 0)
        if config.keep_best:
            scores = {step: score for step, score in self.scores.items() if step in steps}
            kept.update(sorted(scores, key=scores.__getitem__)[-1:])
        return [step in kept for step in steps]
