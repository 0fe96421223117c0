"""Text folders: finding the files, splitting off the validation side, and reading them block by block."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.config import UserError, check, closest
from jaxchat.data.manifest import FILE_NAME, pinned_shard

Format = Literal["parquet", "jsonl", "txt"]
SUFFIXES: dict[Format, tuple[str, ...]] = {"parquet": (".parquet",), "jsonl": (".jsonl", ".jsonl.gz"), "txt": (".txt",)}

BLOCK_BYTES = 4 << 20  # of jsonl or txt in a block: some thousand documents, read and parsed in about 50 ms
LONG_TEXT_BYTES = 100_000  # a longer txt file is a book or a corpus rather than one document
PIECE_CHARS = 16_000  # and is cut at blank lines into documents of about this length
HOLD_OUT = (50, 25, 12, 6, 3, 2)  # one file alone: one document in so many is for validation; the first that works


@dataclass(frozen=True)
class TextSide:
    """One side of a text folder.

    A folder of one file has no file to spare for validation: then both sides read it, the documents whose CRC-32 is a
    multiple of `hold_out` are for validation, and `held_out` says which of the two this side is.

    The files of a parquet side may still be on their way: then `wait` returns when the one it is given is there.
    """

    files: tuple[Path, ...]
    format: Format
    hold_out: int | None = None
    held_out: bool = False
    wait: Callable[[Path], None] | None = field(default=None, compare=False, repr=False)

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


def find_text(data_dir: Path | str, val_shard: str | None = None) -> TextSplit:
    """Finds the text of a folder, or of `pretrain/` inside it, and splits it.

    Files in order of their names; the last one is for validation, or the one that `val_shard` names (with or without
    its suffix), or the one that the folder's manifest pins, which is never trained on. If there is only one, about
    every 50th document is. Text files beside parquet or jsonl are taken for notes and left alone.

    Raises:
      UserError: no such folder, no text in it, both parquet and jsonl, a parquet file that is none or has no column
        `text`, a `val_shard` or pinned shard that is not there, a single document, a damaged manifest.
    """
    folder = Path(data_dir)
    check(folder.exists(), f"data folder {folder} does not exist")
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
    if kind == "parquet":
        for path in files:
            _open_parquet(path)

    pinned = pinned_shard(folder)
    if pinned is not None:
        return _keep_out(pinned, val_shard, files, kind)
    if len(files) == 1:
        check(val_shard in (None, *_short_names(files[0])), _no_such_shard(val_shard, folder, files))
        return _hold_out(files, kind)
    val = files[-1] if val_shard is None else next((path for path in files if val_shard in _short_names(path)), None)
    if val is None:
        raise UserError(_no_such_shard(val_shard, folder, files))
    return TextSplit(TextSide(tuple(path for path in files if path != val), kind), TextSide((val,), kind))


def _keep_out(pinned: Path, val_shard: str | None, files: tuple[Path, ...], kind: Format) -> TextSplit:
    """Validation by the pinned file, or the one named; neither of them is trained on."""
    check(pinned in files, f"{pinned}, the validation shard by {FILE_NAME}, is missing; 'jaxchat data get' fetches it")
    val = pinned if val_shard is None else next((path for path in files if val_shard in _short_names(path)), None)
    if val is None:
        raise UserError(_no_such_shard(val_shard, pinned.parent, files))
    train = tuple(path for path in files if path not in (val, pinned))
    check(bool(train), f"{pinned.parent} holds no text for training beside {val.name}; 'jaxchat data get' fetches more")
    return TextSplit(TextSide(train, kind), TextSide((val,), kind))


def _short_names(path: Path) -> tuple[str, str]:
    return path.name, path.name.split(".", 1)[0]


def _no_such_shard(val_shard: str | None, folder: Path, files: tuple[Path, ...]) -> str:
    return f"validation shard {val_shard!r} is not in {folder}{closest(str(val_shard), [path.name for path in files])}"


def _hold_out(files: tuple[Path, ...], kind: Format) -> TextSplit:
    for modulus in HOLD_OUT:
        split = TextSplit(TextSide(files, kind, modulus), TextSide(files, kind, modulus, held_out=True))
        if all(next(iterate_texts(side), None) is not None for side in (split.train, split.val)):
            return split
    raise UserError(f"{files[0]} holds too few documents to keep one for validation; add a second file")


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
            metadata = _open_parquet(path).metadata
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            columns = (group.column(index) for group in groups for index in range(group.num_columns))
            total += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
        else:
            total += path.stat().st_size * (4 if path.suffix == ".gz" else 1)
    return total * len(side.files) // max(1, len(there))


class TextBlocks(Sequence[list[str]]):
    """The blocks of a side as a random-access data source: element i is the list of block i's documents.

    A block is a row group of parquet, about 4 MiB of jsonl or txt, or a whole `.jsonl.gz`. It is read when asked for.
    Documents without any text are left out, so that a block may be empty. Where files are on their way, reading a block
    waits for its file and those before it, and the length for all of them; whatever the order in which they come, the
    blocks are the same.

    Raises (when built or when a block is read):
      UserError: a file that cannot be read, a broken line (`FILE:LINE: ...`), a line or file without text.
    """

    def __init__(self, side: TextSide):
        self._side = side
        self._lock = threading.Lock()
        self._listed = 0  # files whose blocks are known
        self._readers: list[Callable[[], Sequence[str | None]]] = []
        if side.wait is None:
            self._readers, self._listed = _list_blocks(side), len(side.files)

    def __len__(self) -> int:
        while self._listed < len(self._side.files):
            self._list_next()
        return len(self._readers)

    def __getitem__(self, index: int) -> list[str]:
        if not self.reaches(index):
            raise IndexError(f"block {index} of {len(self)}")
        return [text for text in self._readers[index]() if text and self._side.keeps(text)]

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
        self._side.wait(path)
        readers = _list_blocks(replace(self._side, files=(path,), wait=None))
        with self._lock:
            if self._listed == at:  # and no other thread was faster
                self._readers += readers
                self._listed += 1

    def __repr__(self) -> str:
        return f"TextBlocks({self._side.files[0].parent}, {len(self._side.files)} files)"


def _list_blocks(side: TextSide) -> list[Callable[[], Sequence[str | None]]]:
    readers: list[Callable[[], Sequence[str | None]]] = []
    small: list[Path] = []
    small_bytes = 0
    for path in side.files:
        if side.format == "parquet":
            metadata = _open_parquet(path).metadata
            readers += [partial(_read_row_group, path, metadata, group) for group in range(metadata.num_row_groups)]
            continue
        size = path.stat().st_size
        if path.suffix == ".gz":
            readers.append(partial(_read_gzip_texts, path))
        elif side.format == "jsonl" or size > LONG_TEXT_BYTES:
            read = _read_json_texts if side.format == "jsonl" else _read_pieces
            readers += [partial(read, path, start) for start in range(0, size, BLOCK_BYTES)]
        else:
            if small_bytes + size > BLOCK_BYTES:
                readers.append(partial(_read_files, tuple(small)))
                small, small_bytes = [], 0
            small, small_bytes = [*small, path], small_bytes + size
    if small:
        readers.append(partial(_read_files, tuple(small)))
    return readers


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {_first_line(error)}") from None
    columns = file.schema_arrow
    check("text" in columns.names, f"{path} has no column 'text'; its columns are: {', '.join(columns.names)}")
    kind = columns.field("text").type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    check(is_text, f"{path}: column 'text' holds {kind}, not strings")
    return file


def _read_row_group(path: Path, metadata: pq.FileMetaData, group: int) -> list[str | None]:
    try:
        table = pq.ParquetFile(path, metadata=metadata).read_row_group(group, columns=["text"])
        return table.column("text").to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: row group {group} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_block(path: Path, start: int, delimiter: bytes) -> tuple[bytes, int]:
    """The whole records of the block at byte `start`, and where they begin.

    A record belongs to the block in which the delimiter before it begins, so that each is read once, whatever its
    length, and no index of the file is needed.
    """
    with path.open("rb") as file:
        begin = 0 if start == 0 else _after_delimiter(file, start, delimiter)
        end = _after_delimiter(file, start + BLOCK_BYTES, delimiter)
        file.seek(begin)
        return file.read(end - begin), begin


def _after_delimiter(file: BinaryIO, offset: int, delimiter: bytes) -> int:
    """The position after the first delimiter that begins at or after `offset`; the file's size if there is none."""
    file.seek(offset)
    tail = b""
    while piece := file.read(1 << 16):
        at = (tail + piece).find(delimiter)
        if at >= 0:
            return file.tell() - len(tail) - len(piece) + at + len(delimiter)
        tail = (tail + piece)[-len(delimiter) + 1 :] if len(delimiter) > 1 else b""
    return file.seek(0, 2)


