"""Folders of text: which files they contain, which of them are for validation, and their blocks of documents."""

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

LONG_TXT_BYTES = 100_000  # a longer txt file is a book or a corpus rather than one document
REPORTED = 20  # of the bad text that is left out, this much is reported, and the rest only counted
# Of a single file one document in this many is for validation: the first number that leaves documents on both sides.
HOLD_OUT = (50, 25, 12, 6, 3, 2)


@dataclass(frozen=True)
class TextFiles:
    """The files of one side of a text folder, for training or for validation.

    A folder of one file has no other file for validation. Then both sides read that file: documents whose CRC-32 is a
    multiple of `hold_out` are for validation, and `held_out` tells whether this is the validation side.

    Attributes:
      files: the files, in the order in which they are read.
      format: what all of them contain.
      hold_out, held_out: see above.
      wait: given if the files (parquet only) may still be downloading. It takes a file and a function that says
        whether nobody wants the file any more; it returns once the file is there, and raises if it will not come.
      on_bad: whether damaged text ends the reading or is left out.
      say: prints a line for the user about text that is left out.
    """

    files: tuple[AnyPath, ...]
    format: Format
    hold_out: int | None = None
    held_out: bool = False
    wait: Callable[[AnyPath, Callable[[], bool]], None] | None = field(default=None, compare=False, repr=False)
    on_bad: OnBad = "refuse"
    say: Callable[[str], None] = field(default=print, compare=False, repr=False)

    @property
    def complete(self) -> bool:
        """Whether all files are there."""
        return self.wait is None or all(path.is_file() for path in self.files)

    def keeps(self, text: str) -> bool:
        """Whether a document is on this side."""
        return self.hold_out is None or (zlib.crc32(text.encode()) % self.hold_out == 0) == self.held_out


@dataclass(frozen=True)
class TextSplits:
    """The two sides of a text folder."""

    train: TextFiles
    val: TextFiles


def find_text(
    data_dir: AnyPath | str,
    val_shard: str | None = None,
    *,
    on_bad: OnBad = "refuse",
    say: Callable[[str], None] = print,
) -> TextSplits:
    """Finds the text in a folder, or in `pretrain/` inside it, and splits it into training and validation.

    The files are sorted by name. Validation gets the one that `val_shard` names (with or without its suffix), else the
    one that the folder's manifest pins, which is never trained on, else the last. Of a single file it gets about every
    50th document. Text files beside parquet or jsonl are taken to be notes and ignored.

    Args:
      on_bad, say: as in `TextFiles`.

    Raises:
      UserError: there is no such folder, no text in it, both parquet and jsonl, a parquet file without a column `text`,
        a `val_shard` or pinned shard that is missing, a single document, or a damaged manifest; with `on_bad="refuse"`
        also a file that is not parquet, and a shard that the manifest lists and the folder lacks.
    """
    folder = to_path(data_dir)
    check(is_folder(folder) or folder.exists(), f"data folder {folder} does not exist")
    check(folder.is_dir(), f"{folder} is not a folder")
    folder = folder / "pretrain" if (folder / "pretrain").is_dir() else folder
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    kind, files = _text_files(folder, entries)
    sides = partial(TextFiles, format=kind, on_bad=on_bad, say=say)
    pinned = pinned_shard(folder)
    if pinned is not None:
        check(
            pinned in files,
            f"{pinned}, which {FILE_NAME} names as the validation shard, is missing; 'jaxchat data get' downloads it",
        )
        files = tuple(sorted({*files, *recorded_shards(folder)}))
    if kind == "parquet":
        for path in files:
            _check_parquet(path, on_bad)
    if len(files) == 1:
        check(val_shard in (None, *_names(files[0])), _no_such_shard(val_shard, folder, files))
        check(pinned is None, _no_training_text(folder, files[0]))
        return _hold_out(sides(files))
    # The pinned shard is never trained on, even if another one is for validation.
    val = files[-1] if pinned is None else pinned
    if val_shard is not None:
        named = next((path for path in files if val_shard in _names(path)), None)
        if named is None:
            raise UserError(_no_such_shard(val_shard, folder, files))
        val = named
    if kind == "parquet":
        _check_parquet(val, "refuse")
    train = tuple(path for path in files if path not in (val, pinned))
    check(bool(train), _no_training_text(folder, val))
    return TextSplits(sides(train), sides((val,)))


