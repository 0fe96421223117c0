"""Tasks by name: what to fine-tune on, to reward and to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from jaxchat.data.records import has_records
from jaxchat.data.text.reading import Findings
from jaxchat.errors import UserError, check, closest
from jaxchat.storage import AnyPath, to_path
from jaxchat.tasks.base import Conversation, Mixture, Split, Task
from jaxchat.tasks.checkable import load_checkable
from jaxchat.tasks.conversations import load_chat, load_file, load_smoltalk
from jaxchat.tasks.gsm8k import load_gsm8k
from jaxchat.tasks.humaneval import load_humaneval
from jaxchat.tasks.identity import load_own_identity
from jaxchat.tasks.multiple_choice import load_arc, load_mmlu
from jaxchat.tasks.nanochat import tasks as nanochat
from jaxchat.tasks.programs import NAMES as OWN_PROGRAMS
from jaxchat.tasks.programs import load_programs
from jaxchat.tasks.spelling import load_spelling
from jaxchat.tasks.word_problems import NAMES as WORD_PROBLEMS
from jaxchat.tasks.word_problems import load_word_problems

__all__ = ["TASKS", "Conversation", "Mixture", "Split", "Task", "load_task", "parse_mixture"]

_LOADERS: dict[str, Callable[[Split, AnyPath, int | None, Findings], Task]] = {
    "chat": load_chat,
    "smoltalk": load_smoltalk,
    "mmlu": load_mmlu,
    "arc_easy": partial(load_arc, "arc_easy"),
    "arc_challenge": partial(load_arc, "arc_challenge"),
    "gsm8k": load_gsm8k,
    "humaneval": load_humaneval,
    "spelling": load_spelling,
    "identity": load_own_identity,
    "sums": partial(load_checkable, "sums"),
    "letters": partial(load_checkable, "letters"),
    "facts": partial(load_checkable, "facts"),
    "long_sums": partial(load_checkable, "long_sums"),
    **{name: partial(load_word_problems, name) for name in WORD_PROBLEMS},
    **{name: partial(load_programs, name) for name in OWN_PROGRAMS},
    "nanochat_arc_easy": partial(nanochat.load_arc, "nanochat_arc_easy"),
    "nanochat_arc_challenge": partial(nanochat.load_arc, "nanochat_arc_challenge"),
    "nanochat_mmlu": nanochat.load_mmlu,
    "nanochat_gsm8k": nanochat.load_gsm8k,
    "nanochat_humaneval": nanochat.load_humaneval,
    "nanochat_spelling": nanochat.load_spelling,
}
TASKS = tuple(_LOADERS)
PROGRAMS = ("humaneval", "nanochat_humaneval", *OWN_PROGRAMS)  # their answers are run to be scored
WITHOUT_DATA = (*WORD_PROBLEMS, *OWN_PROGRAMS)  # generated as they are asked, whatever the data folder has
_CONVERSATIONS = ("chat", "smoltalk")  # for training only, like files of conversations


def load_task(
    name: str, split: Split, data_dir: AnyPath | str, limit: int | None = None, findings: Findings | None = None
) -> Task:
    """Loads the task `name`: one of `TASKS`, from the data folder, or the path of a file of conversations.

    Args:
      limit: takes at most this many items, evenly spread over the task; the first ones where its mode says so.
      findings: told about each bad item, which it counts or refuses; None refuses them.

    Raises:
      MissingData: the task's file for this split is missing; the message names it.
      UserError: an unknown task, a file of conversations that does not exist, or a broken file or item.
    """
    check(limit is None or limit >= 1, f"task {name} is limited to {limit} examples; take at least 1")
    findings = findings or Findings()
    if is_file(name):
        return load_file(name, split, limit, findings)
    if name not in _LOADERS:
        raise UserError(_unknown(name))
    return _LOADERS[name](split, to_path(data_dir), limit, findings)


def is_file(name: str) -> bool:
    """Whether an entry of a mixture is the path of a file rather than the name of a task."""
    return name not in _LOADERS and (has_records(name) or "/" in name or name.startswith("~"))


def parse_mixture(entries: Sequence[str]) -> list[tuple[str, int | None]]:
    """Parses entries such as `chat` or `gsm8k:2000` into pairs of a task and a number of examples (None for all).

    Raises:
      UserError: an unknown task, or an impossible number of examples.
    """
    parsed: list[tuple[str, int | None]] = []
    for entry in entries:
        name, colon, number = entry.rpartition(":")
        if not colon or "/" in number or has_records(entry):
            name, number = entry, ""
        elif not (number.isascii() and number.isdigit() and int(number) >= 1):
            raise UserError(f"mixture entry {entry!r}: {number!r} is not a number of examples; write NAME or NAME:2000")
        if name not in _LOADERS and not is_file(name):
            raise UserError(_unknown(name))
        parsed.append((name, int(number) if number else None))
    return parsed


def check_scorable(entries: Sequence[str]) -> None:
    """Raises UserError as `parse_mixture` does, and for conversations, whose answers cannot be checked."""
    for name, _ in parse_mixture(entries):
        check(
            name not in _CONVERSATIONS and not is_file(name),
            f"{name} has no answers that can be checked; use tasks that have, such as gsm8k",
        )


def _unknown(name: str) -> str:
    return f"unknown task {name!r}{closest(name, TASKS)} Tasks: {', '.join(TASKS)}, or the path of a .jsonl file"
