"""Tasks by name: what to fine-tune on, to reward and to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, to_path
from jaxchat.tasks.base import Conversation, Mixture, Split, Task
from jaxchat.tasks.checkable import load_checkable
from jaxchat.tasks.conversations import load_chat, load_file, load_smoltalk
from jaxchat.tasks.gsm8k import load_gsm8k
from jaxchat.tasks.humaneval import load_humaneval
from jaxchat.tasks.multiple_choice import load_arc, load_mmlu
from jaxchat.tasks.spelling import load_spelling

__all__ = ["TASKS", "Conversation", "Mixture", "Split", "Task", "load_task", "parse_mixture"]

_LOADERS: dict[str, Callable[[Split, AnyPath, int | None], Task]] = {
    "chat": load_chat,
    "smoltalk": load_smoltalk,
    "mmlu": load_mmlu,
    "arc_easy": partial(load_arc, "arc_easy"),
    "arc_challenge": partial(load_arc, "arc_challenge"),
    "gsm8k": load_gsm8k,
    "humaneval": load_humaneval,
    "spelling": load_spelling,
    "sums": partial(load_checkable, "sums"),
    "letters": partial(load_checkable, "letters"),
    "facts": partial(load_checkable, "facts"),
    "long_sums": partial(load_checkable, "long_sums"),
}
TASKS = tuple(_LOADERS)
_CONVERSATIONS = ("chat", "smoltalk")  # for training only, like files of conversations
_FILE_ENDS = (".jsonl", ".jsonl.gz")


def load_task(name: str, split: Split, data_dir: AnyPath | str, limit: int | None = None) -> Task:
    """Loads the task `name`: one of `TASKS`, from the data folder, or the path of a .jsonl file of conversations.

    Args:
      limit: takes at most this many items, evenly spread over the task.

    Raises:
      MissingData: the task's file for this split is missing; the message names it.
      UserError: an unknown task, or a broken file.
    """
    check(limit is None or limit >= 1, f"task {name} is limited to {limit} examples; take at least 1")
    if name.endswith(_FILE_ENDS):
        return load_file(to_path(name), split, limit)
    if name not in _LOADERS:
        raise UserError(_unknown(name))
    return _LOADERS[name](split, to_path(data_dir), limit)


def parse_mixture(entries: Sequence[str]) -> list[tuple[str, int | None]]:
    """Parses entries such as `chat` or `gsm8k:2000` into pairs of a task and a number of examples (None for all).

    Raises:
      UserError: an unknown task, or an impossible number of examples.
    """
    parsed: list[tuple[str, int | None]] = []
    for entry in entries:
        name, colon, number = entry.rpartition(":")
        if not colon or entry.endswith(_FILE_ENDS):
            name, number = entry, ""
        elif not (number.isascii() and number.isdigit() and int(number) >= 1):
            raise UserError(f"mixture entry {entry!r}: {number!r} is not a number of examples; write NAME or NAME:2000")
        if name not in _LOADERS and not name.endswith(_FILE_ENDS):
            raise UserError(_unknown(name))
        parsed.append((name, int(number) if number else None))
    return parsed


def check_scorable(entries: Sequence[str]) -> None:
    """Raises UserError as `parse_mixture` does, and for conversations, whose answers cannot be checked."""
    for name, _ in parse_mixture(entries):
        check(
            name not in _CONVERSATIONS and not name.endswith(_FILE_ENDS),
            f"{name} has no answers that can be checked; use tasks that have, such as gsm8k",
        )


def _unknown(name: str) -> str:
    return f"unknown task {name!r}{closest(name, TASKS)} Tasks: {', '.join(TASKS)}, or the path of a .jsonl file"