def _read_json_texts(path: Path, start: int) -> list[str]:
    data, begin = _read_block(path, start, b"\n")
    return _parse_texts(path, data, lambda: _count_lines(path, begin))


def _count_lines(path: Path, end: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(1 << 20, end - at)).count(b"\n") for at in range(0, end, 1 << 20))


def _read_gzip_texts(path: Path) -> list[str]:
    return _parse_texts(path, _read_bytes(path), lambda: 0)


def _parse_texts(path: Path, data: bytes, lines_before: Callable[[], int]) -> list[str]:
    texts = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _parse_object(line)
            if not isinstance(value.get("text"), str):
                raise ValueError(f"no string field 'text'; the fields are: {', '.join(value) or 'none'}")
        except ValueError as error:
            raise UserError(f"{path}:{lines_before() + number}: {error}") from None
        texts.append(value["text"])
    return texts


def _read_pieces(path: Path, start: int) -> list[str]:
    """The documents of a long text's block, cut at blank lines."""
    data, begin = _read_block(path, start, b"\n\n")
    pieces: list[str] = []
    open_piece: list[str] = []
    length = 0
    for paragraph in _decode(path, data, begin).split("\n\n"):
        open_piece.append(paragraph)
        length += len(paragraph)
        if length >= PIECE_CHARS:
            pieces.append("\n\n".join(open_piece))
            open_piece, length = [], 0
    if length:
        pieces.append("\n\n".join(open_piece))
    return pieces


def _read_files(paths: tuple[Path, ...]) -> list[str]:
    return [_decode(path, _read_bytes(path), 0) for path in paths]


def _decode(path: Path, data: bytes, begin: int) -> str:
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {begin + error.start}); convert or remove it") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {_first_line(error)}") from None


def read_jsonl(path: Path) -> list[dict]:
    """Reads one JSON object a line from a plain or gzip-compressed (`.gz`) file; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object (`FILE:LINE: ...`).
    """
    objects = []
    for number, line in enumerate(_read_bytes(Path(path)).split(b"\n"), start=1):
        if line.strip():
            try:
                objects.append(_parse_object(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    return objects


def _parse_object(line: bytes) -> dict:
    """One JSON object. Raises ValueError for anything else, and for text that UTF-8 cannot hold."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({_first_line(error)}); fix or remove the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}; write one object a line")
    if b"\\u" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(r"half a surrogate pair (\ud800 to \udfff) is no text; fix or remove the line") from None
    return value
