"""Text folders: finding the files, splitting off the validation side, and reading them block by block."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from jaxchat.data.manifest import FILE_NAME, pinned_shard, recorded_shards
from jaxchat.data.text import reading
from jaxchat.data.text.reading import Findings, OnBad, Unreadable, open_parquet
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, is_folder, size_of, to_path

Format = Literal["parquet", "jsonl", "txt"]
SUFFIXES: dict[Format, tuple[str, ...]] = {"parquet": (".parquet",), "jsonl": (".jsonl", ".jsonl.gz"), "txt": (".txt",)}

LONG_TEXT_BYTES = 100_000  # a longer txt file is a book or a corpus rather than one document
_GET = "'jaxchat data get'"
NAMED = 20  # of what is left out, so many are named, the rest is only counted
HOLD_OUT = (50, 25, 12, 6, 3, 2)  # one file alone: one document in so many is for validation; the first that works


@dataclass(frozen=True)
class TextSide:
    """One side of a text folder.

    A folder of one file has no file to spare for validation: then both sides read it, the documents whose CRC-32 is a
    multiple of `hold_out` are for validation, and `held_out` says which of the two this side is.

    The files of a parquet side may still be on their way: then `wait` returns when the one it is given is there, and
    raises when the function it is given too says that nobody wants it any more.

    `on_bad` says what becomes of text that is damaged, and `tell` is told of each that is left out.
    """

    files: tuple[AnyPath, ...]
    format: Format
    hold_out: int | None = None
    held_out: bool = False
    wait: Callable[[AnyPath, Callable[[], bool]], None] | None = field(default=None, compare=False, repr=False)
    on_bad: OnBad = "refuse"
    tell: Callable[[str], None] = field(default=print, compare=False, repr=False)

    @property
    def complete(self) -> bool:
        """Whether all files are there."""
        return self.wait is None or all(path.is_file() for path in self.files)

    def keeps(self, text: str) -> bool:
        """Whether the document is on this side."""
        return self.hold_out is None or (zlib.crc32(text.encode()) % self.hold_out == 0) == self.held_out


@dataclass(frozen=True)
class TextSplit:
    train: TextSide
    val: TextSide


def find_text(
    data_dir: AnyPath | str,
    val_shard: str | None = None,
    *,
    on_bad: OnBad = "refuse",
    tell: Callable[[str], None] = print,
) -> TextSplit:
    """Finds the text of a folder, or of `pretrain/` inside it, and splits it.

    Files in order of their names; the last one is for validation, or the one that `val_shard` names (with or without
    its suffix), or the one that the folder's manifest pins, which is never trained on. If there is only one, about
    every 50th document is. Text files beside parquet or jsonl are taken for notes and left alone.

    Args:
      on_bad, tell: as `TextSide`.

    Raises:
      UserError: no such folder, no text in it, both parquet and jsonl, a parquet file without a column `text`, a
        `val_shard` or pinned shard that is not there, a single document, a damaged manifest; unless they are to be
        skipped, a parquet file that is none, and a shard of the manifest that is missing.
    """
    folder = to_path(data_dir)
    check(is_folder(folder) or folder.exists(), f"data folder {folder} does not exist")
    check(folder.is_dir(), f"{folder} is not a folder")
    folder = folder / "pretrain" if (folder / "pretrain").is_dir() else folder
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in paths if path.is_file()]
    found = {kind: tuple(path for path in files if path.name.endswith(ends)) for kind, ends in SUFFIXES.items()}
    names = [path.name for path in paths]
    there = f"; it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "; it is empty"
    check(any(found.values()), f"no text in {folder}{there}; put .parquet, .jsonl or .txt files there")
    both = f"{folder} holds parquet and jsonl files; keep one kind, or put each into a folder of its own"
    check(not (found["parquet"] and found["jsonl"]), both)
    kind = next(kind for kind in SUFFIXES if found[kind])
    files = found[kind]
    split = partial(TextSide, format=kind, on_bad=on_bad, tell=tell)
    pinned = pinned_shard(folder)
    if pinned is not None:
        check(pinned in files, f"{pinned}, the validation shard by {FILE_NAME}, is missing; {_GET} fetches it")
        files = tuple(sorted({*files, *recorded_shards(folder)}))
    if kind == "parquet":
        for path in files:
            _check_parquet(path, on_bad)
    if len(files) == 1:
        check(val_shard in (None, *_short_names(files[0])), _no_such_shard(val_shard, folder, files))
        check(pinned is None, f"{folder} holds no text for training beside {files[0].name}; {_GET} fetches more")
        return _hold_out(split(files))
    # The pinned shard is not trained on, even if another one is for validation.
    val = files[-1] if pinned is None else pinned
    if val_shard is not None:
        val = next((path for path in files if val_shard in _short_names(path)), None)
        check(val is not None, _no_such_shard(val_shard, folder, files))
    if kind == "parquet":
        _check_parquet(val, "refuse")
    train = tuple(path for path in files if path not in (val, pinned))
    check(bool(train), f"{folder} holds no text for training beside {val.name}; {_GET} fetches more")
    return TextSplit(split(train), split((val,)))


def _check_parquet(path: AnyPath, on_bad: OnBad) -> None:
    try:
        open_parquet(path)
    except Unreadable as error:
        fetches = f"; {_GET} fetches it" if error.kind == "missing_files" else ""
        check(on_bad == "skip", f"{error}{fetches}; --data.on-bad=skip leaves a file for training out")


def _short_names(path: AnyPath) -> tuple[str, str]:
    return path.name, path.name.split(".", 1)[0]


def _no_such_shard(val_shard: str | None, folder: AnyPath, files: tuple[AnyPath, ...]) -> str:
    return f"validation shard {val_shard!r} is not in {folder}{closest(str(val_shard), [path.name for path in files])}"


def _hold_out(side: TextSide) -> TextSplit:
    for modulus in HOLD_OUT:
        split = TextSplit(replace(side, hold_out=modulus), replace(side, hold_out=modulus, held_out=True))
        quiet = (replace(half, tell=lambda line: None) for half in (split.train, split.val))
        if all(next(iterate_texts(half), None) is not None for half in quiet):
            return split
    raise UserError(f"{side.files[0]} holds too few documents to keep one for validation; add a second file")


def iterate_texts(side: TextSide) -> Iterator[str]:
    """The documents of a side in order; one block is in memory at a time."""
    for block in TextBlocks(side):
        yield from block


def text_bytes(side: TextSide) -> int:
    """About how many bytes of text the files of a side hold, for saying how far a reader is. A gzip file counts four
    times, a file that is on its way as much as another."""
    there = [path for path in side.files if side.wait is None or path.is_file()]
    total = 0
    for path in there:
        if side.format == "parquet":
            try:
                metadata = open_parquet(path).metadata
            except Unreadable:
                continue  # it is told of when it is read
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            columns = (group.column(index) for group in groups for index in range(group.num_columns))
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        else:
            total += size_of(path) * (4 if path.suffix == ".gz" else 1)
    return total * len(side.files) // max(1, len(there))


# Where the documents are, in words, and what reads them.
_Reader = tuple[str, Callable[[Findings], list[str | None]]]


class Block(list[str]):
    """The documents of a block, and how many were left out of it, by kind (see `Findings`)."""

    def __init__(self, texts: Sequence[str] = (), left_out: Mapping[str, int] | None = None):
        super().__init__(texts)
        self.left_out = dict(left_out or {})


class TextBlocks(Sequence[Block]):
    """The blocks of a side as a random-access data source: element i is the list of block i's documents.

    A block is a row group of parquet, about 4 MiB of jsonl or txt, or a whole `.jsonl.gz`. It is read when asked for.
    Documents without any text are left out, so that a block may be empty. Where files are on their way, reading a block
    waits for its file and those before it, and the length for all of them; whatever the order in which they come, the
    blocks are the same.

    Raises (when built or when a block is read), unless bad text is to be skipped:
      UserError: a file that cannot be read, a broken line (`FILE:LINE: ...`), a line or file without text, a document
        of more than `LONGEST_CHARS` characters, or that is no UTF-8.
    """

    def __init__(self, side: TextSide):
        self._side = side
        self.interrupted = threading.Event()  # ends a wait for a file
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._listed = 0  # files whose blocks are known
        self._readers: list[_Reader] = []
        if side.wait is None:
            self._readers, self._listed = _list_blocks(side), len(side.files)

    def __len__(self) -> int:
        while self._listed < len(self._side.files):
            self._list_next()
        return len(self._readers)

    def __getitem__(self, index: int) -> Block:
        if not self.reaches(index):
            raise IndexError(f"block {index} of {len(self)}")
        findings = Findings(self._side.on_bad, self._tell)
        where, read = self._readers[index]
        texts = findings.keep(read(findings), where)
        return Block([text for text in texts if self._side.keeps(text)], findings.left_out)

    def _tell(self, line: str) -> None:
        """Tells of each once, however often its block is read."""
        with self._lock:
            new = line not in self._told and len(self._told) < NAMED
            if new:
                self._told.add(line)
                more = "; further ones are counted only" if len(self._told) == NAMED else ""
        if new:
            self._side.tell(line + more)

    def reaches(self, index: int) -> bool:
        """Whether there is a block `index`."""
        while (index < 0 or index >= len(self._readers)) and self._listed < len(self._side.files):
            self._list_next()
        return -len(self._readers) <= index < len(self._readers)

    @property
    def count(self) -> int | None:
        """How many blocks there are; None as long as a file is on its way."""
        return len(self) if self._listed == len(self._side.files) or self._side.complete else None

    def _list_next(self) -> None:
        at = self._listed
        path = self._side.files[at]
        self._side.wait(path, self.interrupted.is_set)
        readers = _list_blocks(replace(self._side, files=(path,), wait=None))
        with self._lock:
            if self._listed == at:  # and no other thread was faster
                self._readers += readers
                self._listed += 1

    def __repr__(self) -> str:
        return f"TextBlocks({self._side.files[0].parent}, {len(self._side.files)} files)"


def _list_blocks(side: TextSide) -> list[_Reader]:
    readers: list[_Reader] = []
    small: list[AnyPath] = []
    small_bytes = 0
    for path in side.files:
        if side.format == "parquet":
            readers += _list_row_groups(path, side.on_bad)
            continue
        size = size_of(path)
        if path.suffix == ".gz":
            readers.append((f"{path}", partial(reading.read_json_gzip, path)))
        elif side.format == "jsonl" or size > LONG_TEXT_BYTES:
            read = reading.read_json_block if side.format == "jsonl" else reading.read_pieces
            readers += [(f"{path}", partial(read, path, start)) for start in range(0, size, reading.BLOCK_BYTES)]
        else:
            if small_bytes + size > reading.BLOCK_BYTES:
                readers.append((f"{small[0]} to {small[-1].name}", partial(reading.read_files, tuple(small))))
                small, small_bytes = [], 0
            small, small_bytes = [*small, path], small_bytes + size
    if small:
        readers.append((f"{small[0]} to {small[-1].name}", partial(reading.read_files, tuple(small))))
    return readers


def _list_row_groups(path: AnyPath, on_bad: OnBad) -> list[_Reader]:
    try:
        metadata = open_parquet(path).metadata
    except Unreadable as error:
        if on_bad == "refuse":
            raise
        # A block of its own, so that it is counted in its place.
        return [(f"{path}", partial(_tell_unreadable, error))]
    return [
        (f"{path}: row group {group}", partial(reading.read_row_group, path, metadata, group))
        for group in range(metadata.num_row_groups)
    ]


def _tell_unreadable(error: Unreadable, findings: Findings) -> list[str | None]:
    findings.bad(error.kind, str(error))
    return []
