"""Files of records, one JSON object each: the line of each record, and which file has the records of a name.

A record that cannot be used has a line by which its file can be mended, so every record comes with its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from jaxchat.data.text.forms import (
    DAMAGE,
    HEAD_BYTES,
    bare_name,
    form_of,
    from_latin_1,
    not_packed,
    something_else,
    unpacked,
)
from jaxchat.data.text.reading import Unreadable, check_damage, parse_object
from jaxchat.errors import check
from jaxchat.storage import AnyPath, first_line

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"\s*")
_ROWS = 1024  # of parquet, read at once


class NoRecord(ValueError):
    """Why something in a file is no record, and how a message goes on that asks to mend it."""

    def __init__(self, message: str, remedy: str):
        super().__init__(message)
        self.remedy = remedy


def has_records(name: str) -> bool:
    """Whether a file of this name has records: `.jsonl`, `.ndjson`, `.json` or `.parquet`, compressed or not."""
    form = form_of(Path(name))
    return form is not None and form.format != "txt" and bare_name(Path(name)) != ""


def stem_of(name: str) -> str:
    """The name of a file of records without its endings."""
    return bare_name(Path(name)) if has_records(name) else name


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
      Unreadable: the file is missing or damaged, or something else than its name says.
      UserError: the disk or the storage fails.
    """
    form = form_of(path)
    try:
        if form is not None and form.format == "parquet":
            yield from _rows(path)
            return
        with path.open("rb") as file:
            yield from _lines(path, unpacked(path, file))
    except FileNotFoundError:
        raise Unreadable("missing_files", f"{path} is missing") from None
    except (OSError, *DAMAGE) as error:
        check_damage(path, error)
        wrong = not_packed(path) or first_line(error)
        raise Unreadable("unreadable_files", f"{path} cannot be read: {wrong}") from None


def place(path: AnyPath, number: int) -> str:
    """How a message names a record: `FILE:LINE`, or `FILE: row N` of parquet."""
    return f"{path}: row {number}" if path.name.lower().endswith(".parquet") else f"{path}:{number}"


def _rows(path: AnyPath) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path if isinstance(path, Path) else path.open("rb")) as file:
        number = 0
        for batch in file.iter_batches(_ROWS):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                raise Unreadable("unreadable_files", f"{path}: a row after {number} is not UTF-8") from None
            for row in rows:
                number += 1
                yield number, row


def _lines(path: AnyPath, file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    began = False
    for number, line in enumerate(file, start=1):
        if not began:
            line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            began = True
            if (other := something_else(path, line[:HEAD_BYTES])) is not None:
                raise Unreadable("unreadable_files", f"{path} {other}")
            if line.lstrip().startswith(b"["):
                yield from _list(path, line + file.read(), number)
                return
        if not line.isspace():
            yield number, _parse(path, line)


def _parse(path: AnyPath, line: bytes) -> Any:
    """The object on a line, or why it is none."""
    try:
        return parse_object(line)
    except ValueError as error:
        return NoRecord(str(error), from_latin_1(path, line))


def _list(path: AnyPath, data: bytes, number: int) -> Iterator[tuple[int, Any]]:
    """The objects of one JSON list that begins on line `number`, each with the line on which it begins."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        yield number + data.count(b"\n", 0, error.start), NoRecord("not UTF-8", from_latin_1(path, data))
        return
    decoder = json.JSONDecoder()
    at, counted = text.index("[") + 1, 0
    while True:
        at = _after_space(text, at)
        number, counted = number + text.count("\n", counted, at), at
        if text.startswith("]", at):
            if _after_space(text, at + 1) < len(text):
                yield number, ValueError("text after the end of the list; write one object a line, without brackets")
            return
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"broken JSON ({first_line(error)}); the rest of the file cannot be read")
            return
        yield number, _parse(path, text[at:end].encode("utf-8", "surrogatepass"))
        at = _after_space(text, end)
        if not text.startswith((",", "]"), at):
            yield number + text.count("\n", counted, at), ValueError("no comma between two objects of the list")
            return
        at += text.startswith(",", at)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
