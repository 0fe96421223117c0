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
      chunks: the answer's tokens as they come, without the one that ends it.
      forgets: once `chunks` is exhausted, whether turns were forgotten for it, for the first time.
      cut: once `chunks` is exhausted, what cut the answer off; None if the model ended it, or if it was stopped.
    """

    chunks: Generator[list[int], None, None] = field(init=False)
    forgets: bool = False
    cut: str | None = None


class Conversation:
    """The turns so far, as the prompt of the next one.

    Half of the context, or `max_tokens` if that is less, is kept free for an answer, and more when it takes more: the
    oldest turns are forgotten for it. A base model (`base`) has no turns: it continues each text on its own.
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
        answer = Answer()
        answer.chunks = self._generate(answer, question)
        return answer

    def _prompt(self, ids: list[int], answer: Answer, room: int) -> list[int]:
        """The turns that leave `room` after them and `ids`, or half of the context if that is less, and `ids`."""
        room, turns = min(room, self.context // 2), len(self.turns)
        while True:
            before = [token for turn in self.turns for token in turn.question + turn.answer]
            prompt = [self.engine.tokenizer.bos_token_id, *before, *ids]
            if not self.turns or len(prompt) + room <= self.context:
                break
            del self.turns[0]
        if len(self.turns) < turns:
            answer.forgets, self.forgets = not self.forgets or answer.forgets, True
        return prompt

    def _generate(self, answer: Answer, question: list[int]) -> Generator[list[int], None, None]:
        tokenizer, written, ended = self.engine.tokenizer, [], False
        try:
            while not ended and answer.cut is None:
                left = self.max_tokens - len(written)
                prompt = self._prompt([*question, *written], answer, left)
                options = {"seed": self.seed, "tools": not self.base, **self.sampling}
                self.seed += 1
                for chunk in self.engine.stream([prompt], max_new_tokens=left, **options):
                    ended = any(own and token in self.engine.stops for _, token, own in chunk)
                    tokens = [token for _, token, _ in chunk]
                    tokens = tokens[:-1] if ended else tokens  # the row's last
                    written.extend(tokens)
                    yield tokens
                if len(written) == self.max_tokens and not ended:
                    answer.cut = f"--max-tokens {self.max_tokens}"
                # The answer goes on where there are turns to forget for it. The engine does not take up an open call.
                elif not ended and not (self.turns and without_open_call(tokenizer, written) == written):
                    answer.cut = f"the context of {self.context:,} tokens is full"
        finally:
            if (written or ended) and not self.base:
                # The model has only seen conversations whose answers end, and whose tool calls are whole.
                end = tokenizer.encode_special("<|assistant_end|>")
                self.turns.append(Turn(question, [*without_open_call(tokenizer, written), end]))


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
