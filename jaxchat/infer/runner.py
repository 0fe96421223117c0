"""The engine's cache and rows on the devices, and the calls of its programs.

Every program is compiled ahead of its first call, for a few sizes: rows that decode, and chunks that are read, are
rounded up. What was compiled is kept for the process, and depends on the shapes of the parameters alone, so that other
parameters, and other engines for the same model, compile nothing again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxchat.devices.mesh import put_whole
from jaxchat.infer import programs
from jaxchat.infer.programs import STOPS, Lanes, Setup
from jaxchat.infer.request import Sampling
from jaxchat.infer.sampling import seen_of
from jaxchat.infer.scheduler import Budget, Chunk, Copy, Row
from jaxchat.infer.settings import LEVELS, Level, Settings, serving, settings_of
from jaxchat.model.generation import reads_previous
from jaxchat.model.gpt import Params
from jaxchat.ops.pages import PAGE

STEPS = 8  # tokens that a row draws in a call, without the host
FIRST_RUNS = 3  # of a program, until XLA has made a CUDA graph of it

_compiled: dict[Hashable, Any] = {}
_signatures: dict[Hashable, int] = {}
_lock = threading.Lock()


def signature_of(params: Params) -> int:
    """A number that stands for the shapes, dtypes and places of parameters."""
    leaves, tree = jax.tree.flatten(params)
    described = (tree, tuple((leaf.shape, leaf.dtype.name, leaf.sharding) for leaf in leaves))
    return _signatures.setdefault(described, len(_signatures))


def compilations() -> int:
    """How many programs this process has compiled for generation."""
    return len(_compiled)


class Runner:
    """Pages and rows, as many for each shard of the devices.

    Args:
      params: any with the shapes of those that will run.
      pages: of each shard.
      slots: rows of each shard.
      cache_dtype: of keys and values in the pages.
      budget: decides the sizes of `read`.
    """

    def __init__(self, setup: Setup, params: Params, *, pages: int, slots: int, cache_dtype: Any, budget: Budget):
        self.setup, self.slots, self.budget = setup, slots, budget
        self.page_count, self.cache_dtype = pages, jnp.dtype(cache_dtype)
        self.use(params)
        self.table_width = -(-setup.config.sequence_len // PAGE)
        self.reads_previous = reads_previous(setup.config)
        self.pages, self.carried, self.states = programs.new_cache(setup, pages, slots, self.cache_dtype)
        self.seen: Array | None = None
        self.warm = False
        self.on_cpu = next(iter(self.carried.token.devices())).platform == "cpu"
        self.copies = 8 if self.on_cpu else 64  # pages that are copied in a call
        rows = slots * setup.shards
        self._limit, self._pause = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._stops = np.zeros((rows, STOPS), np.int32)
        self._table = np.zeros((rows, self.table_width), np.int32)
        self._settings: Settings = jax.tree.map(
            lambda values: np.repeat(values, rows, axis=0), settings_of([Sampling()])
        )
        self._joined = np.zeros(rows, np.int64)  # tells apart the rows that a slot has had
        self._last: tuple[Hashable, Array] | None = None

    def use(self, params: Params) -> None:
        """Takes other parameters for all that follows."""
        self.params, self.weights = params, programs.weights_of(self.setup, params)
        self.signature = (
            self.setup,
            self.budget,
            signature_of(params),
            self.page_count,
            self.slots,
            self.cache_dtype.name,
        )

    def join(self, row: Row, stops: Sequence[int], pause: int) -> None:
        """Notes what a row that got its place is to do."""
        at = self._index(row)
        self._limit[at], self._pause[at] = row.limit, pause
        self._stops[at] = [*stops[:STOPS], *[-1] * (STOPS - len(stops))]
        self._table[at, : len(row.pages)] = row.pages
        self._joined[at] += 1

    def set_sampling(self, rows: Sequence[Row], samplings: Sequence[Sampling]) -> None:
        """Notes how rows that got their place are to draw."""
        at = [self._index(row) for row in rows]
        for values, new in zip(self._settings, settings_of(samplings), strict=True):
            values[at] = new

    def set_seen(self, row: Row) -> None:
        """Writes the ids that the prompt and the answer of a row have."""
        size = self.setup.config.padded_vocab_size
        values = seen_of(row.tokens[: row.prompt], row.tokens[row.prompt :], size)
        args = self._all_seen(), np.int32(self._index(row)), values
        self.seen = self._program(programs.set_seen, (), args)(*args)

    def begin(self, lanes: Sequence[Sequence[Row]], level: Level) -> Array:
        """Draws the token after what rows of each shard have read; returns [1, lanes, ...], still being computed."""
        level, size = self._choose(programs.begin, (), level, max(map(len, lanes)))
        args = self._begin_args(level, self._begin_lanes(lanes, size, level))
        self.carried, seen, written = self._program(programs.begin, (level,), args, size)(*args)
        self.seen = self.seen if seen is None else seen
        written.copy_to_host_async()
        return written

    def decode(self, lanes: Sequence[Sequence[Row]], level: Level) -> Array:
        """Draws up to `STEPS` tokens for the rows of each shard; returns [STEPS, lanes, ...], still being computed."""
        level, size = self._choose(programs.decode, (STEPS,), level, max(map(len, lanes)))
        args = self._decode_args(level, self._lanes(lanes, size, level))
        self.pages, self.carried, seen, written = self._program(programs.decode, (level, STEPS), args, size)(*args)
        self.seen = self.seen if seen is None else seen
        for row in (row for rows in lanes for row in rows):
            row.ahead += STEPS
        written.copy_to_host_async()
        return written

    def lane_rows(self, lanes: Sequence[Sequence[Row]], written: np.ndarray) -> list[tuple[Row, np.ndarray]]:
        """Each row with what `begin` or `decode` has written for it: [steps, 1 or more]."""
        written = written if written.ndim == 3 else written[:, :, None]
        size = written.shape[1] // self.setup.shards
        return [(row, written[:, shard * size + i]) for shard, rows in enumerate(lanes) for i, row in enumerate(rows)]

    def read(self, chunks: Sequence[Chunk], scored: bool) -> Array | None:
        """Reads chunks; if `scored`, returns [N, Q, ...] for `chunk_rows`."""
        args, size = self._read_args(chunks, scored)
        self.pages, self.states, scores = self._program(programs.read, (scored,), args, size)(*args)
        if scores is not None:
            scores.copy_to_host_async()
        return scores

    def chunk_rows(self, chunks: Sequence[Chunk], scores: np.ndarray) -> list[tuple[Chunk, np.ndarray]]:
        """Each chunk with the scores of the prompt's tokens that follow its own."""
        places = self._chunk_places(chunks, len(scores) // self.setup.shards)
        return [
            (chunk, scores[at, : max(0, min(chunk.count, chunk.row.prompt - 1 - chunk.start))])
            for chunk, at in zip(chunks, places, strict=True)
        ]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies pages."""
        of_shard = [[copy for copy in copies if copy.shard == shard] for shard in range(self.setup.shards)]
        for start in range(0, max(map(len, of_shard)), self.copies):
            args = self._copy_args([own[start : start + self.copies] for own in of_shard])
            self.pages = self._program(programs.copy_pages, (), args)(*args)

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compiles what serves every row; `progress` gets how many programs are done, and how many there are.

        On a CPU one level serves all, and every other size is left out: compiling takes longer there than they save.
        """
        work: list[tuple[Callable, tuple, Callable[[], tuple], int]] = []
        nobody: list[list[Any]] = [[] for _ in range(self.setup.shards)]
        sizes, levels = self._row_sizes(), LEVELS
        if self.on_cpu:
            sizes, levels = sorted({*sizes[::2], sizes[-1]}), LEVELS[-1:]
        for level in levels:
            for size in self._begin_sizes():
                args = partial(self._begin_args, level, self._begin_lanes(nobody, size, level))
                work.append((programs.begin, (level,), args, size))
            for size in sizes:
                args = partial(self._decode_args, level, self._lanes(nobody, size, level))
                work.append((programs.decode, (level, STEPS), args, size))
        for scored, count in [(True, self.budget.scored), *((False, size) for size in self.budget.sizes)]:
            args = partial(self._read_args, [], scored, count)
            work.append((programs.read, (scored,), lambda args=args: args()[0], args()[1]))
        work.append((programs.copy_pages, (), partial(self._copy_args, nobody), 0))
        one = self._all_seen(), np.int32(0), np.zeros(self.setup.config.padded_vocab_size, np.int32)
        self._program(programs.set_seen, (), one)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            done = [threads.submit(self._program, *item[:2], item[2](), item[3]) for item in work]
            for i, future in enumerate(done):
                if progress is not None:
                    progress(i, len(work))
                future.result()
        for function, static, args, size in work * FIRST_RUNS:
            self._idle_run(function, self._program(function, static, args(), size), args())
        if progress is not None:
            progress(len(work), len(work))
        self.warm = True

    def _idle_run(self, function: Callable, program: Any, args: tuple) -> None:
        """Runs a program for no row, which changes nothing."""
        if function is programs.decode:
            self.pages, self.carried, seen, _ = program(*args)
            self.seen = self.seen if seen is None else seen
        elif function is programs.begin:
            self.carried, seen, _ = program(*args)
            self.seen = self.seen if seen is None else seen
        elif function is programs.read:
            self.pages, self.states, _ = program(*args)
        else:
            self.pages = program(*args)

    # --- sizes and programs -------------------------------------------------------------------------------------------

    def _program(self, function: Callable, static: tuple, args: tuple, size: int = 0) -> Any:
        key = self._key(function, static, size)
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = function.lower(self.setup, *static, *args).compile()  # pyright: ignore[reportFunctionMemberAccess]
            with _lock:
                compiled = _compiled.setdefault(key, compiled)
        return compiled

    def _key(self, function: Callable, static: tuple, size: int) -> Hashable:
        return function.__name__, static, size, self.signature

    def _known(self, function: Callable, static: tuple, size: int) -> bool:
        return self._key(function, static, size) in _compiled

    def _choose(self, function: Callable, static: tuple, level: Level, rows: int) -> tuple[Level, int]:
        """The level and size for rows that draw tokens: what is compiled, if it serves."""
        if self.on_cpu and level == "greedy":
            level = "plain"  # one program for both: compiling another takes longer there than it saves
        sizes = self._begin_sizes() if function is programs.begin else self._row_sizes()
        sizes = [size for size in sizes if size >= rows]
        for other in serving(level) if self.warm else (level,):
            for size in sizes:
                if self._known(function, (other, *static), size):
                    return other, size
        return level, sizes[0]

    def _begin_sizes(self) -> list[int]:
        """Numbers of lanes of `begin`: empty ones cost little."""
        sizes = self._row_sizes()
        return sorted({sizes[0], sizes[-1]})

    def _row_sizes(self) -> list[int]:
        """Numbers of lanes. A GPU has 1 or multiples of 8: its tensor cores multiply 8 rows at once."""
        powers = [1 << i for i in range((self.slots - 1).bit_length())]
        if self.on_cpu or self.slots == 1:
            return [*powers, self.slots]
        return [size for size in powers if size not in (2, 4)] + [-(-self.slots // 8) * 8]

    # --- arrays for the devices ---------------------------------------------------------------------------------------

    def _put(self, tree: Any) -> Any:
        mesh = self.setup.mesh
        return jax.device_put(tree) if mesh is None else jax.tree.map(lambda array: put_whole(mesh, array), tree)

    def _index(self, row: Row) -> int:
        return row.shard * self.slots + row.slot

    def _all_seen(self) -> Array:
        if self.seen is None:
            shape = (self.slots * self.setup.shards, self.setup.config.padded_vocab_size)
            self.seen = jnp.zeros(shape, jnp.int32, device=self.setup.sharding())
        return self.seen

    def _decode_args(self, level: Level, lanes: Array) -> tuple:
        return self.weights, self.pages, self.carried, self._all_seen() if level == "full" else None, lanes

    def _begin_args(self, level: Level, lanes: Array) -> tuple:
        seen = self._all_seen() if level == "full" else None
        return {"head": self.params["head"]}, self.carried, seen, self.states, lanes

    def _begin_lanes(self, lanes: Sequence[Sequence[Row]], size: int, level: Level) -> Array:
        at, given = self._slots_of(lanes, size), np.zeros((4, len(lanes) * size), np.int32)
        for shard, rows in enumerate(lanes):
            given[:, shard * size : shard * size + len(rows)] = [
                [row.source for row in rows],
                [len(row.tokens) - 1 for row in rows],
                [row.written for row in rows],
                [row.tokens[-1] for row in rows],
            ]
        return self._put(programs.packed(self._given(at, level, given, self._table[at, :0])))

    def _lanes(self, lanes: Sequence[Sequence[Row]], size: int, level: Level) -> Array:
        at = self._slots_of(lanes, size)
        key = (level, at.tobytes(), self._joined[at].tobytes())
        if self._last is None or self._last[0] != key:
            nothing = np.zeros((4, len(at)), np.int32)
            self._last = key, self._put(programs.packed(self._given(at, level, nothing, self._table[at])))
        return self._last[1]

    def _slots_of(self, lanes: Sequence[Sequence[Row]], size: int) -> np.ndarray:
        """The lanes' rows, over all shards; -1 where there is none."""
        at = np.full((len(lanes), size), -1)
        for shard, rows in enumerate(lanes):
            at[shard, : len(rows)] = [self._index(row) for row in rows]
        return at.reshape(-1)

    def _given(self, at: np.ndarray, level: Level, given: np.ndarray, table: np.ndarray) -> Lanes:
        """The lanes of the rows `at`; `given` are the fields that only `begin` reads."""
        source, position, count, last = given
        settings = programs.without_biases(self._settings, level)
        return Lanes(
            slot=np.where(at < 0, self.slots, at % self.slots).astype(np.int32),
            source=source,
            position=position,
            count=count,
            last=last if self.reads_previous else None,
            limit=self._limit[at],
            pause=self._pause[at],
            stops=self._stops[at],
            table=table,
            settings=jax.tree.map(lambda values: values[at], settings),
        )

    def _chunk_places(self, chunks: Sequence[Chunk], size: int) -> list[int]:
        """Which of the program's rows each chunk is in: `size` of them for each shard."""
        used, places = [0] * self.setup.shards, []
        for chunk in chunks:
            places.append(chunk.row.shard * size + used[chunk.row.shard])
            used[chunk.row.shard] += 1
        return places

    def _read_args(self, chunks: Sequence[Chunk], scored: bool, size: int | None = None) -> tuple[tuple, int]:
        if size is None:
            count = np.bincount([chunk.row.shard for chunk in chunks]).max()
            enough = [size for size in self.budget.sizes if size >= count]
            near = [size for size in enough[:2] if self._known(programs.read, (scored,), size)]
            size = self.budget.scored if scored else (near or enough)[0]
        rows, length = size * self.setup.shards, self.budget.chunk
        # As `programs.read` has it: table, start, count, slot, the token before if the model reads it, tokens and, if
        # scored, the tokens that follow.
        width, first = self.table_width, self.table_width + 3 + self.reads_previous
        packed = np.zeros((rows, first + (2 if scored else 1) * length), np.int32)
        packed[:, width + 2] = self.slots
        tokens, following = packed[:, first:], packed[:, first + length :]
        for at, (row, start, count) in zip(self._chunk_places(chunks, size), chunks, strict=True):
            end = start + count
            tokens[at, :count] = row.tokens[start:end]
            if scored:
                after = row.tokens[start + 1 : end + 1]
                following[at, : len(after)] = after
            packed[at, :width] = self._table[self._index(row)]
            packed[at, width : width + 3] = start, count, row.slot if end == len(row.tokens) else self.slots
            if self.reads_previous:
                packed[at, width + 3] = row.tokens[start - 1] if start else -1
        return (self.params, self.pages, self.states, self._put(packed)), size

    def _copy_args(self, copies: Sequence[Sequence[Copy]]) -> tuple:
        source = np.zeros((len(copies), self.copies), np.int32)
        target = np.full((len(copies), self.copies), self.page_count, np.int32)
        for shard, own in enumerate(copies):
            for i, copy in enumerate(own):
                source[shard, i], target[shard, i] = copy.source, copy.target
        return (self.pages, *self._put((source.reshape(-1), target.reshape(-1))))
