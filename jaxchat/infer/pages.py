"""Which page of the KV cache belongs to whom, and which cached page holds which text. Plain Python, without JAX.

A page holds the keys and values of up to `size` consecutive tokens. They depend on the tokens before them as well, so a
page is known by the whole text up to its end: by the page before it, and its own tokens. Rows whose texts begin alike
share the full pages of this beginning. A page that is not full belongs to one row, and another copies it.

A page is free, or held by one or more rows, or cached: held by no row, but known, until its memory is needed. Of the
cached pages the one that was held longest ago goes first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

_ROOT = -1  # stands before the first page of every text
_SEARCHED = 64  # pages that are compared, of those that continue the same text


class Match(NamedTuple):
    """What is cached of the beginning of a text.

    Attributes:
      pages: the full pages, in order.
      donor: a page whose first `common` tokens go on from there; None if there is none.
    """

    pages: list[int]
    donor: int | None
    common: int


class _Known(NamedTuple):
    serial: int  # page numbers are used again, these are not
    before: int  # the serial of the page before it
    tokens: tuple[int, ...]


class PagePool:
    """The pages 0 … count - 1, of `size` tokens each."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one held longest ago first
        self._known: dict[int, _Known] = {}
        self._full: dict[tuple[int, tuple[int, ...]], int] = {}  # (page before, tokens) -> page; Python compares both
        self._after: dict[int, dict[int, None]] = {}  # serial -> pages that continue it, the newest last
        self._serials = itertools.count()
        self._last: tuple[Sequence[int], Match] | None = None  # of `match`, until what it found is no longer so

    @property
    def available(self) -> int:
        """Pages that no row holds."""
        return len(self._free) + len(self._cached)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int]) -> Match:
        """The cached pages of the longest beginning of `tokens`, which stay as they are. They are not held yet."""
        # Samples of one prompt ask one after the other. Comparing takes a tenth of the time of looking all pages up.
        if self._last is None or (self._last[0] is not tokens and self._last[0] != tokens):
            self._last = tokens, self._look_up(tokens)
        return self._last[1]

    def _look_up(self, tokens: Sequence[int]) -> Match:
        pages, before = [], _ROOT
        for start in range(0, len(tokens) - self.size + 1, self.size):
            page = self._full.get((before, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            pages.append(page)
            before = self._known[page].serial
        start = len(pages) * self.size
        return Match(pages, *self._longest(before, tuple(tokens[start : start + self.size])))

    def fits(self, count: int, shared: Sequence[int]) -> bool:
        """Whether a row can have `count` pages, those in `shared` among them, which are cached or held."""
        # Pages that other rows hold now take none of the available ones.
        return count <= self.available or count <= self.available + sum(self._holders[page] > 0 for page in shared)

    def hold(self, pages: Sequence[int]) -> None:
        """Adds a holder to each of these known or held pages."""
        for page in pages:
            if not self._holders[page]:
                del self._cached[page]
            self._holders[page] += 1

    def take(self, count: int) -> list[int]:
        """Takes `count` pages, at most `available`, for one holder; what was cached in them is forgotten."""
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Takes a holder from each of a text's pages. A page without one is cached if it is known, or else free."""
        # The last first: so a page is never older than those that continue it, and goes after them.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._known:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def learn(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Notes that `pages`, which are held, have the keys and values of `tokens`, from the beginning of a text."""
        before = _ROOT
        for page, start in zip(pages, range(0, len(tokens), self.size), strict=False):
            own = tuple(tokens[start : start + self.size])
            if len(own) == self.size:
                # Another row may have computed the same page meanwhile; then this one stays unknown.
                page = self._full.setdefault((before, own), page)
            elif self._longest(before, own)[1] == len(own):
                return
            known = self._known.get(page)
            if known is None or known.before != before or len(known.tokens) < len(own):
                if known is not None:
                    self._forget(page)
                self._last = None
                self._known[page] = known = _Known(next(self._serials), before, own)
                self._after.setdefault(before, {})[page] = None
            before = known.serial

    def forget_all(self) -> None:
        """Forgets what the pages hold; cached pages become free."""
        self._last = None
        self._free.extend(self._cached)
        self._cached.clear()
        self._known.clear()
        self._full.clear()
        self._after.clear()

    def _longest(self, before: int, tokens: tuple[int, ...]) -> tuple[int | None, int]:
        best, common = None, 0
        for page in itertools.islice(reversed(self._after.get(before, {})), _SEARCHED):
            known = self._known[page].tokens
            if known[: common + 1] != tokens[: common + 1]:
                continue
            best, common = page, _common(known, tokens)
            if common == len(tokens):
                break
        return best, common

    def _forget(self, page: int) -> None:
        if self._last is not None and (page in self._last[1].pages or page == self._last[1].donor):
            self._last = None
        known = self._known.pop(page)
        if len(known.tokens) == self.size:
            del self._full[known.before, known.tokens]
        siblings = self._after[known.before]
        del siblings[page]
        if not siblings:
            del self._after[known.before]


def _common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    if first[: len(second)] == second:
        return len(second)
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))
