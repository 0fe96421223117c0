"""The decisions of an evaluation, kept in a folder, from which it goes on if it was interrupted.

    FOLDER/LABEL.jsonl      the decisions of a task, one item a line
    FOLDER/settings.json    for each task a digest of all that its decisions depend on

Process 0 alone reads and writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from jaxchat.devices.processes import on_process_zero
from jaxchat.runs.files import Object, free_name, read_json, read_lines, write_bytes, write_json
from jaxchat.storage import to_path

SETTINGS = "settings.json"
SAVE_SECONDS = 20.0
_LINE = Object(required={"index": int, "right": bool}, optional={"aligned": bool})
_REMEDY = "delete the folder to evaluate again"


class Kept:
    """The decisions of some tasks: what was there, and what is added.

    Args:
      folder: None to keep them nowhere but in memory.
      digests: of each task; a file with the decisions of other settings is moved aside.
      counts: of each task's items.

    Attributes:
      right: for each task whether each item was answered right; None where that is not yet known.
      aligned: for each task and item as in `Question`.
    """

    def __init__(self, folder: str | os.PathLike | None, digests: Mapping[str, str], counts: Mapping[str, int]):
        self._folder = None if folder is None else epath.Path(to_path(folder))
        self._digests, self._lines = dict(digests), {label: {} for label in counts}
        self._changed: set[str] = set()
        self._saved, self._saving = time.monotonic(), threading.Lock()
        self.right: dict[str, list[bool | None]] = {label: [None] * count for label, count in counts.items()}
        self.aligned: dict[str, list[bool]] = {label: [True] * count for label, count in counts.items()}
        known = on_process_zero(lambda: self._read(counts)) if self._folder else {}
        for label, (rights, unaligned) in known.items():
            self.right[label] = [{"1": True, "0": False}.get(mark) for mark in rights]
            for index in unaligned:
                self.aligned[label][index] = False

    def add(self, label: str, line: dict[str, Any]) -> None:
        """Adds a decision: an object with at least `index`, `right` and, where it is false, `aligned`."""
        self.right[label][line["index"]] = line["right"]
        self.aligned[label][line["index"]] = line.get("aligned", True)
        if self._folder and jax.process_index() == 0:
            self._lines[label][line["index"]] = line
            self._changed.add(label)

    def save_sometimes(self) -> None:
        """Saves if that was long ago."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the files of the tasks with new decisions, each in one step."""
        with self._saving:
            while self._folder and self._changed:
                label = self._changed.pop()
                lines = [json.dumps(line, ensure_ascii=False) + "\n" for _, line in sorted(self._lines[label].items())]
                # Half a surrogate pair has no UTF-8; JSON writes it as an escape of this form.
                write_bytes(self._folder / f"{label}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
            self._saved = time.monotonic()

    def _read(self, counts: Mapping[str, int]) -> dict[str, tuple[str, list[int]]]:
        """For each task a mark for each item (0, 1, or ? where it is not known), and the indices that are not aligned;
        and makes the folder ready."""
        assert self._folder
        known, before = {}, read_json(self._folder / SETTINGS, Object(others=str), _REMEDY) or {}
        for label, count in counts.items():
            path = self._folder / f"{label}.jsonl"
            if before.get(label) == self._digests[label]:
                lines, _ = read_lines(path, _LINE, _REMEDY)
                self._lines[label] = {line["index"]: line for line in lines if 0 <= line["index"] < count}
            elif path.exists():
                path.replace(free_name(path))
            own = self._lines[label]
            marks = "".join(str(int(own[i]["right"])) if i in own else "?" for i in range(count))
            known[label] = marks, [i for i, line in own.items() if not line.get("aligned", True)]
        write_json(self._folder / SETTINGS, {**before, **self._digests})
        return known


def digest(*facts: Any) -> str:
    """A short digest of facts that JSON can express."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
