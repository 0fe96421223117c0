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
    began, asked = now(), 0
    while True:
        ask(count)
        asked += count
        each = max(now() - began, 1e-6) / asked
        room = on_process_zero(lambda: [left() / each, ROUND * left() / each])  # noqa: B023 (called at once)
        more = min(most, int(room[1]), 8 * count)
        if more < 2 * count:
            return max(FEWEST, min(most, int((1 - SPARED) * room[0])))
        count = more
