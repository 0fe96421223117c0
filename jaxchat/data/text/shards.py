"""The files of one side of the text, for training or validation, as a sequence of blocks of documents."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from jaxchat.data.text import plain, reading
from jaxchat.data.text.forms import Form, form_of
from jaxchat.data.text.reading import Findings, OnBad, Unreadable, open_parquet
from jaxchat.storage import AnyPath, size_of

REPORTED = 20  # of the bad text that is left out, this much is reported, and the rest only counted


@dataclass(frozen=True)
class TextFiles:
    """The files of one side of a text folder, for training or for validation.

    Where there is no file for validation, both sides read the same files: documents whose CRC-32 is a multiple of
    `hold_out` are for validation, and `held_out` tells whether this is the validation side.

    Attributes:
      files: the files, in the order in which they are read. The name of each tells its form.
      hold_out, held_out: see above.
      document_chars: about how many characters of a txt file make a document, however short the file; None: a short
        file is one document, and longer ones are cut into documents of the usual length.
      wait: given if the files (parquet only) may still be downloading. It takes a file and a function that says
        whether nobody wants the file any more; it returns once the file is there, and raises if it will not come.
      on_bad: whether damaged text ends the reading or is left out.
      say: prints a line for the user about text that is left out.
    """

    files: tuple[AnyPath, ...]
    hold_out: int | None = None
    held_out: bool = False
    document_chars: int | None = None
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


def known_form(path: AnyPath) -> Form:
    """The form of a file that is known to be text."""
    form = form_of(path)
    assert form is not None, f"{path} is no text by its name"
    return form


def iterate_texts(text: TextFiles) -> Iterator[str]:
    """The documents in order, with one block in memory at a time."""
    for block in TextBlocks(text):
        yield from block


def text_bytes(text: TextFiles) -> int:
    """Estimates the bytes of text in the files, for showing progress.

    A compressed file counts four times its size, a file that is still downloading as much as the average of the others.
    """
    there = [path for path in text.files if text.wait is None or path.is_file()]
    total = 0
    for path in there:
        form = known_form(path)
        if form.format == "parquet":
            try:
                metadata = open_parquet(path).metadata
            except Unreadable:
                continue  # reported when it is read
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            columns = (group.column(index) for group in groups for index in range(group.num_columns))
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        else:
            total += size_of(path) * (4 if form.compression else 1)
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

    A block is a row group of parquet, about 4 MiB of jsonl or txt, or a whole compressed or `.json` file. Empty
    documents are left out, so a block may be empty. While files are still downloading, reading a block waits for its
    file and those before it, and `len` waits for all of them; the order in which they arrive makes no difference to the
    blocks.

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
    readers: list[_BlockReader] = []
    small: list[AnyPath] = []  # short txt files, which share a block
    small_bytes = 0

    def close_small() -> None:
        nonlocal small, small_bytes
        if small:
            readers.append((f"{small[0]} to {small[-1].name}", partial(plain.read_short_files, tuple(small))))
        small, small_bytes = [], 0

    for path in text.files:
        if not _is_short_txt(path, text.document_chars):
            readers += _list_file(path, text)
            continue
        size = size_of(path)
        if small_bytes + size > reading.BLOCK_BYTES:
            close_small()
        small, small_bytes = [*small, path], small_bytes + size
    close_small()
    return readers


def _is_short_txt(path: AnyPath, document_chars: int | None) -> bool:
    return document_chars is None and known_form(path) == ("txt", "") and size_of(path) <= plain.LONG_FILE_BYTES


def _list_file(path: AnyPath, text: TextFiles) -> list[_BlockReader]:
    form = known_form(path)
    if form.format == "parquet":
        return _list_row_groups(path, text.on_bad)
    if form.format == "txt" and form.compression:
        return [(f"{path}", partial(plain.read_packed_file, path, text.document_chars))]
    if form != ("jsonl", "") and form != ("txt", ""):
        return [(f"{path}", partial(reading.read_json_file, path))]
    starts = range(0, size_of(path), reading.BLOCK_BYTES)
    if form.format == "jsonl":
        return [(f"{path}", partial(reading.read_json_block, path, start)) for start in starts]
    cut = plain.cut_of(path, text.document_chars or plain.DOCUMENT_CHARS)
    return [(f"{path}", lambda findings, start=start: plain.read_block(path, start, cut, findings)) for start in starts]


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
