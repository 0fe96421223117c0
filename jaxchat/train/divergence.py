"""Detects a training that has diverged: a loss or gradient that is NaN or infinite, or a loss that spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # steps that a loss is compared with
# A spike is more than twice the largest of them, and more than one nat above it: far beyond the noise of a small batch,
# far below the loss of a model that has come apart, which is near the logarithm of the vocabulary size.
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0


class Diverged(Exception):
    """A step after which training must not continue; `position` is that of the data after the step's batch."""

    def __init__(self, reason: str, step: int, position: dict):
        super().__init__(f"{reason} at step {step:,}")
        self.step, self.position = step, position


class LossWatch:
    """Compares each step's loss with those of the steps before it, `recent`."""

    def __init__(self, recent: Iterable[float] = ()):
        self.recent = deque(recent, WINDOW)

    def fault(self, loss: float, grad_norm: float, *, spikes: bool = True) -> str | None:
        """What is wrong with a step's loss (in nats) or gradient norm; None for a good step, which is remembered.

        A step whose gradient is zero has learnt nothing, and is neither judged nor remembered. Without `spikes` any
        finite loss is good: one that is no cross-entropy may be of any size.
        """
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if grad_norm == 0 or not spikes:
            return None
        if len(self.recent) == WINDOW:
            largest = max(self.recent)
            if loss > max(largest * SPIKE_RATIO, largest + SPIKE_NATS):
                return f"loss spikes to {loss:.2f}, from at most {largest:.2f} in the {WINDOW} steps before,"
        self.recent.append(loss)
        return None
