"""The loaders: iterators of batches of text, of conversations, and of both, prepared by a thread ahead of the training.

A file becomes a batch in these steps, one module each:

    text/folder.py   which files: `listing` finds them, `names` and `forms` say what they are
    text/shards.py   which blocks of documents they contain
    text/reading.py  the documents of a block of JSON or parquet; `plain` has those of txt
    text/rows.py     documents to tokens, tokens to rows
    text/lanes.py    rows to batches

Conversations take a shorter way: tasks/ reads them, chat/packing.py renders them and packs them into rows. mixed.py
lays rows of text among them.

`get_state` returns a position as JSON (see `positions`), from which any number of processes can resume: it tells where
to continue, never how much was read, and knows nothing of devices. Together, any number of processes make the same
global batches, and each gets its share of the rows. All processes reach the end of finite data at the same call.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grain.python as grain
from grain.experimental import ThreadPrefetchDatasetIterator

from jaxchat.data.chat.packing import ChatBatches, ConversationPacker, RenderedConversations
from jaxchat.data.mixed import MixedBatches, text_places
from jaxchat.data.positions import Json
from jaxchat.data.shuffle import EpochOrder
from jaxchat.data.text.lanes import LaneBatches, place_in_epoch
from jaxchat.data.text.rows import BestFitRows, CutRows, TokenStream
from jaxchat.data.text.shards import Block, TextBlocks, TextFiles
from jaxchat.errors import check

PREFETCHED_BATCHES = 2
LANE_PATIENCE = 16  # epochs without text; a lane with few blocks may get only empty ones, and others in the next epoch

Packing = Literal["best-fit", "concat"]


def pretrain_batches(
    text: TextFiles,
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
    fingerprint: Json | None = None,
) -> grain.DatasetIterator:
    """Batches of documents, each beginning with `<|bos|>`.

    Args:
      text: the training or validation text, as `find_text` gives it.
      tokenizer: a `Tokenizer`.
      rows: rows of this process's batches; a global batch has `rows * process_count`.
      sequence_len: tokens of a row.
      seed: seed of the shuffle.
      shuffle: reads the blocks in a new random order each epoch; otherwise in the order of the files.
      repeat: starts again at the end of the text, without a gap. Otherwise the last batch is filled up with targets of
        -1, and every token has been a target once, except the first of the text, or with best fit the first of a row.
      packing: "concat" lays documents end to end and cuts them into rows (`CutRows`); "best-fit" is `BestFitRows`.
      mask_borders: never makes `<|bos|>` a target, so that nothing is predicted across the border of two documents.
      lanes: how many independent sequences of rows the text is dealt out to (see `lanes`); a process reads only the
        lanes that its rows come from. With more than one (only with `repeat`), epochs end a little earlier for some
        than for others.
      num_threads: the tokenizer's threads; None for its default.
      fingerprint: of the text (see `text.fingerprint`), which its state keeps, and compares with that of a state that
        is set; None for text that may still be downloading.

    Returns:
      A grain iterator of `{"inputs": int32[rows, sequence_len], "targets": int32[rows, sequence_len]}`, with targets of
      -1 where there is nothing to train on. Its state is a `TextPosition` with this process's lanes; `join_positions`
      puts those of several processes together.

    Raises:
      UserError: files that cannot be read (see `TextBlocks`), too little text for one row, a state of other text,
        lanes that do not divide the rows of a global batch or are more than the text's blocks.
      ValueError: several lanes of text that does not repeat; one would end before the other.
    """
    blocks = TextBlocks(text)
    count = blocks.known_count  # None while files are still being downloaded
    check(count != 0, f"{text.files[0]} has no documents")
    order = EpochOrder(blocks, seed if shuffle else None)
    name = f"{text.files[0]}" if len(text.files) == 1 else f"the text in {text.files[0].parent}"
    bos = tokenizer.bos_token_id
    global_rows = rows * process_count
    if lanes > 1 and not repeat:
        raise ValueError("several lanes need text that repeats")
    check(global_rows % lanes == 0, f"data.lanes {lanes} does not divide the {global_rows} rows of a batch")
    check(count is None or lanes <= count, f"data.lanes is {lanes}, but {name} has only {count} blocks")

    def open_lane(lane: int) -> BestFitRows | CutRows:
        def read_block(epoch: int, index: int) -> Block | None:
            place = place_in_epoch(seed, epoch, index, lane, lanes)
            # A shuffle must know all blocks; without one, blocks are read as their files arrive.
            exists = place < len(blocks) if shuffle else blocks.reaches(place)
            return blocks[order(epoch, place)] if exists else None

        stream = TokenStream(
            read_block,
            lambda: blocks.known_count,
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
            fingerprint=fingerprint,
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
    fingerprint: Json | None = None,
) -> grain.DatasetIterator:
    """Batches of whole conversations, shuffled again each epoch and packed into rows.

    Every process plans all rows and renders only the conversations of its own.

    Args:
      conversations: dicts with `messages`, a task, or the `RenderedConversations` of either for this `sequence_len`.
      epochs: ends after this many, the last batch filled up with rows whose targets are -1; None for never.
      fingerprint: of the conversations (see `chat.fingerprint`), which its state keeps, and compares with that of a
        state that is set.

    Returns:
      As `pretrain_batches`; targets are -1 where the mask is 0 and in the padding. Its state is a `ChatPosition`.

    Raises:
      UserError: no conversations, one that cannot be rendered, a state of other conversations.
    """
    rendered = _render(conversations, tokenizer, sequence_len)

    def open_iterator() -> grain.DatasetIterator:
        packer = _packer(rendered, seed, epochs)
        return ChatBatches(packer, rendered, rows, process_index, process_count, fingerprint)

    return iter(_Prefetched(open_iterator))


def mixed_batches(
    chats: grain.DatasetIterator,
    text: grain.DatasetIterator,
    *,
    text_rows: int,
    rows: int,
    process_index: int = 0,
    process_count: int = 1,
) -> MixedBatches:
    """Batches with rows of text among those of conversations, equally many in each.

    Args:
      chats, text: the global batches of `chat_batches` and of `pretrain_batches`, as one process alone gets them: they
        have `rows * process_count - text_rows` and `text_rows` rows.
      text_rows: rows of text in a global batch.
      rows: rows of this process's batches.

    Returns:
      As `chat_batches`; its state is the `ChatPosition` of `chats` with the position of `text`.
    """
    return MixedBatches(chats, text, text_places(text_rows, rows * process_count), rows, process_index)


def count_rows(
    conversations: Sequence[dict] | RenderedConversations, tokenizer: Any, *, sequence_len: int, seed: int
) -> int:
    """How many rows the first epoch of `chat_batches` fills, over all processes; later epochs differ by a few at most.

    Renders every conversation once. Give both functions the same `RenderedConversations` to share that work.
    """
    packer = _packer(_render(conversations, tokenizer, sequence_len), seed, epochs=1)
    return sum(1 for _ in iter(packer.next_row, None))


def _render(
    conversations: Sequence[dict] | RenderedConversations, tokenizer: Any, sequence_len: int
) -> RenderedConversations:
    if not isinstance(conversations, RenderedConversations):
        return RenderedConversations(conversations, tokenizer, sequence_len)
    if conversations.sequence_len != sequence_len or conversations.tokenizer is not tokenizer:
        raise ValueError("the conversations were rendered for another sequence length or with another tokenizer")
    return conversations


def _packer(rendered: RenderedConversations, seed: int, epochs: int | None) -> ConversationPacker:
    order = EpochOrder(rendered, seed)
    return ConversationPacker(order, len(rendered), rendered.length, rendered.sequence_len + 1, epochs)


# --- the thread that works ahead --------------------------------------------------------------------------------------


class _Prefetched(grain.IterDataset):
    """The batches of the iterators that `open_iterator` opens, prepared by a thread; setting `interrupted` ends the
    thread's wait for files."""

    def __init__(self, open_iterator: Callable[[], grain.DatasetIterator], interrupted: threading.Event | None = None):
        super().__init__()
        self._open_iterator = open_iterator
        self._interrupted = interrupted or threading.Event()

    def __iter__(self) -> grain.DatasetIterator:
        iterator = _PrefetchIterator(self._open_iterator(), self._interrupted)
        _open_iterators.add(iterator)
        return iterator


class _PrefetchIterator(ThreadPrefetchDatasetIterator):
    """Makes batches in a thread until the iterator is closed or dropped; the thread's exceptions come out of `next`."""

    def __init__(self, batches: grain.DatasetIterator, interrupted: threading.Event):
        self._interrupted = interrupted
        super().__init__(batches, PREFETCHED_BATCHES)

    def close(self) -> None:
        # `__del__` calls this once more when the interpreter exits, when grain's modules are already gone.
        if not self._closed:
            self._interrupted.set()  # otherwise the thread, which is joined, could be waiting for a file
            super().close()

    def set_state(self, state: dict[str, Any]) -> None:
        self._interrupted.set()
        super().set_state(state)
        self._interrupted.clear()


_open_iterators: weakref.WeakSet[_PrefetchIterator] = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    """Stops the threads before the interpreter exits: later, one inside the tokenizer could not return to Python."""
    for iterator in list(_open_iterators):
        iterator.close()
