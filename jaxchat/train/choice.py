"""Which way of computing a step is taken: how many rows a device computes at once, and what it recomputes.

Only the compiler knows what a step takes, and it needs up to a minute for each. Memory in use is about linear in the
rows, so the choice is predicted, compiled, and predicted again from what the compiler found. Nothing here is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_COMPILED = 6  # ways that are tried, at most, while one is looked for that is better than one that fits
ENOUGH = 8_192  # tokens at once that keep a device so busy that recomputing for more of them does not pay
# How much less than predicted a level may take that was not compiled at any number of rows.
ACROSS_LEVELS = 1.15


class Choice(NamedTuple):
    """A way of computing a step: the rows that a device computes at once, and the level of rematerialisation."""

    device_rows: int
    remat: str

    def __str__(self) -> str:
        return f"{self.device_rows} row{'s'[: self.device_rows != 1]}, remat {self.remat}"


def by_preference(rows: Iterable[int], length: int, levels: Sequence[str]) -> list[Choice]:
    """All choices, the best one first.

    Rows keep a device busy, and recomputing costs up to two ninths more matrix products. So as little as possible is
    recomputed, with as many rows as possible, among the choices that give a device `ENOUGH` tokens at once; where none
    of them fits, as many rows as possible come first.

    Args:
      length: of a row, in tokens.
      levels: of rematerialisation, from the least to the most.
    """

    def order(choice: Choice) -> tuple[int, int, int]:
        least = min(choice.device_rows, -(-ENOUGH // length))
        return -least, levels.index(choice.remat), -choice.device_rows

    return sorted((Choice(count, level) for count in rows for level in levels), key=order)


@dataclass(frozen=True)
class Expected:
    """What a step may be expected to take, in bytes per device, before one has been compiled.

    `fixed` does not depend on the rows; `per_row` is for each row of each level of rematerialisation.
    """

    fixed: float
    per_row: Mapping[str, float]

    def __call__(self, choice: Choice) -> float:
        return self.fixed + self.per_row[choice.remat] * choice.device_rows


def predict(choice: Choice, expected: Expected, measured: Mapping[Choice, float]) -> float:
    """The bytes per device that `choice` will take, by what others were found to take (infinite: too much).

    Along the line through the two nearest numbers of rows at the same level; with only one, what is expected is scaled
    to what was found.
    """
    known = {other: found for other, found in measured.items() if math.isfinite(found)}
    if choice in measured or not known:
        return measured.get(choice, expected(choice))

    def distance(other: Choice) -> tuple[bool, float]:
        return other.remat != choice.remat, abs(math.log(other.device_rows / choice.device_rows))

    nearest, *others = sorted(known, key=distance)
    second = next((other for other in others if other.remat == choice.remat == nearest.remat), None)
    if second is not None:
        slope = (known[nearest] - known[second]) / (nearest.device_rows - second.device_rows)
        return known[nearest] + slope * (choice.device_rows - nearest.device_rows)
    least = min(known.values())
    fixed = expected.fixed if expected.fixed < least else 0.9 * least
    factor = (known[nearest] - fixed) / (expected.per_row[nearest.remat] * nearest.device_rows)
    return fixed + factor * expected.per_row[choice.remat] * choice.device_rows


def choose(
    choices: Sequence[Choice],
    limit: float,
    measure: Callable[[Choice], float],
    expected: Expected,
    first: Choice | None = None,
) -> Choice | None:
    """The best choice that is found to take at most `limit` bytes per device; None if there is none.

    Args:
      choices: the best one first.
      measure: compiles a choice and returns its bytes per device; infinite where the compiler refuses it.
      first: is taken if it fits, even where a better one would fit too.
    """
    measured: dict[Choice, float] = {}

    def fits(choice: Choice) -> bool:
        found = measured.get(choice, math.inf)
        return math.isfinite(found) and found <= limit

    def may_fit(choice: Choice) -> bool:
        too_large = any(
            other.remat == choice.remat and other.device_rows <= choice.device_rows and not fits(other)
            for other in measured
        )
        known = not measured or any(other.remat == choice.remat for other in measured)
        uncertain = 1.0 if known else ACROSS_LEVELS
        return choice not in measured and not too_large and predict(choice, expected, measured) <= uncertain * limit

    if first is not None and first in choices:
        measured[first] = measure(first)
        if fits(first):
            return first
    while True:
        found = next((choice for choice in choices if fits(choice)), None)
        better = choices[: choices.index(found)] if found else choices
        guess = next(filter(may_fit, better), None)
        if guess is None and found is None:  # whatever is predicted: what takes least
            guess = min(choices, key=lambda choice: predict(choice, expected, measured))
        if guess is None or guess in measured or (found and len(measured) >= MOST_COMPILED):
            return found
        measured[guess] = measure(guess)
