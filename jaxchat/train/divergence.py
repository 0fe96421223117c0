"""Detects a training that has diverged: a loss or gradient that is not finite, or a loss that spikes and stays up."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 64  # steps that a loss is compared with, and for which it has to stay up
# A spike is more than twice the largest of them, and more than one nat above it: far beyond the noise of a small batch,
# far below the loss of a model that has come apart, which is near the logarithm of the vocabulary size.
SPIKE_RATIO, SPIKE_NATS = 2.0, 1.0


class Diverged(Exception):
    """A step after which training must not continue; `position` is that of the data after the step's batch."""

    def __init__(self, reason: str, step: int, position: dict):
        super().__init__(f"{reason} at step {step:,}")
        self.step, self.position = step, position


class LossWatch:
    """Compares each step's loss with those of the steps before it, `recent`.

    Data of a new kind spikes too, such as text of another language or a rare answer. But a training learns it, and one
    that has come apart stays where it is. So the losses of a spike are `high` until one is as low as before, or until
    there are `WINDOW` of them: then the training has diverged.
    """

    def __init__(self, recent: Iterable[float] = ()):
        self.recent = deque(recent, WINDOW)
        self.high: list[float] = []
        self._judged = False

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
        first, self._judged = not self._judged, True
        if len(self.recent) == WINDOW:
            largest = max(self.recent)
            limit = max(largest * SPIKE_RATIO, largest + SPIKE_NATS)
            if loss > limit and first:  # by parameters from a checkpoint, which are good: the data is new
                self.recent.clear()
            elif loss > limit:
                self.high.append(loss)
                if len(self.high) < WINDOW:
                    return None
                return (
                    f"loss spikes to {self.high[0]:.2f} and stays above {limit:.2f}, from at most {largest:.2f} in the "
                    f"{WINDOW} steps before,"
                )
        self.recent.extend(self.high)
        self.high.clear()
        self.recent.append(loss)
        return None
