"""When a training has gone wrong, and is to stop or to go back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # steps that a loss is compared with
# A spike is above the largest of them by its double and by so many nats: far beyond the noise of a small batch, far
# below what a model that has come apart shows (a loss near the logarithm of the vocabulary).
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0


class Diverged(Exception):
    """A step whose result is not to be gone on from; `position` is that of the data behind its batch."""

    def __init__(self, reason: str, step: int, position: dict):
        super().__init__(f"{reason} at step {step:,}")
        self.step, self.position = step, position


class LossWatch:
    """Tells a loss or gradient that is no number, and a loss that spikes, from what is normal."""

    def __init__(self, recent: Iterable[float] = ()):
        self.recent = deque(recent, WINDOW)

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step's values; a right loss, of which something was learnt, is remembered."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if grad_norm == 0:
            return None
        if len(self.recent) == WINDOW:
            largest = max(self.recent)
            if loss > max(largest * SPIKE_RATIO, largest + SPIKE_NATS):
                return f"loss spikes to {loss:.2f}, from {largest:.2f} at most in the {WINDOW} steps before,"
        self.recent.append(loss)
        return None
