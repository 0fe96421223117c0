"""Text folders: finding the files, splitting off the validation side, and reading them block by block."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from jaxchat.config import UserError


def read_jsonl(path: Path) -> list[dict]:
    """Reads one JSON object a line from a plain or gzip-compressed (`.gz`) file; blank lines are skipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object (`FILE:LINE: ...`).
    """
    path = Path(path)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return [_parse_line(path, number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def _parse_line(path: Path, number: int, line: bytes) -> dict:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}:{number}: broken JSON ({error}); fix or remove the line") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: not a JSON object but {type(value).__name__}; write one object a line")
    return value
