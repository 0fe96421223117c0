"""Files of records, one JSON object each: what they may be called, how they may be packed, and the line of each record.

A record that cannot be used has a line by which its file can be mended, so every record comes with its number.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.data.text.reading import Unreadable
from jaxchat.errors import check
from jaxchat.storage import AnyPath, first_line, of_the_cloud

_NAME = re.compile(r"(.+?)\.(jsonl|ndjson|json|parquet)(?:\.(gz|bz2|xz|zst))?", re.IGNORECASE)
_UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    # By pyarrow, since Python has no zstd before 3.14.
    "zst": lambda file: io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")),
}
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ROWS = 1024  # of parquet, read at once


def has_records(name: str) -> bool:
    """Whether a file of this name has records: `.jsonl`, `.ndjson`, `.json` or `.parquet`, packed or not."""
    return _NAME.fullmatch(name) is not None


def stem_of(name: str) -> str:
    """The name of a file of records without its endings."""
    found = _NAME.fullmatch(name)
    return found[1] if found else name


def list_records(folder: AnyPath) -> list[AnyPath]:
    """The files of records in a folder, sorted by name; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and has_records(path.name))


def find_records(path: AnyPath) -> AnyPath | None:
    """The file of records with this path, whose endings may be left out or differ; None if there is none.

    Raises:
      UserError: there are several, such as `train.jsonl` and `train.jsonl.gz`.
    """
    found = [other for other in list_records(path.parent) if stem_of(other.name) == stem_of(path.name)]
    names = " and ".join(other.name for other in found)
    check(len(found) <= 1, f"{path.parent} has {names}, of which only one can be read; remove or rename the other")
    return found[0] if found else None


def read_records(path: AnyPath) -> Iterator[tuple[int, Any]]:
    """The records of a file, each with its number: its line from 1, blank lines counted, or its row of parquet.

    A file of JSON has an object on each line, or is one list of objects. A record that is not one is given as the
    ValueError that says why.

    Raises:
      Unreadable: the file is missing or damaged.
      UserError: the disk or the storage fails; the file is UTF-16.
    """
    found = _NAME.fullmatch(path.name)
    kind, packing = (found[2].lower(), (found[3] or "").lower()) if found else ("jsonl", "")
    try:
        if kind == "parquet":
            yield from _rows(path)
            return
        with path.open("rb") as file:
            yield from _lines(path, _UNPACK[packing](file) if packing else file)
    except FileNotFoundError:
        raise Unreadable("missing_files", f"{path} is missing") from None
    except _DAMAGE as error:
        failed = of_the_cloud(error) or (isinstance(error, OSError) and error.errno is not None)
        check(not failed, f"{path} cannot be read now: {first_line(error)}; fix that, and the same command continues")
        raise Unreadable("unreadable_files", f"{path} cannot be read: {first_line(error)}") from None


def place(path: AnyPath, number: int) -> str:
    """How a message names a record: `FILE:LINE`, or `FILE: row N` of parquet."""
    return f"{path}: row {number}" if path.name.lower().endswith(".parquet") else f"{path}:{number}"


def _rows(path: AnyPath) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
        number = 0
        for batch in file.iter_batches(_ROWS):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise Unreadable("unreadable_files", f"{path}: rows from {number + 1} are not UTF-8") from error
            for row in rows:
                number += 1
                yield number, row


def _lines(path: AnyPath, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    began = False
    for number, line in enumerate(file, start=1):
        if not began:
            utf16 = f"{path} is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW.jsonl"
            check(not line.startswith(_UTF16), utf16)
            line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace() or not line:
                continue
            began = True
            if line.lstrip().startswith(b"["):
                yield from _list(line + file.read(), number)
                return
        if not line.isspace():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    """The object on a line, or why it is none."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start + 1} of the line); convert or remove it")
    except (ValueError, RecursionError) as error:
        if line.strip() == b"{":
            return ValueError("an object that goes on in the next line; write one object a line (jq -c . FILE does)")
        return ValueError(f"broken JSON ({first_line(error)}); fix or remove the line")
    return _checked(value, line)


def _checked(value: Any, source: bytes) -> Any:
    if not isinstance(value, dict):
        return ValueError(f"not a JSON object but a {type(value).__name__}; write one object a line")
    if _ESCAPED_SURROGATE.search(source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return ValueError(r"half a surrogate pair (\ud800 to \udfff) is not text; fix or remove the line")
    return value


def _list(data: bytes, first_line_number: int) -> Iterator[tuple[int, Any]]:
    """The objects of one JSON list, each with the line on which it begins."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield first_line_number + data.count(b"\n", 0, error.start), ValueError("not UTF-8; convert the file")
        return
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = text.index("[") + 1, first_line_number, 0

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    while True:
        at = skip(at)
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            if skip(at + 1) < len(text):
                yield line, ValueError("text after the end of the list; write one object a line, without brackets")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, ValueError(f"broken JSON ({first_line(error)}); the rest of the file cannot be read")
            return
        yield line, _checked(value, text[at:end].encode())
        at = skip(end)
        if not text.startswith((",", "]"), at):
            yield line + text.count("\n", counted, at), ValueError("no comma between two objects of the list")
            return
        at += text.startswith(",", at)
