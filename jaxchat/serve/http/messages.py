"""The messages of a request as the prompt that the model was trained on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from jaxchat.config import Range
from jaxchat.serve.http.errors import ApiError, expect
from jaxchat.serve.http.fields import Fields, shown
from jaxchat.serve.http.generation import too_long
from jaxchat.serve.http.serving import Served

MOST_MESSAGES = 2000
LONG = 20_000  # characters, whose encoding takes a moment in which the event loop is not to wait
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


async def prompt_of(fields: Fields, served: Served) -> list[int]:
    """The ids of the conversation in the field `messages`, up to the assistant's next message.

    System and developer messages come first; they are joined to the user's first message, as in training. Several
    messages of the user in a row are joined too, with an empty line between them. An assistant's message may have
    `tool_runs`, as answers have them.

    Raises:
      ApiError: there are no messages, or malformed ones; they do not fit into the context.
    """
    messages = _read_all(fields, served)
    expect(messages[-1]["role"] == "user", "the last message must be from the user", "messages")
    return await _rendered(messages, served.spelling.tokenizer.render_for_completion)


async def tokens_of(fields: Fields, served: Served) -> list[int]:
    """As `prompt_of`, but of a conversation that may also end with the assistant, the ids of all of it."""
    messages, tokenizer = _read_all(fields, served), served.spelling.tokenizer
    if messages[-1]["role"] != "assistant":
        return await _rendered(messages, tokenizer.render_for_completion)
    return await _rendered(messages, lambda conversation: tokenizer.render_conversation(conversation, sys.maxsize)[0])


def _read_all(fields: Fields, served: Served) -> list[dict[str, Any]]:
    """The messages as the tokenizer takes them, joined as `prompt_of` says."""
    messages = fields.objects("messages")
    expect(bool(messages), "messages is missing; it must be an array of at least one message", "messages")
    assert messages is not None
    most = f"messages has {len(messages):,} messages; it must be at most {MOST_MESSAGES:,}"
    expect(len(messages) <= MOST_MESSAGES, most, "messages")
    joined: list[dict[str, Any]] = []
    for message in messages:
        read = _read(message)
        if joined and joined[-1]["role"] == read["role"] != "assistant":
            joined[-1]["content"] += "\n\n" + read["content"]
        else:
            joined.append(read)
    systems = [i for i, message in enumerate(joined) if message["role"] == "system"]
    expect(systems in ([], [0]), "a system message must come before all others", "messages")
    characters = sum(map(_length, joined))
    if characters > served.context * served.spelling.longest:
        message = f"this model's context is {served.context:,} tokens, and messages has {characters:,} characters"
        raise too_long(message, "messages")
    return joined


async def _rendered(messages: list[dict[str, Any]], render: Callable[[dict[str, Any]], list[int]]) -> list[int]:
    conversation = {"messages": messages}
    try:
        if sum(map(_length, messages)) < LONG:
            return render(conversation)
        return await asyncio.to_thread(render, conversation)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None


def _length(message: dict[str, Any]) -> int:
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)


def _read(message: Fields) -> dict[str, Any]:
    """A message as the tokenizer takes it."""
    name = message.text("role")
    if name in ("tool", "function") or message.get("tool_calls"):
        raise ApiError(
            400, "the model calls no functions of clients; leave their calls and results out", param=message.at
        )
    if name not in _ROLES:
        message.refuse("role", "system, developer, user or assistant")
    role, content = _ROLES[name or ""], _text(message)
    runs = message.objects("tool_runs") if role == "assistant" else None
    if not runs:
        return {"role": role, "content": content}
    parts, done = [], 0
    for run in runs:
        at = run.whole("at", Range(at_least=done, at_most=len(content)))
        at = len(content) if at is None else at
        parts += [
            {"type": "text", "text": content[done:at]},
            {"type": "python", "text": run.text("call") or ""},
            {"type": "python_output", "text": run.text("output") or ""},
        ]
        done = at
    parts.append({"type": "text", "text": content[done:]})
    return {"role": role, "content": [part for part in parts if part["type"] != "text" or part["text"]]}


def _text(message: Fields) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        message.refuse("content", "a string, or an array of parts of type text")
    texts = []
    for part in message.objects("content") or []:
        if part.get("type") != "text":
            here = part.at.removesuffix(".")
            raise ApiError(400, f"{here} is of type {shown(part.get('type'))}; this model reads only text", param=here)
        text = part.text("text")
        if text is None:
            part.refuse("text", "a string")
        texts.append(text)
    return "".join(texts)
