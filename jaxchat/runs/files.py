"""Reading and writing the files of a run directory: whatever is wrong with one is said in one line, with a remedy.

A file may be missing, which is for the caller to judge. Everything else (a folder in its place, a link to nothing, no
permission, an empty or cut file, bytes that are not UTF-8, text that is not JSON, a key twice, a value of another type)
is `Damaged`, a `UserError` of the form `PATH is damaged (WHAT); REMEDY`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from jaxchat.errors import UserError
from jaxchat.storage import AnyPath, is_remote, reason, storage_errors

LOCK = ".lock"
LARGEST = 2**63  # of whole numbers; JSON itself has no limit
# How a value must look: `int`, `float` (whole or not, finite), `str`, `bool`, None, or `object` for anything; a tuple
# of alternatives; a list of one schema, for lists of any length; an `Object`.
Schema = Any
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null", object: "a value"}


def read_bytes(path: AnyPath, remedy: str) -> bytes | None:
    """The contents of a file; None if nothing is there.

    Raises:
      Damaged: it is a folder or a link to nothing.
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if not is_remote(path) and os.path.islink(path):
            raise damaged(path, f"it is a link to {os.readlink(path)}, which does not exist", remedy) from None
        return None
    except IsADirectoryError:
        raise damaged(path, "it is a folder", remedy) from None
    except NotADirectoryError as error:
        raise damaged(path.parent, "it is not a folder", remedy) from error
    except storage_errors() as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); correct that, and try again") from error


def read_json(path: AnyPath, schema: Schema, remedy: str) -> Any:
    """The JSON value in a file, which fits `schema`; None if nothing is there.

    Raises:
      Damaged: the message ends with `remedy`.
      UserError: it cannot be read.
    """
    data = read_bytes(path, remedy)
    if data is None:
        return None
    try:
        value = parse_json(data)
    except ValueError as error:
        raise damaged(path, str(error), remedy) from None
    if fault := misfit(value, schema):
        raise damaged(path, fault, remedy)
    return value


@dataclass(frozen=True)
class Object:
    """The schema of a JSON object: keys that it has, keys that it may have, and the schema of all others."""

    required: dict[str, Schema] = field(default_factory=dict)
    optional: dict[str, Schema] = field(default_factory=dict)
    others: Schema = object


class Damaged(UserError):
    """A file that is not as it was written."""


def read_lines(path: AnyPath, schema: Schema, remedy: str) -> tuple[list[Any], int]:
    """The values of a JSON-lines file that fit `schema`, and how many other lines it has; none without the file.

    Raises:
      Damaged, UserError: as `read_bytes`.
    """
    values, bad = [], 0
    for line in split_lines(read_bytes(path, remedy) or b""):
        value = parse_line(line, schema)
        values += [] if value is None else [value]
        bad += value is None and bool(line.strip(b" \0"))  # a file system that crashed may leave zeros
    return values, bad


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a JSON-lines file: not `splitlines`, which splits at characters that text may contain."""
    return data.removesuffix(b"\n").split(b"\n") if data else []


def parse_line(line: bytes, schema: Schema) -> Any:
    """The value of a line; None if it is damaged, or does not fit `schema`."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if misfit(value, schema) is None else None


def damaged(path: AnyPath, what: str, remedy: str) -> Damaged:
    """The error about a file that is not as it was written."""
    return Damaged(f"{path} is damaged ({what}); {remedy}")


def parse_json(data: bytes) -> Any:
    """The value of JSON text in UTF-8.

    Raises:
      ValueError: what is wrong with it, in a few words.
    """
    if not data.strip():
        raise ValueError("it is empty")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        where = "it ends inside a character" if error.end == len(data) else f"byte {error.start} is not UTF-8"
        raise ValueError(where) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, line {error.lineno}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= LARGEST:
        raise ValueError(f"the number {digits[:12]}... is too large")
    return int(digits)


def misfit(value: Any, schema: Schema, name: str = "") -> str | None:
    """Where `value` does not fit `schema`, in words; None if it fits."""
    if isinstance(schema, tuple):
        fault = None
        for one in schema:
            fault = misfit(value, one, name)
            if fault is None:
                break
        return fault
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{name or 'it'} is {_describe(value)}, not a list"
        return next(filter(None, (misfit(one, schema[0], f"{name}[{i}]") for i, one in enumerate(value))), None)
    if isinstance(schema, Object):
        if not isinstance(value, dict):
            return f"{name or 'it'} is {_describe(value)}, not an object"
        if missing := schema.required.keys() - value.keys():
            return f"{name or 'it'} has no {min(missing)!r}"
        known = {**schema.optional, **schema.required}
        faults = (misfit(one, known.get(key, schema.others), f"{name}.{key}".lstrip(".")) for key, one in value.items())
        return next(filter(None, faults), None)
    return None if _is(value, schema) else f"{name or 'it'} is {_describe(value)}, not {_NAMES[schema]}"


def _is(value: Any, kind: Any) -> bool:
    if kind is None or kind is object:
        return kind is object or value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file in one step: a process that is killed here leaves the old file or the new one.

    Raises:
      UserError: something else is in its place, or the disk or storage fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(data)
        part.replace(path)
    except (IsADirectoryError, FileExistsError, NotADirectoryError) as error:
        place = path if isinstance(error, IsADirectoryError) else path.parent
        raise UserError(f"{place} is in the way of what is to be written; move it aside, and try again") from error
    except storage_errors() as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); correct that, and try again") from error


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a value as indented JSON, as `write_bytes` does."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def free_name(path: AnyPath) -> AnyPath:
    """`NAME.old-K` beside a path, with the first K that is free."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside
