"""Which rows read their prompts and which decode, turn by turn. Plain Python, without JAX.

A row is a request that is being worked on. It reads its tokens (of its prompt, or of a prompt's end after what is
cached, or of a tool's answer) in chunks, and draws the next token from the state that reading has left: it begins. From
there it decodes: its newest token is never in the cache, decoding puts it there, and draws the next one. Samples of one
prompt begin with the state that the first of them has left.

Requests are taken in order, as soon as there is a place for a row and pages for the prompt and the longest answer: a
row that runs always runs to its end. The decisions depend on the requests and on what the rows wrote, never on time, so
that several processes decide alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxchat.infer.pages import Match, PagePool

FEW = 4  # rows that may wait for the first token of one
WAITS = 4  # turns in a row that they may


@dataclass(eq=False)
class Row:
    """A request at work.

    Attributes:
      tokens: the prompt and, as far as the host knows it, the answer.
      prompt: how many of them are the prompt's.
      limit: the most tokens of the answer.
      scored: whether the prompt's log-probabilities are wanted, so that all of it must be read.
      pauses: whether a tool may interrupt the answer.
      owner: whatever the engine knows about the request.
      shard, slot: where the row lives: among the rows of this shard of the devices.
      pages: of the shard, for the prompt and the longest answer.
      cached: how many tokens have their keys and values in the pages, once the work planned so far is done.
      source: the slot of the row, of the same shard, whose state after its last token this one begins with.
      ahead: tokens that were planned and are not known yet.
      paused: a tool is at work for the row.
      epoch: how often what is cached had been forgotten when the row got its place. A row from before the last time has
        keys and values of other parameters, which nobody shares.
    """

    tokens: list[int]
    prompt: int
    limit: int
    scored: bool = False
    pauses: bool = False
    owner: Any = None
    shard: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    source: int = -1
    ahead: int = 0
    paused: bool = False
    epoch: int = 0

    @property
    def written(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.tokens) - self.prompt


class Chunk(NamedTuple):
    """Tokens of a row that are read together: `count` from `start` on."""

    row: Row
    start: int
    count: int


class Copy(NamedTuple):
    """A page that is copied within a shard."""

    shard: int
    source: int
    target: int


class Plan(NamedTuple):
    """A turn's work, in the order in which the devices do it.

    Attributes:
      chunks: of prompts, to be read at once; several of a row follow each other.
      scored: whether log-probabilities are wanted of them.
      copies: of pages, afterwards.
      joined: rows that have got their place in this turn.
      begun: for each shard, the rows that draw a token from what was read.
      lanes: for each shard, the rows that decode.
    """

    chunks: list[Chunk]
    scored: bool
    copies: list[Copy]
    joined: list[Row]
    begun: list[list[Row]]
    lanes: list[list[Row]]


@dataclass(frozen=True)
class Budget:
    """How much of the prompts is read in a turn, by each shard.

    Attributes:
      chunk: the most tokens of a chunk.
      idle: the most chunks while no row decodes.
      busy: the most chunks while rows decode, which wait for them.
      scored: the most chunks whose log-probabilities are wanted.
      sizes: numbers of chunks that programs read, up to the most; fewer chunks are padded to the next one.
    """

    chunk: int
    idle: int
    busy: int
    scored: int
    sizes: tuple[int, ...]


class _Place(NamedTuple):
    """Where a row can be.

    Attributes:
      match: what is cached there of its prompt.
      source: the slot whose state it can begin with; None if it has to read.
    """

    shard: int
    match: Match
    source: int | None


class Scheduler:
    """The rows at work and those that wait.

    Args:
      pools: the pages of each shard of the devices.
      slots: rows that each shard has room for.
      most_rows: that work at once, over all shards.
    """

    def __init__(self, pools: Sequence[PagePool], slots: int, budget: Budget, most_rows: int | None = None):
        self.pools, self.slots, self.budget = list(pools), slots, budget
        self.most_rows = len(self.pools) * slots if most_rows is None else most_rows
        self.waiting: deque[Row] = deque()
        self.reading: list[Row] = []
        self.decoding: list[Row] = []
        self.queries = self.hits = 0  # tokens of prompts, and those that were cached
        self._free = [list(range(slots - 1, -1, -1)) for _ in self.pools]
        self._begun: list[Row] = []  # in the turn that is planned
        self._read_last: list[tuple[list[int], int] | None] = [None] * len(self.pools)  # tokens, and slot of the state
        self._waited = 0  # turns
        self._epoch = 0  # how often what is cached was forgotten
        self._replaced: set[Row] = set()  # rows whose last tokens are planned, and whose place others have got

    @property
    def running(self) -> int:
        """Rows that have a place."""
        return sum(self.slots - len(free) for free in self._free)

    @property
    def usage(self) -> float:
        """The share of the pages that rows hold."""
        total = sum(pool.count for pool in self.pools)
        return 1 - sum(pool.available for pool in self.pools) / total

    def pages_for(self, row: Row) -> int:
        """The pages that a row needs: the last token of the longest answer is never cached."""
        return self.pools[0].pages_for(row.prompt + row.limit - 1)

    def add(self, row: Row) -> None:
        """Puts a row at the end of the queue."""
        self.waiting.append(row)

    def wrote(self, row: Row, token: int) -> None:
        """Adds a token that a row has decoded. All tokens before it are cached then."""
        row.tokens.append(token)
        row.cached = len(row.tokens) - 1

    def pause(self, row: Row) -> None:
        """The row decodes no more until `resume`."""
        row.paused = True
        self.decoding.remove(row)

    def resume(self, row: Row, answer: Sequence[int]) -> None:
        """The row reads its newest token and `answer`, and goes on from there."""
        row.paused = False
        row.tokens.extend(answer)
        self.reading.append(row)

    def leave(self, row: Row) -> None:
        """Takes a row out, finished or not: its place is free, and what it cached can be shared."""
        if row in self._replaced:
            self._replaced.remove(row)
            return
        if row.slot < 0:
            self.waiting.remove(row)
            return
        for rows in (self.reading, self.decoding):
            if row in rows:
                rows.remove(row)
        self._learn(row, row.tokens[: row.cached])
        self._clear(row)

    def _learn(self, row: Row, tokens: list[int]) -> None:
        """Notes that the row's pages have `tokens`, for others to share."""
        if row.epoch == self._epoch:
            self.pools[row.shard].learn(tokens, row.pages)

    def _clear(self, row: Row) -> None:
        """Frees the row's slot and pages."""
        self.pools[row.shard].release(row.pages)
        last = self._read_last[row.shard]
        if last is not None and last[1] == row.slot:  # the next row there may read in the same turn as another begins
            self._read_last[row.shard] = None
        self._free[row.shard].append(row.slot)
        row.pages = []

    def forget_cached(self) -> None:
        """Forgets all pages that no row holds, and shares none of the others: the parameters have changed."""
        self._epoch += 1
        self._read_last = [None] * len(self.pools)
        for pool in self.pools:
            pool.forget_all()

    def plan(self) -> Plan:
        """The next turn's work. What it reads and copies counts as cached from here on."""
        room = [self._chunks_at_once()] * len(self.pools)
        chunks: list[Chunk] = []
        copies: list[Copy] = []
        joined: list[Row] = []
        donors: list[tuple[PagePool, int]] = []
        copied: set[Row] = set()  # their pages are copied after this turn's chunks are read
        scored, idle = False, not self.decoding
        self._begun = []
        while True:
            for row in [row for row in self.reading if row not in copied]:
                if chunks and scored != row.scored:
                    break
                if not chunks:
                    scored = row.scored
                    if scored:
                        room = [min(left, self.budget.scored) for left in room]
                chunks.extend(self._read(row, room))
            if any(row not in copied for row in self.reading) or not self.waiting:
                break
            row = self.waiting[0]
            place = self._place(row)
            if place is None and self._replace_ending():
                place = self._place(row)
            # Rows that begin with what is read now join in the next turn: planning them takes as long as reading it.
            if place is None or (idle and chunks and place.source is not None):
                break
            copy = self._admit(row, place)
            joined.append(row)
            if copy is not None:
                copies.append(copy)
                copied.add(row)
                donors.append((self.pools[copy.shard], copy.source))
        for pool, page in donors:
            pool.release([page])
        return Plan(chunks, scored, copies, joined, self._by_shard(self._begun), self._by_shard(self._lanes()))

    def _lanes(self) -> list[Row]:
        """The rows that decode. While many begin, for a few turns none does, so that first tokens come soon."""
        begun, rows = len(self._begun), len(self.decoding)
        if begun and FEW * begun >= rows and self._waited < WAITS:
            self._waited += begun < rows
            return []
        self._waited = 0
        return [row for row in self.decoding if row.written + row.ahead < row.limit]

    def _replace_ending(self) -> bool:
        """Takes the places of the rows whose last tokens are planned; returns whether there were any.

        The devices work in order: the next rows write there after these have written, though nobody knows what yet.
        """
        busy = {(row.shard, slot) for row in self._begun for slot in (row.slot, row.source)}  # in this turn
        rows = [row for row in self.decoding if not row.pauses and (row.shard, row.slot) not in busy]
        ending = [row for row in rows if row.written + row.ahead >= row.limit]
        for row in ending:
            self.decoding.remove(row)
            self._replaced.add(row)
            self._clear(row)
        return bool(ending)

    def _by_shard(self, rows: Sequence[Row]) -> list[list[Row]]:
        lanes: list[list[Row]] = [[] for _ in self.pools]
        for row in rows:
            lanes[row.shard].append(row)
        return lanes

    def _chunks_at_once(self) -> int:
        return self.budget.busy if self.decoding else self.budget.idle

    def _read(self, row: Row, room: list[int]) -> list[Chunk]:
        """The chunks of a row that there is room for."""
        chunks, end = [], len(row.tokens)
        while row.cached < end and room[row.shard] > 0:
            chunk = Chunk(row, row.cached, min(self.budget.chunk, end - row.cached))
            chunks.append(chunk)
            row.cached += chunk.count
            room[row.shard] -= 1
        # The devices work in order: what reads these pages is planned later, and so is done later.
        tokens = row.tokens[: row.cached]
        self._learn(row, tokens)
        if row.cached == end:
            self.reading.remove(row)
            if row.epoch == self._epoch:
                self._read_last[row.shard] = tokens, row.slot
            self._begin(row, row.slot)
        return chunks

    def _begin(self, row: Row, source: int) -> None:
        """The row draws its next token in this turn, and decodes from then on."""
        row.source = source
        row.ahead += 1
        self._begun.append(row)
        self.decoding.append(row)

    def _place(self, row: Row) -> _Place | None:
        """A place in the shard with the fewest rows, of those with a slot and pages for one; None if there is none."""
        if self.running >= self.most_rows:
            return None
        need = self.pages_for(row)
        for shard in sorted(range(len(self.pools)), key=lambda shard: -len(self._free[shard])):
            pool = self.pools[shard]
            place = self._beside(row, shard)
            if place is None:
                # One token at least is read. If the prompt's log-probabilities are wanted, all of it is.
                place = _Place(shard, pool.match(() if row.scored else row.tokens[:-1]), None)
            if self._free[shard] and pool.fits(need, place.match.pages):
                return place
        return None

    def _beside(self, row: Row, shard: int) -> _Place | None:
        """The row's place in a shard that has read the same tokens last, and has them all in its cache."""
        last, pool = self._read_last[shard], self.pools[shard]
        if row.scored or last is None or last[0] != row.tokens:
            return None
        match = pool.match(last[0])  # which never changes
        whole = len(match.pages) * pool.size + match.common == len(row.tokens)
        return _Place(shard, match, last[1]) if whole else None

    def _admit(self, row: Row, place: _Place) -> Copy | None:
        """Gives a row its slot and its pages; the copy that begins its first page of its own, if that pays."""
        self.waiting.popleft()
        shard, match, source = place
        row.shard, row.slot, row.epoch, pool = shard, self._free[shard].pop(), self._epoch, self.pools[shard]
        pool.hold(match.pages)
        row.cached = len(match.pages) * pool.size
        donor = match.donor if source is not None or self._copy_pays(row, match) else None
        need = self.pages_for(row) - len(match.pages)
        if donor is not None:
            pool.hold([donor])
            if need > pool.available:  # the donor itself is needed
                pool.release([donor])
                donor = None
        own = pool.take(need)
        row.pages = match.pages + own
        self.queries += row.prompt
        if donor is not None:
            row.cached += match.common
        self.hits += row.cached
        if source is not None and row.cached == len(row.tokens):
            self._begin(row, source)
        else:
            self.reading.append(row)
        return None if donor is None else Copy(shard, donor, own[0])

    def _copy_pays(self, row: Row, match: Match) -> bool:
        """Whether there are fewer chunks to read after the donor's part of a page was copied."""
        left = len(row.tokens) - len(match.pages) * self.pools[0].size
        chunk = self.budget.chunk
        return match.donor is not None and math.ceil((left - match.common) / chunk) < math.ceil(left / chunk)
