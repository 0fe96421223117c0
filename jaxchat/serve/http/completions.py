"""POST /v1/completions: raw text, in which the names of special tokens stand for these tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest

from jaxchat.infer.request import NewToken, Output, Request
from jaxchat.serve.http.errors import ApiError, JsonResponse, expect
from jaxchat.serve.http.fields import COMPLETIONS_ONLY, Fields, is_whole, read_json, refuse_unsupported
from jaxchat.serve.http.generation import (
    EventStream,
    Frames,
    Settings,
    Usage,
    fit,
    read_alternatives,
    read_settings,
    too_long,
    unless_left,
)
from jaxchat.serve.http.messages import LONG
from jaxchat.serve.http.service import Service
from jaxchat.serve.http.serving import Served, ready
from jaxchat.serve.http.spelling import Offsets, Spelling, finite

MOST_ANSWERS = 1024  # prompts times n


class Prompt(NamedTuple):
    """Token ids, the text that echo gives back for them, and how many characters of its tokens that leaves out."""

    ids: list[int]
    text: str
    left_out: int = 0


async def completions(request: HttpRequest) -> JsonResponse | EventStream:
    """Continues texts, at once or as a stream."""
    service, served = ready(request)
    fields = await read_json(request)
    refuse_unsupported(fields, COMPLETIONS_ONLY)
    settings = read_settings(fields, served, {})
    echo = fields.flag("echo")
    expect(echo or settings.max_tokens != 0, "max_tokens is 0; it must be at least 1 without echo", "max_tokens")
    alternatives = None if fields.get("logprobs") is False else read_alternatives(fields, "logprobs")
    prompts = await _prompts(fields, served, settings.n)
    call = _Call(service, served, settings, prompts, echo=echo, alternatives=alternatives)
    request.state.usage = call.usage
    if settings.stream:
        return await EventStream.begin(request, call.frames())
    return JsonResponse(await unless_left(request, call.whole()))


async def _prompts(fields: Fields, served: Served, n: int) -> list[Prompt]:
    """The prompts in the field `prompt`: a string, strings, ids, or lists of ids; each is to have n answers."""
    value = fields.get("prompt")
    is_many = isinstance(value, list) and not (value and all(map(is_whole, value)))
    prompts: list[Any] = value if is_many else [value]
    if not prompts or not all(isinstance(each, str) or _are_ids(each) for each in prompts):
        fields.refuse("prompt", "a string, an array of token ids, or an array of some of these")
    answers = len(prompts) * n
    expect(answers <= MOST_ANSWERS, f"{answers:,} answers are asked for at once; it must be at most {MOST_ANSWERS:,}")
    bos = fields.get("add_special_tokens") is None or fields.flag("add_special_tokens")
    left_out = len(served.spelling.string(served.spelling.tokenizer.bos_token_id)) if bos else 0
    characters = max((len(each) for each in prompts if isinstance(each, str)), default=0)
    if characters > served.context * served.spelling.longest:
        message = f"this model's context is {served.context:,} tokens, and prompt has {characters:,} characters"
        raise too_long(message, "prompt")

    def read(each: str | list[int]) -> Prompt:
        if isinstance(each, str):
            ids = served.spelling.encode(each, bos=bos)
            expect(bool(ids), "a prompt is empty; it must have at least one token", "prompt")
            return Prompt(ids, each, left_out)
        highest = max(each)
        known = min(each) >= 0 and highest < served.vocabulary
        expect(known, f"prompt has ids that are not below {served.vocabulary:,}, the vocabulary's size", "prompt")
        return Prompt(each, served.spelling.tokenizer.decode(each))

    def read_all() -> list[Prompt]:
        return [read(each) for each in prompts]

    return await asyncio.to_thread(read_all) if sum(map(len, prompts)) > LONG else read_all()


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_whole, value))


class _Call:
    """The continuations of some prompts, n of each: answer i is the one of prompt i // n."""

    def __init__(
        self,
        service: Service,
        served: Served,
        settings: Settings,
        prompts: Sequence[Prompt],
        *,
        echo: bool,
        alternatives: int | None,
    ):
        self.service, self.settings = service, settings
        only_echo = settings.max_tokens == 0  # the engine writes at least a token, which is left out then
        self.requests = [
            Request(
                prompt.ids,
                fit(len(prompt.ids), 1 if only_echo else settings.max_tokens, served.context, "prompt"),
                dataclasses.replace(settings.sampling, number=number),
                stop=settings.stop,
                stop_tokens=settings.stop_tokens,
                logprobs=alternatives,
                prompt_logprobs=echo and alternatives is not None,
            )
            for prompt in prompts
            for number in range(settings.n)
        ]
        self.answers = [
            _Answer(served.spelling, prompt if echo else None, logprobs=alternatives is not None, only_echo=only_echo)
            for prompt in prompts
            for _ in range(settings.n)
        ]
        self.usage = Usage(sum(len(prompt.ids) for prompt in prompts))
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = served.name

    async def whole(self) -> dict[str, Any]:
        """The response of a call that is not streamed."""
        parts: list[list[Part]] = [[] for _ in self.answers]
        async for batch in self.service.outputs(self.requests):
            for index, output in batch:
                parts[index].append(self._add(index, output))
        choices = []
        for index, pieces in enumerate(parts):
            part = Part("", [])
            for piece in pieces:
                part.extend(piece)
            choices.append(self._choice(index, part, self.answers[index].finish))
        return {**self.head, "choices": choices, "usage": self.usage.content()}

    async def frames(self) -> Frames:
        """The frames of a stream, one for each answer and step of the engine."""
        async for batch in self.service.outputs(self.requests):
            parts: dict[int, Part] = {}
            for index, output in batch:
                parts.setdefault(index, Part("", [])).extend(self._add(index, output))
            frames = []
            for index, part in parts.items():
                finish = self.answers[index].finish
                if part.text or part.tokens or finish:
                    frames.append(self._chunk([self._choice(index, part, finish)]))
            if frames:
                yield frames
        if self.settings.usage_frame:
            yield [{**self._chunk([]), "usage": self.usage.content()}]

    def _add(self, index: int, output: Output) -> Part:
        if not self.answers[index].only_echo:
            self.usage.completion += len(output.tokens)
        return self.answers[index].add(output)

    def _choice(self, index: int, part: Part, finish: str | None) -> dict[str, Any]:
        logprobs = self.answers[index].logprobs(part.tokens)
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": finish}

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        return {**self.head, "choices": choices} | ({"usage": None} if self.settings.usage_frame else {})


