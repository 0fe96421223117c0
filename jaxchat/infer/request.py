"""What the engine is asked for, and what it gives back."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

MOST_ALTERNATIVES = 20  # likeliest tokens that come with a log-probability


class NoOutput(enum.Enum):
    """What a tool returns after whose calls nothing is to follow, not even an empty output."""

    NO_OUTPUT = enum.auto()


NO_OUTPUT = NoOutput.NO_OUTPUT
# The text of a call to the text of its output; None: the tool refuses it, and its output is empty.
Tool = Callable[[str], str | NoOutput | None]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The settings are applied in the order of the attributes.

    Top-k and top-p keep equal logits together: all that equal the last one kept.

    Attributes:
      logit_bias: what is added to the logits of some ids.
      repetition_penalty: divides the positive logits of ids that the prompt or the answer has, and multiplies the
        negative ones (arXiv:1909.05858); 1 changes nothing.
      frequency_penalty: subtracted from the logit of an id for each time that the answer has it.
      presence_penalty: subtracted once from the logit of an id that the answer has.
      temperature: divides the logits; at 0 the highest logit always wins.
      top_k: how many of the likeliest ids can be drawn; None for all.
      top_p: only the likeliest ids can be drawn that together reach this probability (arXiv:1904.09751).
      min_p: only ids can be drawn that are at least this share of the likeliest one's probability (arXiv:2407.01082).
      seed, number: decide the draws, together with how many tokens the answer has; `number` tells apart samples with
        the same seed.
      logprob_temperature: divides the model's logits where log-probabilities are asked for; it decides no draw.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    number: int = 0
    logprob_temperature: float = 1.0


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued.

    Attributes:
      prompt: token ids, at least one.
      stop: texts that end the answer, which does not contain them.
      stop_tokens: ids that end the answer; None for those that end an assistant's turn.
      logprobs: how many alternatives to give with the log-probability of each token, 0 to `MOST_ALTERNATIVES`; None
        for no log-probabilities. They are those of the model, before any setting of `sampling` but
        `logprob_temperature`.
      prompt_logprobs: whether the prompt's tokens get log-probabilities too, with as many alternatives.
      tool: what answers a call between <|python_start|> and <|python_end|>; None for no tool.
      instant: the tool is as fast as the calculator. The engine waits for it, so that what it computes together does
        not depend on chance.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    tool: Tool | None = None
    instant: bool = False


class NewToken(NamedTuple):
    """A token of an answer or, with `prompt_logprobs`, of the prompt.

    Attributes:
      sampled: False for what a tool answered, and for the prompt's tokens.
      logprob: its natural log-probability; None if none was asked for, and for the first token of a prompt.
      alternatives: the likeliest ids and their log-probabilities, likeliest first.
    """

    id: int
    sampled: bool = True
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """What a request has got in one step of the engine.

    Attributes:
      request: the number that `Engine.submit` gave.
      prompt: the prompt's tokens, once, if `prompt_logprobs` asked for them.
      tokens: new tokens of the answer, in order. A stop token is the last of them.
      text: new text of the answer: whole characters, special tokens spelled out, the stop token left out. What may
        become a stop string is held back until it is decided.
      finish: why the answer has ended; None while it goes on. "stop": a stop token or stop string; "length": the limit
        of tokens or the end of the context.
      stopped_by: the stop token or stop string that ended it.
    """

    request: int
    tokens: tuple[NewToken, ...] = ()
    text: str = ""
    finish: Finish | None = None
    stopped_by: int | str | None = None
    prompt: tuple[NewToken, ...] = ()
