"""The fields of a request: read from its JSON, checked, and refused in OpenAI's form.

A field that is null counts as left out. Unknown fields are ignored; those that would change the result, but that
jaxchat cannot do, are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from starlette.requests import Request

from jaxchat.config import Range
from jaxchat.serve.http.connections import BODY_SECONDS
from jaxchat.serve.http.errors import ApiError, expect

MAX_BODY = 4 * 2**20  # bytes
MAX_READ = 16 * MAX_BODY  # of what is too large, so that the client, which sends first, sees the refusal


async def read_json(request: Request) -> Fields:
    """The fields of a request's body.

    Raises:
      ApiError: the body is too large, too slow, or not a JSON object.
      ClientDisconnect: the client has gone.
    """
    length = request.headers.get("content-length", "0")
    _check_size(int(length) if length.isdecimal() and len(length) < 20 else MAX_READ + 1, MAX_READ)
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                _check_size(size, MAX_READ)
                if size <= MAX_BODY:
                    body += chunk
    except TimeoutError:
        message = f"the body was not there after {BODY_SECONDS:.0f} seconds; its length may be less than Content-Length"
        raise ApiError(408, message, headers={"connection": "close", "x-should-retry": "false"}) from None
    _check_size(size, MAX_BODY)
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {why}") from None
    expect(isinstance(values, dict), f"the body is {_kind(values)}; it must be an object")
    return Fields(values)


def _check_size(size: int, most: int) -> None:
    if size > most:
        # The rest of the body, if there is any, is not read: the connection cannot be used again.
        message = f"the body is larger than {MAX_BODY:,} bytes, the most that this server reads"
        raise ApiError(413, message, headers={"connection": "close"})


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


class Fields:
    """The fields of an object in a request; `at` is where it stands, such as `messages[2].`."""

    def __init__(self, values: Mapping[str, Any], at: str = ""):
        self.values, self.at = values, at

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def has(self, *names: str) -> bool:
        """Whether any of the fields is there."""
        return any(self.get(name) is not None for name in names)

    def refuse(self, name: str, must_be: str) -> NoReturn:
        raise ApiError(400, f"{self.at}{name} is {shown(self.get(name))}; it must be {must_be}", param=self.at + name)

    def whole(self, name: str, limits: Range) -> int | None:
        """A whole number in a range."""
        value = self.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # some clients send 20.0
        return self._number(name, value, int, limits)

    def number(self, name: str, limits: Range) -> float | None:
        """A number in a range."""
        return self._number(name, self.get(name), (int, float), limits)

    def _number(self, name: str, value: Any, kind: Any, limits: Range) -> Any:
        if value is None:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            self.refuse(name, "a whole number" if kind is int else "a number")
        problem = limits.problem(value, kind is int)
        if problem:
            self.refuse(name, problem)
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if left out."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "a string")
        return value

    def array(self, name: str) -> list[Any] | None:
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            self.refuse(name, "an array")
        return value

    def object(self, name: str) -> Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "an object")
        return Fields(value, f"{self.at}{name}.")

    def objects(self, name: str) -> list[Fields] | None:
        """An array of objects."""
        values = self.array(name)
        if values is None:
            return None
        for index, value in enumerate(values):
            here = f"{self.at}{name}[{index}]"
            expect(isinstance(value, dict), f"{here} is {_kind(value)}; it must be an object", here)
        return [Fields(value, f"{self.at}{name}[{index}].") for index, value in enumerate(values)]


Allowed = Callable[[Any], bool]


def _nothing(value: Any) -> bool:
    """Allows null, false, and what is empty."""
    return not value


# Fields of OpenAI's API, and of vLLM's, that would change the result: what they may be, and what to do instead.
_ALWAYS: Mapping[str, tuple[Allowed, str]] = {
    "use_beam_search": (_nothing, "beam search is not supported"),
    "min_tokens": (_nothing, "a least number of tokens is not supported"),
    "typical_p": (lambda value: value in (None, 1), "typical sampling is not supported; use top_p or min_p"),
    "prompt_logprobs": (_nothing, "ask /v1/completions for them, with echo and logprobs"),
    "truncate_prompt_tokens": (_nothing, "shorten the prompt, whose tokens /tokenize counts"),
    "prompt_embeds": (_nothing, "a prompt is text or token ids"),
    "allowed_token_ids": (_nothing, "use logit_bias"),
    "bad_words": (_nothing, "use logit_bias"),
    "logits_processors": (_nothing, "use logit_bias"),
    "vllm_xargs": (_nothing, "they are not supported"),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar"),
        (_nothing, "the form of an answer cannot be forced; ask for it in the prompt"),
    ),
}
_PLAIN_FORMAT = "the form of an answer cannot be forced; ask for it in the prompt"


def _is_text_format(value: Any) -> bool:
    return not value or (isinstance(value, dict) and value.get("type") in (None, "text"))


def _is_free_choice(value: Any) -> bool:
    return value in (None, "none", "auto")


CHAT_ONLY: Mapping[str, tuple[Allowed, str]] = {
    "response_format": (_is_text_format, _PLAIN_FORMAT),
    "tool_choice": (_is_free_choice, "the model calls no functions of clients; leave it out"),
    "function_call": (_is_free_choice, "the model calls no functions of clients; leave it out"),
    "modalities": (lambda value: value in (None, [], ["text"]), "answers are text"),
    "audio": (_nothing, "answers are text"),
    "web_search_options": (_nothing, "there is no search"),
    "echo": (_nothing, "use /v1/completions"),
    "continue_final_message": (_nothing, "the last message must be from the user"),
    "chat_template": (_nothing, "a conversation has one form, which the model was trained on"),
}
COMPLETIONS_ONLY: Mapping[str, tuple[Allowed, str]] = {
    "suffix": (_nothing, "text cannot be inserted before a suffix"),
    "response_format": (_is_text_format, _PLAIN_FORMAT),
}


def refuse_unsupported(fields: Fields, more: Mapping[str, tuple[Allowed, str]]) -> None:
    """Raises an `ApiError` for fields that would change the result, but that are not supported."""
    for name, (allowed, instead) in {**_ALWAYS, **more}.items():
        if not allowed(fields.get(name)):
            raise ApiError(
                400,
                f"{name} is {shown(fields.get(name))}, which this server does not support: {instead}",
                param=name,
                code="unsupported_parameter",
            )


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """A value for a message: short, and of text no more than its beginning."""
    if isinstance(value, dict | list) and value:
        return _kind(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
