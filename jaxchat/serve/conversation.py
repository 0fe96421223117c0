"""A conversation with a model: its turns as tokens, and the answer to the next question as it is generated."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field

from jaxchat.errors import UserError
from jaxchat.infer.engine import Engine
from jaxchat.tokenizer import BaseTokenizer


@dataclass(frozen=True)
class Turn:
    """A question and its answer as token ids, with special tokens."""

    question: list[int]
    answer: list[int]


@dataclass
class Answer:
    """An answer that is being generated.

    Attributes:
      forgets: whether the conversation forgets turns here for the first time.
      chunks: the answer's tokens as they come, without the one that ends it.
      cut: once `chunks` is exhausted, what cut the answer off; None if the model ended it, or if it was stopped.
    """

    forgets: bool
    chunks: Generator[list[int], None, None] = field(init=False)
    cut: str | None = None


class Conversation:
    """The turns so far, as the prompt of the next one.

    Half of the context, or `max_tokens` if that is less, is kept free for an answer: the oldest turns are forgotten for
    it. A base model (`base`) has no turns: it continues each text on its own.
    """

    def __init__(
        self, engine: Engine, *, base: bool, temperature: float, top_k: int | None, seed: int, max_tokens: int
    ):
        self.engine, self.base, self.max_tokens = engine, base, max_tokens
        self.context = engine.model_config.sequence_len
        self.sampling = {"temperature": temperature, "top_k": top_k}
        self.seed = seed
        self.turns: list[Turn] = []
        self.forgets = False  # whether turns have been forgotten

    def ask(self, text: str) -> Answer:
        """The answer to `text`. The turn is added when the answer's chunks are exhausted or closed.

        Raises:
          UserError: the text alone leaves no room for an answer in the context.
        """
        tokenizer = self.engine.tokenizer
        ids = tokenizer.encode(text)
        question = ids
        if not self.base:
            before, after = ["<|user_start|>"], ["<|user_end|>", "<|assistant_start|>"]
            question = [*map(tokenizer.encode_special, before), *ids, *map(tokenizer.encode_special, after)]
        fits = self.context - 2 - (len(question) - len(ids))  # <|bos|>, and at least one token of an answer
        if len(ids) > fits:
            raise UserError(
                f"this message has {len(ids):,} tokens; at most {max(0, fits):,} fit into the model's context of "
                f"{self.context:,}; shorten it"
            )
        first, turns = not self.forgets, len(self.turns)
        room = min(self.max_tokens, self.context // 2)
        while self.turns and len(self._prompt(question)) + room > self.context:
            del self.turns[0]
        self.forgets |= len(self.turns) < turns
        answer = Answer(forgets=first and self.forgets)
        answer.chunks = self._generate(answer, self._prompt(question), question)
        return answer

    def _prompt(self, question: list[int]) -> list[int]:
        turns = [token for turn in self.turns for token in turn.question + turn.answer]
        return [self.engine.tokenizer.bos_token_id, *turns, *question]

    def _generate(self, answer: Answer, prompt: list[int], question: list[int]) -> Generator[list[int], None, None]:
        stream = self.engine.stream(
            [prompt], max_new_tokens=self.max_tokens, **self.sampling, seed=self.seed, tools=not self.base
        )
        self.seed += 1
        written: list[int] = []
        ended = False
        try:
            for chunk in stream:
                ended = any(own and token in self.engine.stops for _, token, own in chunk)
                tokens = [token for _, token, _ in chunk]
                tokens = tokens[:-1] if ended else tokens  # the row's last
                written.extend(tokens)
                yield tokens
            if not ended:
                full = len(prompt) + self.max_tokens >= self.context
                answer.cut = (
                    f"the context of {self.context:,} tokens is full" if full else f"--max-tokens {self.max_tokens}"
                )
        finally:
            if (written or ended) and not self.base:
                # The model has only seen conversations whose answers end, and whose tool calls are whole.
                end = self.engine.tokenizer.encode_special("<|assistant_end|>")
                self.turns.append(Turn(question, [*without_open_call(self.engine.tokenizer, written), end]))


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
