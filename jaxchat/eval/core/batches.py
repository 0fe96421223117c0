"""Prompts of all lengths in batches of one shape, in which no token that prompts of an item share comes twice.

A row of a batch is a page of a prompt: `PAGE` tokens. It attends to the pages before it and to itself, as its table
says (see `jaxchat/ops/pages.py`). The prompts of an item form a tree of pages: where they begin alike they share rows,
and each has rows of its own from the page on in which it differs from the others. All rows of an item are in one batch,
whatever else is in it. So there is one compiled program, nothing is sorted by length, and what is padded is the rest
of each last page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxchat.eval.core.prompts import Question
from jaxchat.ops.pages import PAGE

LONGEST = 128  # pages before the last of a prompt; a batch with a longer one has a shape of its own


class Arrays(NamedTuple):
    """A batch as the devices read it: the parts of all shards of the mesh, one below the other.

    Attributes:
      tokens: of each row.
      table: the rows that hold the pages up to each row, itself included; numbered within its shard.
      start: the position of each row's first token.
      count: how many tokens of each row are real.
      places: the tokens of the shard that predict a scored token, as row · PAGE + column.
      targets: the scored tokens.
      scored: how many of a shard's places are real.
    """

    tokens: Int[Array | np.ndarray, "R _"]
    table: Int[Array | np.ndarray, "R W"]
    start: Int[Array | np.ndarray, " R"]
    count: Int[Array | np.ndarray, " R"]
    places: Int[Array | np.ndarray, " S"]
    targets: Int[Array | np.ndarray, " S"]
    scored: Int[Array | np.ndarray, " shards"]


@dataclass(frozen=True)
class Layout:
    """The pages of a question.

    Attributes:
      pages: the tokens of each.
      paths: for each page the numbers of those before it, and its own.
      places: for each span, where the tokens stand that predict its targets, as page · PAGE + column.
      targets: the targets of all spans.
    """

    question: Question
    pages: tuple[Int[np.ndarray, " _"], ...]
    paths: tuple[tuple[int, ...], ...]
    places: Int[np.ndarray, " S"]
    targets: Int[np.ndarray, " S"]


def lay_out(question: Question) -> Layout:
    """The tree of a question's pages."""
    pages: list[np.ndarray] = []
    paths: list[tuple[int, ...]] = []
    children: dict[int, list[int]] = {}
    ends: dict[int, tuple[int, ...]] = {}
    # The longest first: a prompt that ends within a page of another one needs no page of its own for its end.
    for number in sorted(range(len(question.inputs)), key=lambda i: -len(question.inputs[i])):
        tokens, path = question.inputs[number], ()
        for first in range(0, len(tokens), PAGE):
            page = tokens[first : first + PAGE]
            siblings = children.setdefault(path[-1] if path else -1, [])
            found = next((other for other in siblings if _begins(pages[other], page)), None)
            if found is None:
                found = len(pages)
                pages.append(page)
                paths.append((*path, found))
                siblings.append(found)
            path = paths[found]
        ends[number] = path
    places = [_places(span.start, len(span.targets), ends[span.row]) for span in question.spans]
    return Layout(
        question,
        tuple(pages),
        tuple(paths),
        np.concatenate(places),
        np.concatenate([span.targets for span in question.spans]),
    )


def _begins(page: np.ndarray, other: np.ndarray) -> bool:
    return len(page) >= len(other) and bool((page[: len(other)] == other).all())


def _places(start: int, count: int, path: tuple[int, ...]) -> np.ndarray:
    positions = np.arange(start - 1, start - 1 + count)
    return np.asarray(path, np.int32)[positions // PAGE] * PAGE + positions % PAGE if count else np.zeros(0, np.int32)


@dataclass
class Part:
    """What one shard gets of a batch."""

    layouts: list[Layout] = field(default_factory=list)
    rows: int = 0
    scored: int = 0

    def fits(self, layout: Layout, rows: int) -> bool:
        more_rows, more_scored = self.rows + len(layout.pages), self.scored + len(layout.targets)
        return not self.layouts or (more_rows <= rows and more_scored <= rows * PAGE)

    def add(self, layout: Layout) -> None:
        self.layouts.append(layout)
        self.rows += len(layout.pages)
        self.scored += len(layout.targets)


@dataclass(frozen=True)
class Batch:
    """The arrays of a batch, and what is in it."""

    arrays: Arrays
    parts: tuple[Part, ...]


def batches_of(layouts: Iterable[Layout], rows: int, shards: int) -> Iterator[Batch]:
    """Fills batches of `rows` rows a shard; a question that needs more gets a batch with as many as it needs."""
    done: list[Part] = []
    part = Part()
    for layout in layouts:
        if not part.fits(layout, rows):
            done.append(part)
            part = Part()
            if len(done) == shards:
                yield _batch(done, rows, shards)
                done = []
        part.add(layout)
    if part.layouts:
        yield _batch([*done, part], rows, shards)


def _batch(parts: Sequence[Part], rows: int, shards: int) -> Batch:
    parts = [*parts, *(Part() for _ in range(shards - len(parts)))]
    needed = max(max(part.rows, -(-part.scored // PAGE)) for part in parts)
    rows = rows if needed <= rows else _power_of_two(needed)
    longest = max(len(path) for part in parts for layout in part.layouts for path in layout.paths or ((),))
    width = max(LONGEST, _power_of_two(longest))
    pieces = [_arrays(part, rows, width) for part in parts]
    return Batch(Arrays(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))), tuple(parts))


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _arrays(part: Part, rows: int, width: int) -> Arrays:
    tokens, table = np.zeros((rows, PAGE), np.int32), np.zeros((rows, width), np.int32)
    start, count = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    places, targets = np.zeros(rows * PAGE, np.int32), np.zeros(rows * PAGE, np.int32)
    row = scored = 0
    for layout in part.layouts:
        places[scored : scored + len(layout.places)] = layout.places + row * PAGE
        targets[scored : scored + len(layout.targets)] = layout.targets
        scored += len(layout.targets)
        first = row
        for page, path in zip(layout.pages, layout.paths, strict=True):
            tokens[row, : len(page)] = page
            table[row, : len(path)] = path
            table[row, : len(path)] += first
            start[row], count[row] = (len(path) - 1) * PAGE, len(page)
            row += 1
    return Arrays(tokens, table, start, count, places, targets, np.array([scored], np.int32))
