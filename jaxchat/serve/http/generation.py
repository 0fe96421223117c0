"""What both routes that generate share: the settings of a request, and the way that an answer takes to the client."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from jaxchat.config import Range
from jaxchat.infer.request import MOST_ALTERNATIVES, Sampling
from jaxchat.serve.http.errors import ApiError, expect, to_json
from jaxchat.serve.http.fields import Fields, is_whole, shown
from jaxchat.serve.http.serving import Served

MOST_CHOICES = 128  # n
MOST_STOPS, LONGEST_STOP = 16, 500  # stop strings, and the characters of one
MOST_BIASES = 300
STALLED_SECONDS = 60.0  # after which a client that reads nothing is left

Result = TypeVar("Result")
Frames = AsyncGenerator[list[Any], None]


@dataclass(frozen=True)
class Settings:
    """How a request wants its answers.

    Attributes:
      sampling: of the first answer; those of further ones differ in `number`.
      n: answers to each prompt.
      max_tokens: None for all that the context has room for.
      stop_tokens: as in `jaxchat.infer.request.Request`.
      usage_frame: whether a stream ends with a frame of usage.
    """

    sampling: Sampling
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...] | None
    stream: bool
    usage_frame: bool


def read_settings(fields: Fields, served: Served, defaults: Mapping[str, Any]) -> Settings:
    """Reads the fields that both routes have.

    Args:
      defaults: settings of the distribution, where the request names none of them.

    Raises:
      ApiError: a field has a value that it cannot have.
    """
    served.check_name(fields.text("model"))
    stream, options = fields.flag("stream"), fields.object("stream_options")
    best_of = fields.whole("best_of", Range(at_least=1))
    n = fields.whole("n", Range(at_least=1, at_most=MOST_CHOICES)) or 1
    if best_of is not None and best_of != n:
        fields.refuse("best_of", f"as n, which is {n}: there is no choice among more samples")
    return Settings(
        sampling=_sampling(fields, served, defaults),
        n=n,
        max_tokens=_max_tokens(fields),
        stop=_stops(fields),
        stop_tokens=_stop_tokens(fields, served),
        stream=stream,
        usage_frame=stream and options is not None and options.flag("include_usage"),
    )


def _max_tokens(fields: Fields) -> int | None:
    limits = Range(at_least=0)
    new = fields.whole("max_completion_tokens", limits)
    return fields.whole("max_tokens", limits) if new is None else new


def _sampling(fields: Fields, served: Served, defaults: Mapping[str, Any]) -> Sampling:
    found = {
        "temperature": fields.number("temperature", Range(at_least=0, at_most=100)),
        "top_k": fields.whole("top_k", Range(at_least=-1)),
        "top_p": fields.number("top_p", Range(above=0, at_most=1)),
        "min_p": fields.number("min_p", Range(at_least=0, at_most=1)),
    }
    if all(value is None for value in found.values()):
        found = dict(defaults)
    if found.get("top_k") in (0, -1):  # all, in vLLM's words and others'
        found["top_k"] = None
    penalty = Range(at_least=-2, at_most=2)
    found |= {
        "repetition_penalty": fields.number("repetition_penalty", Range(above=0, at_most=100)),
        "frequency_penalty": fields.number("frequency_penalty", penalty),
        "presence_penalty": fields.number("presence_penalty", penalty),
        "seed": fields.whole("seed", Range(at_least=-(2**63), at_most=2**64 - 1)),
    }
    if found["seed"] is None:
        found["seed"] = secrets.randbelow(2**31)
    numbers = {name: value for name, value in found.items() if value is not None}
    return Sampling(logit_bias=_biases(fields, served), **numbers)


def _biases(fields: Fields, served: Served) -> dict[int, float]:
    bias = fields.object("logit_bias")
    if bias is None:
        return {}
    expect(
        len(bias.values) <= MOST_BIASES,
        f"logit_bias has {len(bias.values):,} ids; it must be at most {MOST_BIASES}",
        "logit_bias",
    )
    found = {}
    for name in bias.values:
        known = name.isascii() and name.isdecimal() and len(name) < 12 and int(name) < served.vocabulary
        expect(known, f"logit_bias has {shown(name)}; it must be an id below {served.vocabulary:,}", "logit_bias")
        value = bias.number(name, Range(at_least=-100, at_most=100))
        if value is not None:
            found[int(name)] = float(value)
    return found


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        fields.refuse("stop", "a string, or an array of strings")
    expect(
        len(stops) <= MOST_STOPS and all(len(each) <= LONGEST_STOP for each in stops),
        f"stop must be at most {MOST_STOPS} strings of at most {LONGEST_STOP} characters",
        "stop",
    )
    return tuple(dict.fromkeys(each for each in stops if each))


def _stop_tokens(fields: Fields, served: Served) -> tuple[int, ...] | None:
    more = fields.array("stop_token_ids") or []
    if len(more) > MOST_STOPS or not all(is_whole(each) and 0 <= each < served.vocabulary for each in more):
        fields.refuse("stop_token_ids", f"at most {MOST_STOPS} ids below {served.vocabulary:,}")
    ignored = fields.flag("ignore_eos")
    return tuple(dict.fromkeys([*(() if ignored else served.stops), *more])) if more or ignored else None


def read_alternatives(fields: Fields, name: str) -> int | None:
    """How many alternatives each token is to have."""
    return fields.whole(name, Range(at_least=0, at_most=MOST_ALTERNATIVES))


def fit(prompt: int, max_tokens: int | None, context: int, param: str) -> int:
    """How many tokens an answer to a prompt of `prompt` tokens can have.

    Raises:
      ApiError: the prompt fills the context.
    """
    if prompt >= context:
        raise too_long(f"this model's context is {context:,} tokens, and {param} has {prompt:,}", param)
    room = context - prompt
    return room if max_tokens is None else min(max_tokens, room)


def too_long(message: str, param: str) -> ApiError:
    """The error of a prompt that does not fit; clients look for its code or, as LangChain, for words of the message."""
    return ApiError(400, f"the prompt is too long: {message}; shorten it", param=param, code="context_length_exceeded")


@dataclass
class Usage:
    """The tokens of a call: of its prompts, and of the answers so far."""

    prompt: int
    completion: int = 0

    def __str__(self) -> str:
        return f"{self.prompt} + {self.completion} tokens"

    def content(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


# --- the way to the client --------------------------------------------------------------------------------------------


async def unless_left(request: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client leaves.

    Raises:
      ClientDisconnect: the client has left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events: JSON frames, then `[DONE]`; https://html.spec.whatwg.org/#event-stream.

    Args:
      first, frames: lists of frames that are sent together. `frames` is closed, and so cancelled, when the client
        leaves or reads nothing for `STALLED_SECONDS`.
    """

    def __init__(self, first: list[Any], frames: Frames):
        self.first, self.frames = first, frames

    @classmethod
    async def begin(cls, request: HttpRequest, frames: Frames) -> EventStream:
        """Waits for the first frames, so that what fails until then has a status of its own.

        Raises:
          ApiError: what `frames` raises.
          ClientDisconnect: the client has left.
        """
        return cls(await unless_left(request, anext(frames)), frames)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would hold frames back
        with contextlib.suppress(ClientDisconnect, TimeoutError):
            async with contextlib.aclosing(self.frames):
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await unless_left(HttpRequest(scope, receive), self._send(send))

    async def _send(self, send: Send) -> None:
        async def give(body: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(STALLED_SECONDS):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await give(b"".join(map(_event, self.first)))
            async for frames in self.frames:
                await give(b"".join(map(_event, frames)))
        except ApiError as error:
            await give(_event(error.content()))
        await give(b"data: [DONE]\n\n", more=False)


def _event(frame: Any) -> bytes:
    return b"data: %b\n\n" % to_json(frame)
