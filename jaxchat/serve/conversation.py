"""A conversation with a model: its turns as tokens, and the answer to the next question as it is generated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from jaxchat.errors import UserError, check
from jaxchat.infer.engine import Engine
from jaxchat.infer.request import Output, Request, Sampling, Tool
from jaxchat.serve.saved import message_of, tokens_of
from jaxchat.serve.settings import Settings
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.tools.calculator import calculate


@dataclass(frozen=True)
class Turn:
    """A question, and its answer as token ids, with special tokens."""

    question: str
    answer: list[int]


@dataclass
class Answer:
    """An answer that is being generated.

    Attributes:
      chunks: the answer's tokens as they come, without the one that ends it; an empty list while nothing comes.
      forgets: once `chunks` is exhausted, whether turns were forgotten for it, for the first time.
      cut: once `chunks` is exhausted, what cut the answer off; None if the model ended it, or if it was stopped.
    """

    chunks: Generator[list[int], None, None] = field(init=False)
    forgets: bool = False
    cut: str | None = None


class Conversation:
    """The turns so far, as the prompt of the next one.

    Half of the context, or the setting `max_tokens` if that is less, is kept free for an answer, and more when it takes
    more: the oldest turns are forgotten for it. A base model (`base`) has no turns: it continues each text on its own.

    Attributes:
      system: text that the model finds before its first question; empty for none.
      unanswered: the last question, if nothing of an answer was kept.
      answering: whether an answer is being generated.
    """

    def __init__(self, engine: Engine, settings: Settings, *, base: bool, tool: Tool | None = calculate):
        self.engine, self.settings, self.base = engine, settings, base
        self.tool = None if base else tool
        self.context = engine.model_config.sequence_len
        self.system, self.answering = "", False
        self.clear()

    def clear(self) -> None:
        """Forgets all turns; the system prompt and the settings stay."""
        self.turns: list[Turn] = []
        self.unanswered: str | None = None
        self.forgets = False  # whether turns have been forgotten

    def instruct(self, system: str) -> None:
        """Sets the system prompt; empty for none.

        Raises:
          UserError: it is a base model, or the text takes more than half of the context.
        """
        self._check_chat("has no system prompt")
        size = len(self.engine.tokenizer.encode(system)) if system else 0
        check(
            size <= self.context // 2,
            f"this system prompt has {size:,} tokens; at most {self.context // 2:,} fit, half of the model's context",
        )
        self.system = system

    def ask(self, text: str) -> Answer:
        """The answer to `text`. The turn is added when the answer's chunks are exhausted or closed.

        Raises:
          UserError: the text alone leaves no room for an answer in the context.
        """
        return self._answer(text, again=False)

    def retry(self) -> Answer:
        """Another answer to the last question. It replaces the first one as soon as it has begun.

        Raises:
          UserError: there is no question yet.
        """
        if self.unanswered is not None:
            return self._answer(self.unanswered, again=False)
        check(bool(self.turns), "there is no question yet that could be asked again")
        return self._answer(self.turns[-1].question, again=True)

    def undo(self) -> str:
        """Takes back the last question, which is returned, and its answer.

        Raises:
          UserError: there is none.
        """
        self._check_chat("continues each text on its own; there is nothing to take back")
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        check(bool(self.turns), "there is nothing to take back")
        return self.turns.pop().question

    def messages(self) -> list[dict[str, Any]]:
        """The conversation in the form of `serve.saved`.

        Raises:
          UserError: it is a base model, or nothing has been said.
        """
        self._check_chat("continues each text on its own; there is no conversation to save")
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append(message_of(self.engine.tokenizer, turn.answer[:-1]))
        if self.unanswered is not None:
            messages.append({"role": "user", "content": self.unanswered})
        check(bool(messages), "there is nothing to save yet")
        return messages

    def resume(self, messages: list[dict[str, Any]]) -> None:
        """Goes on with other messages, of the form of `serve.saved`, instead of those so far.

        Raises:
          UserError: it is a base model, or the system prompt is too long.
        """
        self._check_chat("continues each text on its own; it cannot go on with a conversation")
        system = [message["content"] for message in messages[:1] if message["role"] == "system"]
        self.instruct("".join(system))
        messages = messages[len(system) :]
        self.clear()
        end = self.engine.tokenizer.encode_special("<|assistant_end|>")
        for question, answer in zip(messages[::2], messages[1::2], strict=False):
            self.turns.append(Turn(question["content"], [*tokens_of(self.engine.tokenizer, answer), end]))
        if len(messages) % 2:
            self.unanswered = messages[-1]["content"]

    def _check_chat(self, otherwise: str) -> None:
        check(not self.base, f"a base model {otherwise}")

    def _answer(self, text: str, *, again: bool) -> Answer:
        """The answer to `text`, which is the question of the last turn if it is asked `again`."""
        count, whole = len(self.engine.tokenizer.encode(text)), len(self._question(text, first=True))
        fits = max(0, self.context - 2 - (whole - count))  # <|bos|>, and at least one token of an answer
        if count > fits:
            raise UserError(
                f"this message has {count:,} tokens; at most {fits:,} fit into the model's context of "
                f"{self.context:,}{' with the system prompt' if self.system else ''}; shorten it"
            )
        answer = Answer()
        answer.chunks = self._generate(answer, text, again)
        return answer

    def _question(self, text: str, *, first: bool) -> list[int]:
        tokenizer = self.engine.tokenizer
        if self.base:
            return tokenizer.encode(text)
        # As in training, where the system's message is joined to the user's first one.
        ids = tokenizer.encode(f"{self.system}\n\n{text}" if first and self.system else text)
        before, after = ["<|user_start|>"], ["<|user_end|>", "<|assistant_start|>"]
        return [*map(tokenizer.encode_special, before), *ids, *map(tokenizer.encode_special, after)]

    def _prompt(self, text: str, written: list[int], answer: Answer, room: int) -> list[int]:
        """The prompt for `text`, after the turns that leave `room`, or half of the context if that is less."""
        room, turns = min(room, self.context // 2), len(self.turns)
        while True:
            prompt = [self.engine.tokenizer.bos_token_id]
            for turn in self.turns:
                prompt += self._question(turn.question, first=turn is self.turns[0]) + turn.answer
            prompt += self._question(text, first=not self.turns) + written
            if not self.turns or len(prompt) + room <= self.context:
                break
            del self.turns[0]
        if len(self.turns) < turns:
            answer.forgets, self.forgets = not self.forgets or answer.forgets, True
        return prompt

    def _generate(self, answer: Answer, text: str, again: bool) -> Generator[list[int], None, None]:
        tokenizer, written, ended = self.engine.tokenizer, [], False
        before = self.turns.pop() if again else None
        self.unanswered = text
        try:
            while not ended and answer.cut is None:
                left = self.settings.max_tokens - len(written)
                prompt = self._prompt(text, written, answer, left)
                with contextlib.closing(self._stream(prompt, left)) as outputs:
                    for output in outputs:
                        ended = ended or output.finish == "stop"
                        tokens = [token.id for token in output.tokens]
                        tokens = tokens[:-1] if ended else tokens  # the token that stopped it
                        written.extend(tokens)
                        yield tokens
                if len(written) == self.settings.max_tokens and not ended:
                    answer.cut = f"--max-tokens {self.settings.max_tokens}"
                # The answer goes on where there are turns to forget for it. The engine does not take up an open call.
                elif not ended and not (self.turns and without_open_call(tokenizer, written) == written):
                    answer.cut = f"the context of {self.context:,} tokens is full"
        finally:
            if (written or ended) and not self.base:
                # The model has only seen conversations whose answers end, and whose tool calls are whole.
                end = tokenizer.encode_special("<|assistant_end|>")
                self.turns.append(Turn(text, [*without_open_call(tokenizer, written), end]))
                self.unanswered = None
            elif before is not None:
                self.turns.append(before)
                self.unanswered = None

    def _stream(self, prompt: list[int], most: int) -> Generator[Output, None, None]:
        """What the engine generates after `prompt`, with the next seed; closed early, it frees the engine's row."""
        settings = self.settings
        self.settings = dataclasses.replace(settings, seed=settings.seed + 1)
        sampling = Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
        )
        number = self.engine.submit(Request(prompt, most, sampling, tool=self.tool))
        self.answering = True
        try:
            while self.engine.busy:
                outputs = [output for output in self.engine.step() if output.request == number]
                yield from outputs or [Output(number)]  # nothing new, but a moment to stop
        finally:
            self.answering = False
            self.engine.cancel(number)


def without_open_call(tokenizer: BaseTokenizer, tokens: list[int]) -> list[int]:
    """`tokens` up to a tool call that does not come to the end of its output, if there is one."""
    start, end = map(tokenizer.encode_special, ("<|python_start|>", "<|output_end|>"))
    opened = None
    for at, token in enumerate(tokens):
        if token == start and opened is None:
            opened = at
        elif token == end:
            opened = None
    return tokens[:opened]
