"""An answer while it grows: its tokens and text, the call of a tool in it, and what ends it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from jaxchat.infer.request import NO_OUTPUT, Finish, NewToken, NoOutput, Output, Request
from jaxchat.infer.scheduler import Row
from jaxchat.infer.settings import Level
from jaxchat.infer.text import TextStream
from jaxchat.tokenizer import BaseTokenizer

SHORT_OUTPUT = 64  # tokens of a tool's output that is never shortened: the calculator's 54 characters fit


@dataclass(frozen=True)
class Completion:
    """What a row wrote after its prompt.

    Attributes:
      tokens: without the token that stopped the row.
      sampled: False for each token that was forced in as a tool's answer.
      stop: the token that stopped the row; None if it reached `max_new_tokens` or the end of the context.
      logprobs: the log-probabilities of `tokens` and then of `stop`, if they were asked for; NaN where it was forced.
    """

    tokens: list[int]
    sampled: list[bool]
    stop: int | None
    logprobs: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the row ended with a stop token."""
        return self.stop is not None


@functools.lru_cache(maxsize=4)  # answers have one tokenizer each time
def _of_tools(tokenizer: BaseTokenizer) -> list[int]:
    """The ids around a call, and after its output."""
    return [*map(tokenizer.encode_special, ("<|python_start|>", "<|python_end|>", "<|output_end|>"))]


class Answer:
    """The answer to a request, and what of it no step has given back yet.

    Args:
      level: the cheapest level of `settings.py` that serves it.
      stops: the tokens that end it.
      with_text: whether its text is formed, which stop strings need.

    Attributes:
      finish, stopped_by: as in `Output`.
      scores: the prompt's tokens with their log-probabilities, as far as they are known, if they are wanted.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        row: Row,
        tokenizer: BaseTokenizer,
        *,
        level: Level,
        stops: tuple[int, ...],
        with_text: bool,
    ):
        self.number, self.request, self.row, self.level, self.stops = number, request, row, level, stops
        self.finish: Finish | None = None
        self.stopped_by: int | str | None = None
        # The first token has no log-probability. It is the whole prompt if there is nothing more to read.
        self.scores = [NewToken(row.tokens[0], sampled=False)] if row.scored else []
        self._tokenizer = tokenizer
        *self._python, self._output_end = _of_tools(tokenizer)
        self._stream = TextStream(tokenizer, request.stop) if with_text else None
        self._call: list[int] | None = None  # tokens since <|python_start|>, if a call is open
        self._count = 0  # tokens
        self._tokens: list[NewToken] = []
        self._text = ""

    @property
    def pause(self) -> int:
        """The token at which the row waits for its tool; -1 if it has none."""
        return -1 if self.request.tool is None else self._python[1]

    def add(self, token: NewToken) -> None:
        """Adds a token. `finish` is set if the answer ends with it."""
        self._count += 1
        self._tokens.append(token)
        if token.sampled and token.id in self.stops:
            self.end("stop", token.id)
            return
        if self._stream is not None:
            text, stop = self._stream.add(token.id) if self.request.tool is None else self._beside_calls(token.id)
            self._text += text
            if stop is not None:
                self.end("stop", stop)
        if self.finish is None and self._count == self.row.limit:
            self.end("length")

    def _beside_calls(self, token: int) -> tuple[str, str | None]:
        """The text that a token decides. In a tool's calls and outputs no stop string is looked for."""
        assert self._stream is not None
        before = after = ""
        if token == self._python[0]:
            before, self._stream = self._stream.flush(), TextStream(self._tokenizer)
        text, stop = self._stream.add(token)
        if token == self._output_end and stop is None:
            after, self._stream = self._stream.flush(), TextStream(self._tokenizer, self.request.stop)
        return before + text + after, stop

    def call(self, token: int) -> str | None:
        """Follows the calls of a tool through the tokens that were sampled.

        Returns the text of a call that this token ends. A <|python_end|> without a start ends none.
        """
        start, end = self._python
        if token == start:
            self._call = []
        elif token == end:
            call, self._call = self._call, None
            return None if call is None else self._tokenizer.decode(call)
        elif self._call is not None:
            self._call.append(token)
        return None

    def tool_tokens(self, value: str | NoOutput | None) -> list[int]:
        """The tokens of what a tool has answered. Long ones lose their middle: half of the room stays for the model."""
        if value is NO_OUTPUT:
            return []
        ids = self._tokenizer.encode(value or "", "<|output_start|>", "<|output_end|>")
        room = self.row.limit - self._count
        most = max(SHORT_OUTPUT, room // 2)
        if len(ids) > most:
            gap, tail = self._tokenizer.encode("\n...\n"), most // 4
            ids = [*ids[: most - tail - len(gap)], *gap, *ids[-tail:]]
        return ids[:room]

    def end(self, finish: Finish, stopped_by: int | str | None = None) -> None:
        """Ends the answer. Text that was held back belongs to it, unless a stop string has ended it."""
        self.finish, self.stopped_by = finish, stopped_by
        if self._stream is not None and not isinstance(stopped_by, str):
            self._text += self._stream.flush()

    def take(self) -> Output:
        """What is new since the last time. The prompt's tokens come once all of them are known."""
        prompt: tuple[NewToken, ...] = ()
        if len(self.scores) == self.row.prompt:
            prompt, self.scores = tuple(self.scores), []
        output = Output(self.number, tuple(self._tokens), self._text, self.finish, self.stopped_by, prompt)
        self._tokens, self._text = [], ""
        return output
