"""The items of a task's file: read, checked one by one, split and limited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxchat.data.records import NoRecord, find_records, place, read_records
from jaxchat.data.text.reading import Findings, Unreadable, kind_of
from jaxchat.errors import MissingData, check
from jaxchat.storage import AnyPath

VAL_EVERY = 20  # where there is no validation file, every 20th item is for validation and not for training
Item = TypeVar("Item")


def read_items(
    path: AnyPath,
    parse: Callable[[Mapping[str, Any]], Item],
    task: str,
    findings: Findings,
    *,
    kind: str = "bad_questions",
    keep_places: bool = False,
) -> list[Any]:
    """The items of a file, as `parse` makes them of its records.

    Args:
      path: of the file, whose endings may differ: `train.jsonl` is also read from `train.JSONL.gz` or `train.parquet`.
      parse: raises ValueError for a record that the task cannot use.
      task: the task's name, for messages.
      findings: told about each such record (`FILE:LINE: ...`), which it refuses or counts as one of `kind`.
      keep_places: puts None where a record is left out, so that leaving it out moves no other.

    Raises:
      MissingData: there is no such file.
      UserError: a bad record, or a file that cannot be read, where they are refused; an empty file.
    """
    found = find_records(path)
    if found is None:
        raise MissingData(f"{task} needs {path}, which does not exist")
    items: list[Any] = []
    before = findings.left_out.total()
    try:
        for number, record in read_records(found):
            try:
                items.append(parse(_no_error(record)))
            except ValueError as error:
                remedy = error.remedy if isinstance(error, NoRecord) else ""
                findings.bad(kind, f"{place(found, number)}: {error}", remedy)
                if keep_places:
                    items.append(None)
    except Unreadable as error:
        findings.bad(error.kind, str(error))
    check(bool(items) or findings.left_out.total() > before, f"{found} is empty; fill or remove it")
    return items


def _no_error(record: Any) -> Mapping[str, Any]:
    if isinstance(record, ValueError):
        raise record
    return record


def check_texts(record: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError unless the record has strings in all these fields."""
    for name in names:
        if record.get(name) is None:
            wrong = "is null" if name in record else f"is missing; the fields are: {', '.join(record) or 'none'}"
            raise ValueError(f"{name!r} {wrong}")
        if not isinstance(record[name], str):
            raise ValueError(f"{name!r} is {kind_of(record[name])}, not a string")


def hold_out(items: Sequence[Any], split: str) -> list[Any]:
    """The part of `items` for training or for validation ("val"), where there is no validation file.

    Validation gets every 20th, or the last of fewer; a single item is for training.
    """
    every = min(VAL_EVERY, len(items)) if len(items) > 1 else VAL_EVERY
    return [item for i, item in enumerate(items) if (i % every == every - 1) == (split == "val")]


def spread(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of `items`, evenly spread, in their order."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
