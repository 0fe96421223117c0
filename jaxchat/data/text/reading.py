"""What text files hold: documents of parquet, jsonl and txt; lines that are broken, and files that cannot be read.

Every reader is given `Findings`, which is told what is bad: it refuses, or counts and lets the reader go on without it.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.errors import UserError, check
from jaxchat.storage import AnyPath, first_line, of_the_cloud, to_path

OnBad = Literal["refuse", "skip"]

BLOCK_BYTES = 4 << 20  # of jsonl or txt in a block: some thousand documents, read and parsed in about 50 ms
PIECE_CHARS = 16_000  # a long txt file is cut at blank lines into documents of about this length
LONGEST_CHARS = 10_000_000  # of a document; War and Peace has 3 million. More are lost line breaks, or no text
_LINE_END, _BLANK_LINE, LONGEST_DELIMITER = re.compile(rb"\n"), re.compile(rb"\r?\n\r?\n"), 4


class Findings:
    """What is bad in a part of the text.

    Args:
      on_bad: whether what is bad ends the reading, or is left out.
      tell: is told what was left out, in a line.

    Attributes:
      left_out: how many there were of each kind: `empty_documents`, `long_documents`, `documents_not_utf8`,
        `broken_lines`, `unreadable_blocks` (row groups of parquet, parts of other files), `unreadable_files`,
        `missing_files`.
    """

    def __init__(self, on_bad: OnBad = "refuse", tell: Callable[[str], None] = print):
        self._on_bad, self._tell = on_bad, tell
        self.left_out: Counter[str] = Counter()

    def bad(self, kind: str, message: str) -> None:
        """Counts one of a kind.

        Raises:
          UserError: with the message, where bad text is refused.
        """
        check(self._on_bad == "skip", f"{message}; --data.on-bad=skip leaves it out")
        self.left_out[kind] += 1
        self._tell(f"{message}; left out")

    def keep(self, texts: list[str | None], where: str) -> list[str]:
        """The documents that have text, and not too much of it. Those without any are counted and never refused."""
        kept = []
        for text in texts:
            if not text:
                self.left_out["empty_documents"] += 1
            elif len(text) > LONGEST_CHARS:
                length = f"{len(text):,} characters, more than the {LONGEST_CHARS:,} that a document may have"
                self.bad("long_documents", f"{where}: the document beginning {text[:20]!r} has {length}")
            else:
                kept.append(text)
        return kept


class Unreadable(UserError):
    """A file that cannot be read at all. `kind` is one of those that `Findings` counts."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def open_parquet(path: AnyPath) -> pq.ParquetFile:
    """A parquet file with a column `text` of strings.

    Raises:
      Unreadable: no parquet, cut short, or gone.
      UserError: it has other columns.
    """
    try:
        file = pq.ParquetFile(_source(path))
    except FileNotFoundError:
        raise Unreadable("missing_files", f"{path} is missing") from None
    except (pa.ArrowException, OSError) as error:
        _check_damage(path, error)
        raise Unreadable("unreadable_files", f"{path} is not a parquet file: {first_line(error)}") from None
    columns = file.schema_arrow
    check("text" in columns.names, f"{path} has no column 'text'; its columns are: {', '.join(columns.names)}")
    kind = columns.field("text").type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    check(is_text, f"{path}: column 'text' holds {kind}, not strings")
    return file


def _source(path: AnyPath) -> Path | BinaryIO:
    """What pyarrow can read: it has a storage of its own for this machine only."""
    return path if isinstance(path, Path) else path.open("rb")


def read_row_group(path: AnyPath, metadata: pq.FileMetaData, group: int, findings: Findings) -> list[str | None]:
    """The documents of a row group."""
    where = f"{path}: row group {group}"
    try:
        file = pq.ParquetFile(_source(path), metadata=metadata, page_checksum_verification=True)
        column = file.read_row_group(group, columns=["text"]).column("text")
    except FileNotFoundError:
        findings.bad("missing_files", f"{path} is missing")
        return []
    except (pa.ArrowException, OSError) as error:
        _check_damage(path, error)
        findings.bad("unreadable_blocks", f"{where} cannot be read: {first_line(error)}")
        return []
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return _decode_each(column, where, findings)


def _decode_each(column: pa.ChunkedArray, where: str, findings: Findings) -> list[str | None]:
    texts: list[str | None] = []
    for number, data in enumerate(column.cast(pa.large_binary()).to_pylist()):
        try:
            texts.append(None if data is None else data.decode())
        except UnicodeDecodeError as error:
            findings.bad("documents_not_utf8", f"{where}, document {number} is not UTF-8 (byte {error.start})")
    return texts


def _check_damage(path: AnyPath, error: Exception) -> None:
    """Tells damage from a disk or a storage that fails, perhaps for a moment, and perhaps for one process of several.

    Raises:
      UserError: it is the latter, which no text is left out for.
    """
    failed = of_the_cloud(error) or (isinstance(error, OSError) and error.errno is not None)
    check(not failed, f"{path} cannot be read now: {first_line(error)}; put that right, and the same command goes on")


def _read_block(path: AnyPath, start: int, delimiter: re.Pattern[bytes]) -> tuple[bytes, int]:
    """The whole records of the block at byte `start`, and where they begin.

    A record belongs to the block in which the delimiter before it begins, so that each is read once, whatever its
    length, and no index of the file is needed.
    """
    with path.open("rb") as file:
        begin = 0 if start == 0 else _after_delimiter(file, start, delimiter)
        end = _after_delimiter(file, start + BLOCK_BYTES, delimiter)
        file.seek(begin)
        return file.read(end - begin), begin