def _text_files(folder: AnyPath, entries: list[AnyPath]) -> tuple[Format, tuple[AnyPath, ...]]:
    files = [path for path in entries if path.is_file()]
    found: dict[Format, tuple[AnyPath, ...]] = {
        kind: tuple(path for path in files if path.name.endswith(ends)) for kind, ends in SUFFIXES.items()
    }
    names = [path.name for path in entries]
    contents = f"it contains {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
    check(any(found.values()), f"no text in {folder}; {contents}; put .parquet, .jsonl or .txt files there")
    check(
        not (found["parquet"] and found["jsonl"]),
        f"{folder} contains both parquet and jsonl files; keep one kind, or move the other to a separate folder",
    )
    return next((kind, files) for kind, files in found.items() if files)


def _check_parquet(path: AnyPath, on_bad: OnBad) -> None:
    try:
        open_parquet(path)
    except Unreadable as error:
        remedy = "; 'jaxchat data get' downloads it" if error.kind == "missing_files" else ""
        check(on_bad == "skip", f"{error}{remedy}; --data.on-bad=skip leaves out files that are for training")


def _names(path: AnyPath) -> tuple[str, str]:
    return path.name, path.name.split(".", 1)[0]


def _no_such_shard(val_shard: str | None, folder: AnyPath, files: tuple[AnyPath, ...]) -> str:
    return f"validation shard {val_shard!r} is not in {folder}{closest(str(val_shard), [path.name for path in files])}"


def _no_training_text(folder: AnyPath, val: AnyPath) -> str:
    return f"{folder} contains no text for training, only {val.name} for validation; 'jaxchat data get' downloads more"


def _hold_out(side: TextFiles) -> TextSplits:
    for modulus in HOLD_OUT:
        splits = TextSplits(replace(side, hold_out=modulus), replace(side, hold_out=modulus, held_out=True))
        quiet = (replace(half, say=lambda line: None) for half in (splits.train, splits.val))
        if all(next(iterate_texts(half), None) is not None for half in quiet):
            return splits
    raise UserError(f"{side.files[0]} has too few documents to keep one for validation; add a second file")


def iterate_texts(text: TextFiles) -> Iterator[str]:
    """The documents in order, with one block in memory at a time."""
    for block in TextBlocks(text):
        yield from block


def text_bytes(text: TextFiles) -> int:
    """Estimates the bytes of text in the files, for showing progress.

    A gzip file counts four times its size, a file that is still downloading as much as the average of the others.
    """
    there = [path for path in text.files if text.wait is None or path.is_file()]
    total = 0
    for path in there:
        if text.format == "parquet":
            try:
                metadata = open_parquet(path).metadata
            except Unreadable:
                continue  # reported when it is read
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            columns = (group.column(index) for group in groups for index in range(group.num_columns))
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        else:
            total += size_of(path) * (4 if path.suffix == ".gz" else 1)
    return total * len(text.files) // max(1, len(there))


# The name of a block for messages, and the function that reads its documents.
_BlockReader = tuple[str, Callable[[Findings], list[str | None]]]


class Block(list[str]):
    """The documents of a block, with `left_out`: how much bad text it has, by kind (see `Findings`)."""

    def __init__(self, texts: Sequence[str] = (), left_out: Mapping[str, int] | None = None):
        super().__init__(texts)
        self.left_out = dict(left_out or {})


