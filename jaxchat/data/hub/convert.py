"""Converts downloaded files to what tasks read: parquet to JSON lines, row by row, and an archive to its files."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.errors import UserError, check
from jaxchat.tokenizer.conversation import checked_messages

Row = dict[str, Any]
ToItem = Callable[[Row], Row | None]  # gives the item as its task reads it; None for a row that no task can use

_ROWS = 1024  # read at once
_LEVEL = 5  # of gzip: a third smaller than level 1, and twice as fast as level 9


def columns(*names: str) -> ToItem:
    """Takes columns that already have the names that the task expects."""
    return lambda row: {name: row[name] for name in names}


def arc_item(row: Row) -> Row:
    """Converts a question of ARC, whose choices have labels, A to E or 1 to 5, one of which is the answer."""
    choices = {name: row["choices"][name] for name in ("text", "label")}
    return {"query": row["question"], "choices": choices, "gold": choices["label"].index(row["answerKey"])}


def chat_item(row: Row) -> Row | None:
    """Converts a conversation; None if the tokenizer cannot render it."""
    messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
    try:
        checked_messages({"messages": messages})
    except ValueError:
        return None
    return {"messages": messages, **({"source": row["source"]} if row.get("source") else {})}


def write_items(sources: Sequence[Path], target: Path, to_item: ToItem) -> int:
    """Writes the rows of parquet files as JSON lines, gzipped if `target` ends in `.gz`.

    The same rows always give the same bytes.

    Returns:
      How many rows were left out because no task can use them.

    Raises:
      UserError: a file is not parquet, or lacks columns that the task needs.
    """
    left_out = written = 0
    with target.open("wb") as raw:
        # Without a name and a time stamp, which would make the bytes differ.
        packed = gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) if target.suffix == ".gz" else raw
        for source in sources:
            for row in _rows(source):
                try:
                    item = to_item(row)
                except (KeyError, ValueError, TypeError) as error:
                    raise UserError(f"{source.name} does not have the format that jaxchat knows: {error!r}") from None
                if item is None:
                    left_out += 1
                    continue
                packed.write(json.dumps(item, ensure_ascii=False).encode() + b"\n")
                written += 1
        if packed is not raw:
            packed.close()
    check(written > 0, f"{', '.join(source.name for source in sources)}: no row can be used")
    return left_out


def _rows(path: Path) -> Iterator[Row]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path.name} is not a parquet file: {str(error).splitlines()[0]}") from None


def unpack(archive: Path, target: Path, folder: str) -> list[str]:
    """Unpacks the contents of `folder` in a zip file into `target`.

    Returns:
      The paths of the files within `target`.

    Raises:
      UserError: the archive is damaged, lacks the folder, or has a path that leads out of it.
    """
    names = []
    try:
        with zipfile.ZipFile(archive) as files:
            for info in files.infolist():
                path = PurePosixPath(info.filename)
                if info.is_dir() or path.parts[0] != folder or path.name.startswith("."):
                    continue
                inside = path.relative_to(folder)
                check(".." not in inside.parts, f"{archive.name}: {info.filename} leads out of the archive's folder")
                place = target / inside
                place.parent.mkdir(parents=True, exist_ok=True)
                with files.open(info) as source, place.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
                names.append(str(inside))
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive.name} is damaged: {error}") from None
    check(bool(names), f"{archive.name} has no folder {folder!r}")
    return sorted(names)