def _after_delimiter(file: BinaryIO, offset: int, delimiter: re.Pattern[bytes]) -> int:
    """The position after the first delimiter that begins at or after `offset`; the file's size if there is none."""
    file.seek(offset)
    tail = b""
    while piece := file.read(1 << 16):
        if found := delimiter.search(tail + piece):
            return file.tell() - len(tail) - len(piece) + found.end()
        tail = (tail + piece)[-LONGEST_DELIMITER + 1 :]
    return file.seek(0, 2)


def _try_read_block(
    path: AnyPath, start: int, delimiter: re.Pattern[bytes], findings: Findings
) -> tuple[bytes, int] | None:
    try:
        return _read_block(path, start, delimiter)
    except OSError as error:
        unreadable = _unreadable(path, error)
        findings.bad(unreadable.kind, str(unreadable))
        return None


def read_json_block(path: AnyPath, start: int, findings: Findings) -> list[str | None]:
    """The texts of the lines that begin in the `BLOCK_BYTES` from `start`."""
    block = _try_read_block(path, start, _LINE_END, findings)
    if block is None:
        return []
    data, begin = block
    return _parse_texts(path, data, lambda: _count_lines(path, begin), findings)


def _count_lines(path: AnyPath, end: int) -> int:
    with path.open("rb") as file:
        return sum(file.read(min(1 << 20, end - at)).count(b"\n") for at in range(0, end, 1 << 20))


def read_json_gzip(path: AnyPath, findings: Findings) -> list[str | None]:
    """The texts of the lines of a whole gzip file."""
    data = _try_read(path, findings)
    return [] if data is None else _parse_texts(path, data, lambda: 0, findings)


def _parse_texts(path: AnyPath, data: bytes, lines_before: Callable[[], int], findings: Findings) -> list[str | None]:
    texts: list[str | None] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _parse_object(line)
            if not isinstance(value.get("text"), str):
                raise ValueError(f"no string field 'text'; the fields are: {', '.join(value) or 'none'}")
        except ValueError as error:
            findings.bad("broken_lines", f"{path}:{lines_before() + number}: {error}")
            continue
        texts.append(value["text"])
    return texts


def read_pieces(path: AnyPath, start: int, findings: Findings) -> list[str | None]:
    """The documents of a long text's block, cut at blank lines."""
    block = _try_read_block(path, start, _BLANK_LINE, findings)
    if block is None:
        return []
    data, begin = block
    pieces: list[str | None] = []
    open_piece: list[str] = []
    length = 0
    for paragraph in _paragraphs(path, data, begin, findings):
        open_piece.append(paragraph)
        length += len(paragraph)
        if length >= PIECE_CHARS:
            pieces.append("\n\n".join(open_piece))
            open_piece, length = [], 0
    if length:
        pieces.append("\n\n".join(open_piece))
    return pieces


def _paragraphs(path: AnyPath, data: bytes, begin: int, findings: Findings) -> list[str]:
    try:
        return _plain(data).split("\n\n")
    except UnicodeDecodeError:
        ends = [(match.start(), match.end()) for match in _BLANK_LINE.finditer(data)] + [(len(data), len(data))]
        texts, at = [], 0
        for end, after in ends:
            texts.append(_decode(path, data[at:end], begin + at, findings))
            at = after
        return [text for text in texts if text is not None]


def read_files(paths: tuple[AnyPath, ...], findings: Findings) -> list[str | None]:
    """Small text files, each a document."""
    texts = []
    for path in paths:
        data = _try_read(path, findings)
        text = None if data is None else _decode(path, data, 0, findings)
        if text is not None:
            texts.append(text)
    return texts


def _decode(path: AnyPath, data: bytes, begin: int, findings: Findings) -> str | None:
    """None for what is no text; `begin` is where in the file it is."""
    try:
        return _plain(data)
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {begin + error.start}); convert or remove it"
        findings.bad("documents_not_utf8", message)
        return None


def _plain(data: bytes) -> str:
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def _try_read(path: AnyPath, findings: Findings) -> bytes | None:
    try:
        return _read_bytes(path)
    except Unreadable as error:
        findings.bad(error.kind, str(error))
        return None


def _read_bytes(path: AnyPath) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: AnyPath, error: Exception) -> Unreadable:
    if isinstance(error, FileNotFoundError):
        return Unreadable("missing_files", f"{path} cannot be read: it is missing")
    _check_damage(path, error)
    return Unreadable("unreadable_blocks", f"{path} cannot be read: {first_line(error)}")


def read_jsonl(path: AnyPath) -> list[dict]:
    """Reads one JSON object a line from a plain or gzip-compressed (`.gz`) file; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object (`FILE:LINE: ...`).
    """
    objects = []
    for number, line in enumerate(_read_bytes(to_path(path)).split(b"\n"), start=1):
        if line.strip():
            try:
                objects.append(_parse_object(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    return objects


def _parse_object(line: bytes) -> dict:
    """One JSON object. Raises ValueError for anything else, and for text that UTF-8 cannot hold."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # by itself json lets surrogates through
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({first_line(error)}); fix or remove the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}; write one object a line")
    if b"\\u" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(r"half a surrogate pair (\ud800 to \udfff) is no text; fix or remove the line") from None
    return value
