"""How many questions of each task the evaluate stage asks if time decides: as many as there is time for.

All models are asked the same ones. How long they take is found by asking a few, then more, until enough is known.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxchat.devices.processes import on_process_zero

FEWEST = 8  # of a task; fewer tell nothing
ROUND = 0.15  # of the time that is left, that a round of questions may take which only measures
SPARED = 0.2  # of the time, for programs that more questions at once need, and for longer answers


def find_count(most: int, ask: Callable[[int], None], left: Callable[[], float], now: Callable[[], float]) -> int:
    """The number of questions of each task for which there is time; at least `FEWEST`, at most `most`.

    Args:
      ask: asks all models so many questions of each task.
      left: the seconds that are left for asking.
      now: the clock.
    """
    count = min(most, FEWEST)
    if count == most or on_process_zero(left) <= 0:
        return count
    ask(count)  # compiles programs
    rounds: list[tuple[int, float]] = []  # questions, seconds
    while True:
        began = now()
        ask(count)
        rounds.append((count, max(now() - began, 1e-6)))

        def room(part: float) -> int:
            fixed, each = _time_of(rounds)
            return int((part * left() - fixed) / each)

        found, more = on_process_zero(lambda: [room(1 - SPARED), room(ROUND)])  # noqa: B023 (called at once)
        more = min(most, more, 8 * count)
        if more < 2 * count:
            return max(FEWEST, min(most, found))
        count = more


def _time_of(rounds: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds that each round takes, and that each question takes besides, from the last two rounds."""
    count, seconds = rounds[-1]
    if len(rounds) == 1:
        return 0.0, seconds / count
    fewer, before = rounds[-2]
    each = max(seconds - before, 0.1 * seconds) / (count - fewer)
    return max(0.0, seconds - each * count), each
