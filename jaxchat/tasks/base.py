"""What a task is: conversations to train on or to evaluate with, and a score for a completion."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from jaxchat.tasks.items import spread

Conversation = dict[str, Any]
Split = Literal["train", "val", "test"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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


@dataclass(frozen=True)
class Mode:
    """How another program asks, where that is part of what its scores mean; evaluation follows it in everything.

    Its questions are asked at their full length, even where they do not fit the model's context.

    Attributes:
      prompt_tokens: of a prompt that are kept, before <|assistant_start|>.
      max_new_tokens: of an answer.
      top_k, seed: of answers that are drawn, at a temperature above 0.
      calculator: the text of a call to its value, or None, after which nothing is put into the answer.
      any_of_samples: a question that is asked several times scores its best sample, not the mean.
    """

    prompt_tokens: int
    max_new_tokens: int
    top_k: int
    seed: int
    calculator: Callable[[str], str | None]
    any_of_samples: bool


class Task(_Conversations):
    """A sequence of complete conversations, each ending with the right answer as the assistant's message.

    `kind` tells how to evaluate the task: "generative" completions go to `score`; with "multiple_choice" the
    conversation has `letters`, one of which is the answer, and the most likely letter counts as the model's answer.
    A task with a `mode` is asked as another program does; without, as the caller wants.
    """

    kind: Literal["generative", "multiple_choice"] = "generative"
    mode: Mode | None = None

    def subset(self, limit: int | None) -> Sequence[int]:
        """The indices of at most `limit` items, in the order in which they are asked: evenly spread over the task."""
        return spread(range(len(self)), limit)

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


def question_and_answer(question: str, answer: str | list[dict[str, str]], /, **extra: Any) -> Conversation:
    """A conversation of one question and its answer, with further entries from `extra`."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def calculations_of(conversation: Conversation) -> int:
    """The calls of the calculator in a conversation's last message, a right answer: how many steps it takes."""
    content = conversation["messages"][-1]["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "python" for part in content)


def multiple_choice_question(
    question: str,
    choices: Sequence[str],
    gold: int,
    *,
    heading: str = "Multiple choice question",
    letters: Sequence[str] | None = None,
    **extra: Any,
) -> Conversation:
    """A question with a line for each choice, ending in its letter; `gold` is the index of the right choice.

    The letter comes after `=`, where it is a token by itself as in the answer, and after the choice, because a small
    model associates it more easily with what it has just read. `letters` are A, B, C, ... if there are no others.
    """
    letters = tuple(letters or LETTERS[: len(choices)])
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, letters, strict=True))
    text = f"{heading}: {question}\n{lines}\nRespond only with the letter of the correct answer."
    return question_and_answer(text, letters[gold], letters=letters, **extra)
