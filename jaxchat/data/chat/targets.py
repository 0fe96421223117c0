"""Whether there is anything to train on in conversations: usually an answer that begins within the context."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxchat.data import Trained
from jaxchat.tokenizer.conversation import PARTS

CHUNK = 1024  # conversations whose prompts are encoded together


@dataclass(frozen=True)
class Targets:
    """How many conversations have something to train on, and why the others have not.

    Attributes:
      trainable: those with an answer that begins within the context.
      unanswered: those in which the assistant writes nothing.
      too_long: those whose first answer begins beyond the context.
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


def count_targets(
    conversations: Iterable[dict[str, Any]], tokenizer: Any | None, sequence_len: int, trained: Trained = "assistant"
) -> Targets:
    """Counts what can be trained on in rows of `sequence_len` tokens; those without messages count for nothing.

    Without a tokenizer, only prompts with more words than that are known to be too long. Where all tokens are trained
    on, any conversation has some.
    """
    total, source = Targets(), (conversation for conversation in conversations if conversation["messages"])
    if trained == "all":
        return Targets(trainable=sum(1 for _ in source))
    while chunk := list(itertools.islice(source, CHUNK)):
        found = trainable(chunk, tokenizer, sequence_len)
        total += Targets(found.count(True), found.count(None), found.count(False))
    return total


def trainable(conversations: Sequence[dict[str, Any]], tokenizer: Any | None, sequence_len: int) -> list[bool | None]:
    """For each conversation, whether its first answer begins within the context; None if it has no answer."""
    prompts = [_before_the_answer(conversation["messages"]) for conversation in conversations]
    there = [prompt for prompt in prompts if prompt is not None]
    fitting = iter(_at_most(sequence_len, there, tokenizer))
    return [None if prompt is None else next(fitting) for prompt in prompts]


def fits(conversations: Iterable[dict[str, Any]], tokenizer: Any | None, sequence_len: int) -> Iterator[bool]:
    """For each question, whether the context has room for an answer to it."""
    source = iter(conversations)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield from _at_most(sequence_len - 1, [_question(one["messages"]) for one in chunk], tokenizer)


# Of what precedes an answer: how many special tokens, and which texts.
_Prompt = tuple[int, list[str]]


def _at_most(limit: int, prompts: Sequence[_Prompt], tokenizer: Any | None) -> list[bool]:
    """Whether each prompt has at most `limit` tokens. Few are encoded: no text has more tokens than bytes.

    Nor has one fewer than words, which stand in for tokens where there is no tokenizer.
    """
    found = [around + sum(map(_bytes_of, texts)) <= limit for around, texts in prompts]
    unsure = [place for place, short in enumerate(found) if not short]
    texts = [text for place in unsure for text in prompts[place][1]]
    if tokenizer is None:
        lengths = (len(text.split()) for text in texts)
    else:
        lengths = map(len, tokenizer.encode(texts)) if texts else iter(())
    for place in unsure:
        around, own = prompts[place]
        found[place] = around + sum(itertools.islice(lengths, len(own))) <= limit
    return found


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _before_the_answer(messages: Sequence[dict[str, Any]]) -> _Prompt | None:
    """What precedes the first text that the assistant writes; None if it writes nothing."""
    tokens, texts = 1, []  # <|bos|>
    for message in messages:
        if message["role"] != "assistant":
            tokens += 2
            texts.append(message["content"])
            continue
        tokens += 1
        for part in _parts(message["content"]):
            around, learned = PARTS[part["type"]]
            if learned and part["text"]:
                return tokens + len(around[:1]), texts
            tokens += len(around)
            texts.append(part["text"])
        tokens += 1
    return None


def _question(messages: Sequence[dict[str, Any]]) -> _Prompt:
    """What precedes the answer to the last question."""
    tokens, texts = 2, []  # <|bos|>, and the <|assistant_start|> of the answer
    for message in messages[:-1] if messages[-1]["role"] == "assistant" else messages:
        tokens += 2
        for part in _parts(message["content"]):
            tokens += len(PARTS[part["type"]][0])
            texts.append(part["text"])
    return tokens, texts


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
