"""What a task is: conversations to train on or to evaluate with, and a score for a completion."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, overload

from jaxchat.data.text.reading import read_jsonl
from jaxchat.errors import MissingData, UserError
from jaxchat.storage import AnyPath

Conversation = dict[str, Any]
Split = Literal["train", "val", "test"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
VAL_EVERY = 20  # where there is no validation file, every 20th item is for validation and not for training


class _Conversations(ABC, Sequence[Conversation]):
    """A sequence of conversations, each made by `item` when it is asked for."""

    name: str

    @abstractmethod
    def item(self, index: int) -> Conversation:
        """The conversation at `index`, 0 <= index < len(self)."""

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self.name}: index {index} of {len(self)}")
        return self.item(position)


class Task(_Conversations):
    """A sequence of complete conversations, each ending with the right answer as the assistant's message.

    `kind` tells how to evaluate the task: "generative" completions go to `score`; with "multiple_choice" the
    conversation has `letters`, one of which is the answer, and the most likely letter counts as the model's answer.
    """

    kind: Literal["generative", "multiple_choice"] = "generative"

    @abstractmethod
    def score(self, conversation: Conversation, completion: str, *, cut: bool = False) -> float:
        """Scores `completion` as the answer, in [0, 1].

        Args:
          completion: decoded, with its special tokens spelled out.
          cut: the model had no room to end the answer, so that its last word may be incomplete, and does not count.
        """


class ListTask(Task):
    """A task with its items in memory; `limit` takes a part, evenly spread, since files are often sorted by subject."""

    def __init__(self, name: str, items: Sequence[Any], limit: int | None = None):
        self.name = name
        self.items = spread(items, limit)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Conversation:
        return self.items[index]


class Mixture(_Conversations):
    """Several tasks as one sequence, one after another; the loader shuffles them."""

    name = "the mixture"

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tuple(tasks)
        self._ends = list(itertools.accumulate(len(task) for task in self.tasks))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def item(self, index: int) -> Conversation:
        which = bisect.bisect_right(self._ends, index)
        return self.tasks[which].item(index - (self._ends[which - 1] if which else 0))


def spread(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` of `items`, evenly spread, in their order."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def hold_out(items: Sequence[Any], split: Split) -> list[Any]:
    """The part of `items` for training or for validation, where there is no validation file."""
    return [item for i, item in enumerate(items) if (i % VAL_EVERY == VAL_EVERY - 1) == (split == "val")]


def read_items(path: AnyPath, keys: Sequence[str], task: str, *, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads the JSON objects of a file.

    Args:
      path: with or without `.jsonl`; a plain file or else one with `.gz` is read.
      keys: what each object must have.
      task: the task's name, for messages.
      texts: those of `keys` that must be strings.

    Raises:
      MissingData: there is no such file.
      UserError: a broken line, or one that lacks what the task needs.
    """
    plain = path.with_name(path.name.removesuffix(".gz").removesuffix(".jsonl") + ".jsonl")
    candidates = [path] if path.name.endswith(".gz") else [plain, plain.with_name(f"{plain.name}.gz")]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise MissingData(f"{task} needs {candidates[0]}, which does not exist")
    items = read_jsonl(found)
    for number, item in enumerate(items, start=1):
        missing = [key for key in keys if key not in item]
        if missing:
            raise UserError(f"{found}: object {number} has no {missing[0]!r}; {task} needs {', '.join(keys)}")
        others = [key for key in texts if not isinstance(item[key], str)]
        if others:
            kind = type(item[others[0]]).__name__
            raise UserError(f"{found}: object {number}: {others[0]!r} is {kind}, not a string, which {task} needs")
    return items


def question_and_answer(question: str, answer: str | list[dict[str, str]], /, **extra: Any) -> Conversation:
    """A conversation of one question and its answer, with further entries from `extra`."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def multiple_choice_question(question: str, choices: Sequence[str], gold: int, **extra: Any) -> Conversation:
    """A question with a line for each choice, ending in its letter; `gold` is the index of the right choice.

    The letter comes after `=`, where it is a token by itself as in the answer, and after the choice, because a small
    model associates it more easily with what it has just read.
    """
    letters = tuple(LETTERS[: len(choices)])
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    text = f"Multiple choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return question_and_answer(text, letters[gold], letters=letters, **extra)