class TextBlocks:
    """The text as a random-access sequence of blocks, each a list of documents, read when it is asked for.

    A block is a row group of parquet, about 4 MiB of jsonl or txt, or a whole `.jsonl.gz`. Empty documents are left
    out, so a block may be empty. While files are still downloading, reading a block waits for its file and those before
    it, and `len` waits for all of them; the order in which they arrive makes no difference to the blocks.

    Raises (when built or when a block is read, unless `on_bad` is "skip"):
      UserError: a file that cannot be read, a broken line (`FILE:LINE: ...`), a line or file without text, a document
        of more than `LONGEST_CHARS` characters, or one that is not UTF-8.
    """

    def __init__(self, text: TextFiles):
        self._text = text
        self.interrupted = threading.Event()  # set it to end a wait for a file
        self._lock = threading.Lock()
        self._reported: set[str] = set()
        self._listed = 0  # files whose blocks are known
        self._readers: list[_BlockReader] = []
        if text.wait is None:
            self._readers, self._listed = _list_blocks(text), len(text.files)

    def __len__(self) -> int:
        while self._listed < len(self._text.files):
            self._list_next()
        return len(self._readers)

    def __getitem__(self, index: int) -> Block:
        if not self.reaches(index):
            raise IndexError(f"block {index} of {len(self)}")
        findings = Findings(self._text.on_bad, self._report)
        where, read = self._readers[index]
        texts = findings.keep(read(findings), where)
        return Block([text for text in texts if self._text.keeps(text)], findings.left_out)

    def _report(self, line: str) -> None:
        """Prints each line once, however often its block is read."""
        with self._lock:
            if line in self._reported or len(self._reported) == REPORTED:
                return
            self._reported.add(line)
            more = "; any more are only counted" if len(self._reported) == REPORTED else ""
        self._text.say(line + more)

    def reaches(self, index: int) -> bool:
        """Whether there is a block `index`; waits for files only as far as needed to know."""
        while (index < 0 or index >= len(self._readers)) and self._listed < len(self._text.files):
            self._list_next()
        return -len(self._readers) <= index < len(self._readers)

    @property
    def known_count(self) -> int | None:
        """How many blocks there are; None while a file is still downloading."""
        return len(self) if self._listed == len(self._text.files) or self._text.complete else None

    def _list_next(self) -> None:
        at = self._listed
        path = self._text.files[at]
        if self._text.wait is not None:
            self._text.wait(path, self.interrupted.is_set)
        readers = _list_blocks(replace(self._text, files=(path,), wait=None))
        with self._lock:
            if self._listed == at:  # another thread may have been faster
                self._readers += readers
                self._listed += 1

    def __repr__(self) -> str:
        return f"TextBlocks({self._text.files[0].parent}, {len(self._text.files)} files)"


def _list_blocks(text: TextFiles) -> list[_BlockReader]:
    if text.format == "parquet":
        return [reader for path in text.files for reader in _list_row_groups(path, text.on_bad)]
    readers: list[_BlockReader] = []
    small: list[AnyPath] = []  # short txt files, which share a block
    small_bytes = 0
    for path in text.files:
        size = size_of(path)
        if path.suffix == ".gz":
            readers.append((f"{path}", partial(reading.read_json_gzip, path)))
        elif text.format == "jsonl" or size > LONG_TXT_BYTES:
            read = reading.read_json_block if text.format == "jsonl" else reading.read_long_txt_block
            readers += [(f"{path}", partial(read, path, start)) for start in range(0, size, reading.BLOCK_BYTES)]
        else:
            if small_bytes + size > reading.BLOCK_BYTES:
                readers.append((f"{small[0]} to {small[-1].name}", partial(reading.read_txt_files, tuple(small))))
                small, small_bytes = [], 0
            small, small_bytes = [*small, path], small_bytes + size
    if small:
        readers.append((f"{small[0]} to {small[-1].name}", partial(reading.read_txt_files, tuple(small))))
    return readers


def _list_row_groups(path: AnyPath, on_bad: OnBad) -> list[_BlockReader]:
    try:
        metadata = open_parquet(path).metadata
    except Unreadable as error:
        if on_bad == "refuse":
            raise
        # A block by itself, so that the file is counted in its place.
        return [(f"{path}", partial(_report_unreadable, error))]
    return [
        (f"{path}: row group {group}", partial(reading.read_row_group, path, metadata, group))
        for group in range(metadata.num_row_groups)
    ]


def _report_unreadable(error: Unreadable, findings: Findings) -> list[str | None]:
    findings.bad(error.kind, str(error))
    return []
