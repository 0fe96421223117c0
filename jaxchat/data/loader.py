"""Endless or finite iterators of batches, prefetched by a thread, resumable from a small state.

A state is JSON: where reading goes on, never how much was read. It knows nothing of devices or processes: any number
of processes gives the same global batches, of which each takes its share of the rows. Of text it reads the lanes that
these are of (see `lanes`), which is all of it where there is one; of conversations all processes plan all rows, and
each renders its own. So all of them end at the same call.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grain.python as grain
import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator

from jaxchat.data.text.bestfit import BestFitRows
from jaxchat.data.text.lanes import Batch, LaneBatches, place_in_epoch
from jaxchat.data.text.packing import BestFitPacker, CutRows, RenderedConversations, TokenStream, pack_conversations
from jaxchat.data.text.shards import Block, TextBlocks, TextSide
from jaxchat.errors import check

PREFETCHED_BATCHES = 2
LANE_PATIENCE = 16  # epochs without text: a lane's few blocks may be empty, and it gets others in the next epoch

Packing = Literal["best-fit", "concat"]


def pretrain_batches(
    side: TextSide,
    tokenizer: Any,
    *,
    rows: int,
    sequence_len: int,
    seed: int,
    shuffle: bool = False,
    repeat: bool = True,
    packing: Packing = "concat",
    mask_borders: bool = False,
    lanes: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> grain.DatasetIterator:
    """Batches of documents that begin with `<|bos|>`.

    Args:
      side: the text, as `find_text` gives it.
      tokenizer: a `Tokenizer`.
      rows: rows that this process gets at each call; a global batch has `rows * process_count`.
      sequence_len: tokens of a row.
      seed: of the shuffle.
      shuffle: reads the blocks of each epoch in an order of its own; otherwise they come in the order of the files.
      repeat: starts again at the end of the text, without a seam. Otherwise the last batch is filled up with targets
        of -1, and every token has been a target once, but for those that begin a row of best fit, or the text.
      packing: "concat" lays documents end to end and cuts them to rows, "best-fit" is `BestFitRows`.
      mask_borders: `<|bos|>` is no target, and so nothing is predicted across the border of two documents.
      lanes: how many sequences of rows the text is dealt out to, of which a process reads those that it has rows of;
        with more than one (only where it repeats), epochs end a little earlier for some than for others.
      num_threads: the tokenizer's; None for its default.

    Returns:
      A grain iterator of `{"inputs": int32[rows, sequence_len], "targets": int32[rows, sequence_len]}`, targets -1
      where there is nothing to train on. `get_state()` has the keys of, the number of lanes, and lanes: of each that
      this process reads, by its number, epoch, block, document, token, blocks (in the text; None while files are on
      their way), left_out (how much of the first epoch was bad, by kind, see `Findings`), packed (`rows` and `targets`
      so far; with best fit to the end of a lane's window, and more), and row with best fit. `joined` puts those of
      several processes together.

    Raises:
      UserError: files that cannot be read (see `TextBlocks`), too little text for one row, a state of other text,
        lanes that do not divide the rows of a global batch, or are more than the text's blocks.
      ValueError: several lanes of text that ends, which they would do one after the other.
    """
    blocks = TextBlocks(side)
    count = blocks.count  # None as long as files are on their way
    check(count != 0, f"{side.files[0]} has no documents")
    order = _Epochs(blocks, seed if shuffle else None)
    name = f"{side.files[0]}" if len(side.files) == 1 else f"the text in {side.files[0].parent}"
    bos = tokenizer.bos_token_id
    rows_in_all = rows * process_count
    if lanes > 1 and not repeat:
        raise ValueError("several lanes need text that repeats")
    check(rows_in_all % lanes == 0, f"data.lanes {lanes} does not divide a batch's {rows_in_all} rows")
    check(count is None or lanes <= count, f"data.lanes is {lanes}, but {name} has {count} blocks only")

    def open_lane(lane: int) -> BestFitRows | CutRows:
        def documents(epoch: int, index: int) -> Block | None:
            place = place_in_epoch(seed, epoch, index, lane, lanes)
            # A shuffled order has to know all blocks; in their own order they are read as their files arrive.
            there = place < len(blocks) if shuffle else blocks.reaches(place)
            return order.at(epoch, place) if there else None

        stream = TokenStream(
            documents,
            lambda: blocks.count,
            tokenizer,
            epochs=None if repeat else 1,
            minimum=sequence_len + 1 if repeat and lanes == 1 else 2,
            patience=1 if lanes == 1 else LANE_PATIENCE,
            name=name,
            num_threads=num_threads,
        )
        if packing == "best-fit":
            return BestFitRows(stream, sequence_len + 1, bos, seed, lane, lanes)
        return CutRows(stream, sequence_len)

    def open_iterator() -> grain.DatasetIterator:
        return LaneBatches(
            open_lane,
            lanes,
            rows=rows,
            sequence_len=sequence_len,
            process_index=process_index,
            process_count=process_count,
            bos=bos,
            mask_borders=mask_borders,
        )

    return iter(_Prefetched(open_iterator, blocks.interrupted))


def chat_batches(
    conversations: Sequence[dict] | RenderedConversations,
    tokenizer: Any,
    *,
    rows: int,
    sequence_len: int,
    seed: int,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Batches of whole conversations, shuffled anew each epoch and packed into rows.

    Args:
      conversations: dicts with `messages`, a task, or what `RenderedConversations` made of them for this length.
      epochs: ends after so many, the last batch filled up with rows whose targets are -1; None for never.

    Returns:
      As `pretrain_batches`; targets are -1 where the mask is 0 and in the padding. `get_state()` has the keys epoch,
      taken, waiting, conversations, packed (`rows` so far, and `targets` in them, trained on or not).

    Raises:
      UserError: no conversations, one that cannot be rendered, a state of other conversations.
    """
    rendered = _render(conversations, tokenizer, sequence_len)

    def open_iterator() -> grain.DatasetIterator:
        return _ChatIterator(_packer(rendered, seed, epochs), rendered, rows, process_index, process_count)

    return iter(_Prefetched(open_iterator))


def count_rows(
    conversations: Sequence[dict] | RenderedConversations, tokenizer: Any, *, sequence_len: int, seed: int
) -> int:
    """Rows that the first epoch of `chat_batches` fills, over all processes; later epochs differ by a few at most.

    Renders every conversation once; give both functions the same `RenderedConversations` to keep that work.
    """
    packer = _packer(_render(conversations, tokenizer, sequence_len), seed, epochs=1)
    return sum(1 for _ in iter(packer.next_row, None))


def _render(conversations: Sequence[dict] | RenderedConversations, tokenizer: Any, sequence_len: int):
    if not isinstance(conversations, RenderedConversations):
        return RenderedConversations(conversations, tokenizer, sequence_len)
    if conversations.sequence_len != sequence_len or conversations.tokenizer is not tokenizer:
        raise ValueError("the conversations were rendered for another sequence length or with another tokenizer")
    return conversations


def _packer(rendered: RenderedConversations, seed: int, epochs: int | None) -> BestFitPacker:
    return BestFitPacker(
        _Epochs(range(len(rendered)), seed), len(rendered), rendered.length, rendered.sequence_len + 1, epochs
    )


class _Epochs:
    """Items by position, epoch after epoch: in order, or with a seed in an order of each epoch's own.

    The order comes from the raw bits of Philox, which NumPy keeps the same for good, unlike its `permutation`. (grain's
    index shuffle costs 1 ms an item when there are few.)
    """

    def __init__(self, items: Sequence, seed: int | None):
        self._items = items
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __call__(self, position: int) -> Any:
        return self.at(*divmod(position, len(self._items)))

    def at(self, epoch: int, index: int) -> Any:
        if self._seed is not None:
            if epoch != self._epoch:
                bits = np.random.Philox(key=(self._seed, epoch)).random_raw(len(self._items))
                self._epoch, self._permutation = epoch, np.argsort(bits, kind="stable")
            index = int(self._permutation[index])
        return self._items[index]


class _ChatIterator(grain.DatasetIterator):
    def __init__(
        self, packer: BestFitPacker, rendered: RenderedConversations, rows: int, process_index: int, process_count: int
    ):
        super().__init__()
        self._packer = packer
        self._rendered = rendered
        self._rows = rows
        self._global_rows = rows * process_count
        self._first = process_index * rows
        self._packed = Counter(rows=0, targets=0)

    def __next__(self) -> Batch:
        plan = [row for _ in range(self._global_rows) if (row := self._packer.next_row()) is not None]
        if not plan:
            raise StopIteration
        tokens = sum(self._rendered.length(conversation) for row in plan for conversation in row)
        self._packed.update(rows=len(plan), targets=tokens - len(plan))
        mine = plan[self._first : self._first + self._rows]
        inputs, targets = pack_conversations(mine, self._rendered, self._rows)
        return {"inputs": inputs, "targets": targets}

    def get_state(self) -> dict[str, Any]:
        return {**self._packer.state, "packed": dict(self._packed)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._packer.state = state
        self._packed = Counter(state.get("packed", {}))


class _Prefetched(grain.IterDataset):
    """The batches of the iterators that `open_iterator` makes, with a thread that works ahead; `interrupted` ends its
    waiting."""

    def __init__(self, open_iterator: Callable[[], grain.DatasetIterator], interrupted: threading.Event | None = None):
        super().__init__()
        self._open_iterator = open_iterator
        self._interrupted = interrupted or threading.Event()

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PrefetchIterator(self._open_iterator(), self._interrupted)
        _open_iterators.add(iterator)
        return iterator


class _PrefetchIterator(ThreadPrefetchDatasetIterator):
    """A thread makes batches ahead until the iterator is closed or dropped; its exceptions come out of `next`."""

    def __init__(self, batches: grain.DatasetIterator, interrupted: threading.Event):
        self._interrupted = interrupted
        super().__init__(batches, PREFETCHED_BATCHES)

    def close(self) -> None:
        """Does nothing the second time: when `__del__` calls it at the interpreter's end, grain's modules are gone."""
        if not self._closed:
            self._interrupted.set()  # else the thread, which is waited for, would wait for a file on its way
            super().close()

    def set_state(self, state: dict[str, Any]) -> None:
        self._interrupted.set()
        super().set_state(state)
        self._interrupted.clear()


_open_iterators: weakref.WeakSet[_PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    """Stops the threads while the interpreter still runs: one inside the tokenizer could not return to it later."""
    for iterator in list(_open_iterators):
        iterator.close()
