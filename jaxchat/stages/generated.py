"""The generated corpus of a run: written once, and again where it is not as it was written."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from etils import epath

from jaxchat.config import Experiment
from jaxchat.data.synthetic import write_synthetic
from jaxchat.runs.files import Damaged, Object, free_name, read_bytes, read_json, write_json
from jaxchat.storage import AnyPath, is_remote

_REMEDY = "move it aside, and the corpus is generated again"
_SETTINGS = dict.fromkeys(("seed", "documents", "conversations"), int)
_COMPLETE = Object(required={**_SETTINGS, "files": Object(others=[int])})


def write_generated(directory: AnyPath, experiment: Experiment, say: Callable[[str], None]) -> None:
    """Leaves the corpus of the experiment's settings in `directory`, which is its alone.

    What is there is kept if it is complete, of these settings and as it was written, as far as that was noted: earlier
    versions of jaxchat noted nothing. A corpus that has changed, or is of other settings, is renamed.

    Raises:
      Damaged: there is a folder where the note of its settings belongs.
    """
    data, began, note = experiment.data, time.perf_counter(), directory / "complete"
    documents, conversations, seed = data.synthetic_documents, data.synthetic_conversations, experiment.seed
    wanted = {"seed": seed, "documents": documents, "conversations": conversations}
    found = _noted(note)
    if found is not None:
        other = {**wanted, **{name: found[name] for name in wanted if name in found}} != wanted
        changed = None if other else _changed(directory, found.get("files", {}))
        if not other and changed is None:
            return
        what = "the corpus of other settings" if other else f"{changed} is not what was generated: the corpus"
        if not is_remote(directory):
            aside = free_name(directory)
            directory.rename(aside)
            say(f"data      {what} is now {aside}")
    say(f"data      generating the synthetic corpus in {directory}")
    write_synthetic(directory, seed=seed, documents=documents, conversations=conversations)
    files = {path.relative_to(directory).as_posix(): _size_and_crc(path) for path in _files(directory) if path != note}
    write_json(epath.Path(note), {**wanted, "files": files})
    say(f"data      done in {time.perf_counter() - began:.0f} s")


def _noted(path: AnyPath) -> dict | None:
    """What is known of a corpus: nothing of one that an earlier version wrote; None for one left unfinished."""
    try:
        return {} if read_bytes(path, _REMEDY) == b"" else read_json(path, _COMPLETE, _REMEDY)
    except Damaged:
        if path.is_dir():
            raise
        return None  # it is written again, to the same bytes


def _changed(directory: AnyPath, files: dict[str, list[int]]) -> str | None:
    """The first of the files that is not as it was written; None if all are."""
    for name, written in files.items():
        path = directory / name
        if not path.is_file() or _size_and_crc(path) != written:
            return name
    return None


def _files(directory: AnyPath) -> list[AnyPath]:
    # Not `rglob`, which cloud storage does not have.
    found = [_files(path) if path.is_dir() else [path] for path in sorted(directory.iterdir())]
    return [path for paths in found for path in paths]


def _size_and_crc(path: AnyPath) -> list[int]:
    data = path.read_bytes()
    return [len(data), zlib.crc32(data)]
