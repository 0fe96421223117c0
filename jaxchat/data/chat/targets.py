"""Whether there is anything to train on in conversations: an answer of the assistant that begins within the context."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.tokenizer.conversation import PARTS

CHUNK = 1024  # conversations whose prompts are encoded together


@dataclass(frozen=True)
class Targets:
    """How many conversations have something to train on, and why the others have not.

    Attributes:
      trainable: those with an answer that begins within the context.
      unanswered: those in which the assistant writes nothing.
      too_long: those whose first answer begins beyond the context. Without a tokenizer none is known to.
    """

    trainable: int = 0
    unanswered: int = 0
    too_long: int = 0

    @property
    def total(self) -> int:
        return self.trainable + self.unanswered + self.too_long

    def __add__(self, other: Targets) -> Targets:
        return Targets(
            self.trainable + other.trainable, self.unanswered + other.unanswered, self.too_long + other.too_long
        )

    def why_not(self, sequence_len: int) -> str:
        """Why conversations have nothing to train on, such as `40 prompts are longer than model.sequence-len 128`."""
        reasons = []
        if self.too_long:
            prompts = "prompt is" if self.too_long == 1 else "prompts are"
            reasons.append(f"{self.too_long:,} {prompts} longer than model.sequence-len {sequence_len}")
        if self.unanswered:
            reasons.append(f"in {self.unanswered:,} the assistant writes nothing")
        return ", ".join(reasons)


def count_targets(conversations: Iterable[dict[str, Any]], tokenizer: Any | None, sequence_len: int) -> Targets:
    """Counts what can be trained on in rows of `sequence_len` tokens; exactly, if there is a tokenizer."""
    total, source = Targets(), iter(conversations)
    while chunk := list(itertools.islice(source, CHUNK)):
        found = list(trainable(chunk, tokenizer, sequence_len))
        total += Targets(found.count(True), found.count(None), found.count(False))
    return total


def trainable(conversations: Sequence[dict[str, Any]], tokenizer: Any | None, sequence_len: int) -> list[bool | None]:
    """For each conversation, whether its first answer begins within the context; None if it has no answer.

    Few prompts are encoded: no text has more tokens than bytes.
    """
    found: list[bool | None] = []
    unsure: list[tuple[int, int, list[str]]] = []  # place, tokens around the texts, texts before the answer
    for place, conversation in enumerate(conversations):
        before = _before_the_answer(conversation["messages"])
        found.append(None if before is None else True)
        if before is not None and tokenizer is not None:
            around, texts = before
            if around + sum(map(_bytes_of, texts)) > sequence_len:
                unsure.append((place, around, texts))
    if unsure:
        assert tokenizer is not None
        lengths = map(len, tokenizer.encode([text for _, _, texts in unsure for text in texts]))
        for place, around, texts in unsure:
            found[place] = around + sum(itertools.islice(lengths, len(texts))) <= sequence_len
    return found


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _before_the_answer(messages: Sequence[dict[str, Any]]) -> tuple[int, list[str]] | None:
    """What precedes the first text that the assistant writes: how many special tokens, and which texts; None if it
    writes nothing."""
    tokens, texts = 1, []  # <|bos|>
    for message in messages:
        content = message["content"]
        if message["role"] != "assistant":
            tokens += 2
            texts.append(content)
            continue
        tokens += 1
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            around, learned = PARTS[part["type"]]
            if learned and part["text"]:
                return tokens + len(around[:1]), texts
            tokens += len(around)
            texts.append(part["text"])
        tokens += 1
    return None