@dataclass
class Part:
    """What an answer has got: text and, if log-probabilities are wanted, tokens."""

    text: str
    tokens: list[NewToken]

    def extend(self, other: Part) -> None:
        self.text += other.text
        self.tokens += other.tokens


class _Answer:
    """One continuation.

    Args:
      echo: the prompt that its text begins with; None for none.

    Attributes:
      finish: why it has ended; None as long as it goes on.
    """

    def __init__(self, spelling: Spelling, echo: Prompt | None, *, logprobs: bool, only_echo: bool):
        self.spelling, self.wants_logprobs, self.only_echo = spelling, logprobs, only_echo
        self.echo = echo.text if echo else ""
        self.finish: str | None = None
        self._begun = False
        self._offsets = Offsets(spelling, -echo.left_out if echo else 0)

    def add(self, output: Output) -> Part:
        """What an output adds to it. The token that ends it is among the tokens, but not in the text."""
        if output.finish == "cancelled":
            raise ApiError(503, "the answer was cancelled")
        text, tokens = output.text, [*output.prompt, *output.tokens]
        if self.only_echo:
            text, tokens = "", [*output.prompt]
        if not self._begun:
            text, self._begun = self.echo + text, True
        self.finish = "length" if self.only_echo and output.finish else output.finish
        return Part(text, tokens if self.wants_logprobs else [])

    def logprobs(self, tokens: Sequence[NewToken]) -> dict[str, Any] | None:
        """Log-probabilities in the form of this route, for the tokens that come next."""
        if not self.wants_logprobs:
            return None
        chosen, tops = zip(*map(self._scores, tokens), strict=True) if tokens else ((), ())
        return {
            "tokens": [self.spelling.string(token.id) for token in tokens],
            "token_logprobs": list(chosen),
            "top_logprobs": list(tops),
            "text_offset": self._offsets.add([token.id for token in tokens]),
        }

    def _scores(self, token: NewToken) -> tuple[float | None, dict[str, float] | None]:
        """A token's log-probability, and those of the likeliest tokens and its own by their spelling.

        The two are the same float where the token is the likeliest: clients compare them. Of tokens with the same
        spelling the likelier one counts.
        """
        if token.logprob is None:
            return None, None
        likely = dict(token.alternatives)
        own = finite(likely.get(token.id, token.logprob))
        top: dict[str, float] = {}
        for alternative, logprob in likely.items():
            spelt = self.spelling.string(alternative)
            top[spelt] = max(finite(logprob), top.get(spelt, -float("inf")))
        spelt = self.spelling.string(token.id)
        top[spelt] = max(own, top.get(spelt, -float("inf")))
        return own, top
