"""How a start takes a run directory: it alone, from the beginning with --fresh, or some stages again with --redo."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from jaxchat.config import STAGES
from jaxchat.errors import check, closest
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import free_name
from jaxchat.runs.lock import locked
from jaxchat.storage import is_remote


def take(name: str | os.PathLike, held: contextlib.ExitStack, *, fresh: bool = False) -> None:
    """Locks a run directory until `held` ends; with `fresh`, an earlier run is first renamed to NAME.old-K.

    Raises:
      UserError: the directory is not a run, or another process trains in it.
    """
    far = fresh and is_remote(name)
    check(not far, f"--fresh renames runs on this machine only, not {name}; choose another --run-dir")
    there = RunDirectory(name).is_run()
    held.enter_context(locked(name))
    if fresh and there:
        directory = Path(name).absolute()
        aside = free_name(directory)
        directory.rename(aside)
        print(f"the earlier run is now {aside}")
        held.enter_context(locked(name))


def stages_to_redo(text: str | None, stages: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that `--redo` names, of those that this start runs.

    Raises:
      UserError: an unknown one, or one that this start does not run.
    """
    named = tuple(text.split(",")) if text is not None else ()
    for stage in named:
        check(stage in STAGES, f"--redo: unknown stage {stage!r}{closest(stage, STAGES)} Stages: {', '.join(STAGES)}")
        check(stage in stages, f"--redo={stage}: this start runs only {', '.join(stages)}; name it in --stages too")
    return named
