"""The documents in parquet, jsonl and txt files, and what to do about damaged ones.

Readers report broken lines, unreadable files and the like to `Findings`, which either refuses them or counts them and
lets the reader continue without them.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.errors import UserError, check
from jaxchat.storage import AnyPath, first_line, of_the_cloud, to_path

OnBad = Literal["refuse", "skip"]

BLOCK_BYTES = 4 << 20  # of jsonl or txt: a few thousand documents, read and parsed in about 50 ms
TXT_DOCUMENT_CHARS = 16_000  # a long txt file is cut at blank lines into documents of about this length
LONGEST_CHARS = 10_000_000  # of a document; War and Peace has 3 million. More mean lost line breaks, or not text
_LINE_END, _BLANK_LINE, LONGEST_DELIMITER = re.compile(rb"\n"), re.compile(rb"\r?\n\r?\n"), 4


class Findings:
    """The bad text found in a block.

    Args:
      on_bad: whether bad text ends the reading or is left out.
      say: prints a line for the user about each thing that is left out.

    Attributes:
      left_out: how many of each kind were left out: `empty_documents`, `long_documents`, `documents_not_utf8`,
        `broken_lines`, `unreadable_blocks` (row groups of parquet, parts of other files), `unreadable_files`,
        `missing_files`.
    """

    def __init__(self, on_bad: OnBad = "refuse", say: Callable[[str], None] = print):
        self._on_bad, self._say = on_bad, say
        self.left_out: Counter[str] = Counter()

    def bad(self, kind: str, message: str) -> None:
        """Counts one of a kind.

        Raises:
          UserError: with the message, where bad text is refused.
        """
        check(self._on_bad == "skip", f"{message}; --data.on-bad=skip leaves it out")
        self.left_out[kind] += 1
        self._say(f"{message}; left out")

    def keep(self, texts: list[str | None], where: str) -> list[str]:
        """The documents that are neither empty nor too long. Empty ones are counted, and never refused."""
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
    """A file cannot be read at all. `kind` is one of those that `Findings` counts."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def open_parquet(path: AnyPath) -> pq.ParquetFile:
    """Opens a parquet file that has a column `text` of strings.

    Raises:
      Unreadable: it is not parquet, cut short, or missing.
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
    check(is_text, f"{path}: column 'text' contains {kind}, not strings")
    return file


def _source(path: AnyPath) -> Path | IO[bytes]:
    """A path that pyarrow can open itself, which it can on this machine only, or an open file."""
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
    """Distinguishes damage from a failure of the disk or storage, which may pass, and may affect one process alone.

    Raises:
      UserError: it is such a failure; text must not be left out because of it.
    """
    failed = of_the_cloud(error) or (isinstance(error, OSError) and error.errno is not None)
    check(not failed, f"{path} cannot be read now: {first_line(error)}; fix that, and the same command continues")


def _read_block(path: AnyPath, start: int, delimiter: re.Pattern[bytes]) -> tuple[bytes, int]:
    """The whole records of the block at byte `start`, and the byte at which they begin.

    A record belongs to the block in which the delimiter before it begins. So each record is read once, whatever its
    length, without an index of the file.
    """
    with path.open("rb") as file:
        begin = 0 if start == 0 else _after_delimiter(file, start, delimiter)
        end = _after_delimiter(file, start + BLOCK_BYTES, delimiter)
        file.seek(begin)
        return file.read(end - begin), begin


def _after_delimiter(file: IO[bytes], offset: int, delimiter: re.Pattern[bytes]) -> int:
    """The position after the first delimiter that begins at or after `offset`; the file's size if there is none."""
    file.seek(offset)
    tail = b""
    while data := file.read(1 << 16):
        if found := delimiter.search(tail + data):
            return file.tell() - len(tail) - len(data) + found.end()
        tail = (tail + data)[-LONGEST_DELIMITER + 1 :]
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


def read_long_txt_block(path: AnyPath, start: int, findings: Findings) -> list[str | None]:
    """The documents of one block of a long txt file, cut at blank lines."""
    block = _try_read_block(path, start, _BLANK_LINE, findings)
    if block is None:
        return []
    data, begin = block
    texts: list[str | None] = []
    paragraphs: list[str] = []  # of the document that is being collected
    length = 0
    for paragraph in _paragraphs(path, data, begin, findings):
        paragraphs.append(paragraph)
        length += len(paragraph)
        if length >= TXT_DOCUMENT_CHARS:
            texts.append("\n\n".join(paragraphs))
            paragraphs, length = [], 0
    if length:
        texts.append("\n\n".join(paragraphs))
    return texts


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


def read_txt_files(paths: tuple[AnyPath, ...], findings: Findings) -> list[str | None]:
    """The texts of short txt files, each a document."""
    texts = []
    for path in paths:
        data = _try_read(path, findings)
        text = None if data is None else _decode(path, data, 0, findings)
        if text is not None:
            texts.append(text)
    return texts


def _decode(path: AnyPath, data: bytes, begin: int, findings: Findings) -> str | None:
    """The text of bytes from position `begin` of a file; None if they are not UTF-8."""
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
    """The JSON objects, one a line, of a plain or gzip-compressed (`.gz`) file; blank lines are skipped.

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
    """Parses one JSON object. Raises ValueError for anything else, and for text that UTF-8 cannot represent."""
    try:
        value = json.loads(line.decode("utf-8-sig"))  # json alone accepts encoded surrogates
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({first_line(error)}); fix or remove the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}; write one object a line")
    if b"\\u" in line:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(r"half a surrogate pair (\ud800 to \udfff) is not text; fix or remove the line") from None
    return value
