"""How a start takes a run directory: it alone, from the beginning with --fresh, or some stages again with --redo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from jaxchat.config import STAGES, shown
from jaxchat.errors import UserError, check, closest
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import LOCK, free_name
from jaxchat.runs.lock import locked
from jaxchat.stopping import done_once
from jaxchat.storage import is_remote

CONFIG = "config.json"


def take(name: str | os.PathLike, held: contextlib.ExitStack, *, fresh: bool = False) -> None:
    """Locks a run directory until `held` ends; with `fresh`, an earlier run is first renamed to NAME.old-K.

    A start that is refused before it has made anything, as `held` sees by the UserError, leaves all as it was.

    Raises:
      UserError: the directory is not a run, or another process trains in it.
    """
    far = fresh and is_remote(name)
    check(not far, f"--fresh renames runs on this machine only, not {name}; choose another --run-dir")
    there = RunDirectory(name).is_run()
    undo = None if there or is_remote(name) else _undo(Path(name))
    held.enter_context(locked(name))
    if fresh and there:
        directory = Path(name).absolute()
        aside = Path(free_name(directory))
        directory.rename(aside)
        print(f"the earlier run is now {aside}")
        undo = _undo(directory, aside)
        held.enter_context(locked(name))
    if fresh:  # also in a new directory: whoever resumes would set aside what this start has saved
        done_once("--fresh")
    if undo is not None:  # not before the lock is held: what is there may be of another start
        held.push(undo)


def _undo(directory: Path, aside: Path | None = None) -> Callable[..., None]:
    """What ends a start that was refused before it made anything: no run directory is left, or the earlier one."""
    was_there = directory.exists()

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, UserError) or not directory.is_dir():
            return
        if not {path.name for path in directory.iterdir()} <= {LOCK, CONFIG}:
            return
        with contextlib.suppress(OSError):
            for path in directory.iterdir():
                path.unlink()
            if not was_there:
                directory.rmdir()
            if aside is not None:
                aside.rename(directory)
                print(f"the earlier run is {directory} again")

    return leave


def check_redo(named: tuple[str, ...], stages: tuple[str, ...]) -> None:
    """Checks the stages that `--redo` names against those that this start runs.

    Raises:
      UserError: an unknown one, or one that this start does not run.
    """
    for stage in named:
        check(
            stage in STAGES, f"--redo: unknown stage {shown(stage)}{closest(stage, STAGES)} Stages: {', '.join(STAGES)}"
        )
        check(stage in stages, f"--redo={stage}: this start runs only {', '.join(stages)}; name it in --stages too")
