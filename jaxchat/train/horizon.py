"""How many steps a training takes if time decides: found while it trains, and fixed when its learning rates fall.

As long as the rates are constant, a step does not depend on how many there will be. Until then the number follows the
pace that was measured, and what evaluations take; from then on it stays, so that the training ends as one of that many
steps would. A schedule that falls from its first step keeps its number open for the first half of it: its rates then
move as little as the number does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from jaxchat.config import ScheduleConfig
from jaxchat.devices.processes import on_process_zero
from jaxchat.optim.schedules import multiplier

WARM = 2  # the first steps of a process compile programs and fill queues: they are not measured
WINDOW = 8  # steps that the pace is measured over, at least, once there are so many
FEW = 4  # steps that must have been measured before their number is fixed
UNKNOWN = 1000  # steps that a schedule takes for granted before the pace is known
PASSES = 16  # over a text, at most: beyond that, more teach nothing (Muennighoff et al. 2023, arXiv:2305.16264)
LEAST = 20  # steps, however little data there is: with fewer, learning rates and momentum have no time to work
OPEN = 0.5  # of the steps, the first ones, in which their number may change whatever the schedule
AGAIN = 0.5  # of the time of an evaluator's first call, which compiles programs, that another is taken to need
Run = Callable[[int, Any], Iterable[tuple[str, Any]]]


class Horizon:
    """The number of steps of a training for which there are so many seconds.

    Args:
      schedule: of the learning rates.
      seconds_left: how long the training may go on, its last evaluation included.
      passes: over the data, at most.
      on_change: is told each new number.
      now: the clock.
    """

    def __init__(
        self,
        schedule: ScheduleConfig,
        seconds_left: Callable[[], float],
        *,
        passes: int = PASSES,
        on_change: Callable[[int], None] = lambda steps: None,
        now: Callable[[], float] = time.monotonic,
    ):
        self.schedule, self.seconds_left, self.on_change, self.now = schedule, seconds_left, on_change, now
        self.passes = passes
        self.steps = UNKNOWN
        self.rates: dict[int, float] = {}  # factors on the learning rates, by the step that they were used in
        self.most: int | None = None  # the most steps that the data is good for, once that is known
        self._epoch = 0
        self._known = False  # whether the number of steps is measured
        self._fixed = False
        self._marks: list[tuple[int, float]] = []  # a step, and the time at its beginning without evaluations
        self._last = self._next = -1
        self._evaluating = 0.0
        self._cost: dict[int, float] = {}  # seconds that each evaluator will take, as far as that is known
        self._every: dict[int, int] = {}
        self._keys = itertools.count()

    def __call__(self, step: int) -> int:
        """The number of steps as far as it is known when `step` begins; at least `step` + 1.

        To be called by all processes at each step.
        """
        if step != self._last + 1 or self._last < 0:  # a training that begins, or has returned to a checkpoint
            self._marks, self._first, self._next = [], step, step
        self._last = step
        if not self._fixed and step >= self._next:
            self._decide(step)
        self.rates[step] = float(multiplier(self.schedule, self.steps)(step))  # pyright: ignore[reportArgumentType]
        return self.steps

    def saw(self, step: int, epoch: int) -> None:
        """Tells how often the data has been read from end to end before `step`."""
        if epoch > self._epoch:
            self._epoch, self.most = epoch, max(LEAST, self.passes * -(-step // epoch))

    def resume(self, step: int, steps: int) -> int:
        """Goes on at `step` with the number of steps that an earlier process had found; returns that."""
        self.steps, self._fixed, self._last = steps, step >= self._closes(steps), -1
        return steps

    def timed(self, every: int, run: Run) -> Run:
        """An evaluation every `every` steps and at the end (0: only then), whose time counts from now on."""
        key = next(self._keys)
        self._every[key] = every

        def timed_run(step: int, params: Any) -> list[tuple[str, Any]]:
            began = self.now()
            values = list(run(step, params))
            took = self.now() - began
            self._cost[key] = took if key in self._cost else AGAIN * took
            self._evaluating += took
            return values

        return timed_run

    def _closes(self, steps: int) -> int:
        """The step from which on `steps` must stay."""
        return int(max(1 - self.schedule.decay_ratio, OPEN) * steps)

    def _decide(self, step: int) -> None:
        if step - self._first >= WARM:
            self._marks.append((step, self.now() - self._evaluating))
        found = on_process_zero(lambda: self._estimate(step))
        if found is not None:
            self._known = True
            self.steps = max(found, step + 1)
            self.on_change(self.steps)
        closes = self._closes(self.steps)
        self._fixed = self._known and step >= max(closes, self._first + WARM + FEW)
        # Ever more often as the end of the constant rates comes closer, and not rarely before the pace is certain.
        wait = (closes - step) // 8 if self._known else 1
        self._next = step + max(1, min(wait, (step - self._first) // 2))

    def _estimate(self, step: int) -> int | None:
        """The number of steps; None while nothing is known and there is time left."""
        left = self.seconds_left() - self._at_end()
        if left <= 0:
            return step + 1
        if len(self._marks) < 2:
            return None
        # Of the last half, or more: the host is up to a step ahead of the devices, so few steps tell little.
        latest = min((self._first + WARM + step) / 2, step - WINDOW)
        before, then = next((m for m in reversed(self._marks[:-1]) if m[0] <= latest), self._marks[0])
        pace = (self._marks[-1][1] - then) / (step - before)
        for key, every in self._every.items():
            if every and (cost := self._cost.get(key)):
                pace += cost / every
                left -= cost * (step % every / every - 0.5)  # the next one is closer the longer the last one is ago
        steps = step + int(max(0.0, min(left / max(pace, 1e-9), 1e9)))
        return steps if self.most is None else min(steps, self.most)

    def _at_end(self) -> float:
        """The seconds of the evaluations after the last step; one that is not known is taken for as long as another."""
        longest = max(self._cost.values(), default=0.0)
        return sum(self._cost.get(key, longest) for key in self._every)
