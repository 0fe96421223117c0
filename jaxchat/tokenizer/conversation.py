"""The token format of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# The types of parts in an assistant's message: the tokens around a part, and whether the model learns to write it.
PARTS = {
    "text": ((), 1),
    "python": (("<|python_start|>", "<|python_end|>"), 1),
    "python_output": (("<|output_start|>", "<|output_end|>"), 0),
}


class Encoder(Protocol):
    """What rendering needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int: ...

    def encode_special(self, name: str) -> int: ...

    def encode(self, text: str, prepend: str | None = None, append: str | None = None) -> list[int]: ...


def render(tokenizer: Encoder, messages: list[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """The ids of checked messages, and a mask: 1 for ids that the model learns to write, else 0."""
    ids: list[int] = [tokenizer.bos_token_id]
    mask: list[int] = [0]

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            add(tokenizer.encode(content, "<|user_start|>", "<|user_end|>"), 0)
            continue
        add([tokenizer.encode_special("<|assistant_start|>")], 0)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            around, trained = PARTS[part["type"]]
            add(tokenizer.encode(part["text"], *around), trained)
        add([tokenizer.encode_special("<|assistant_end|>")], 1)
    return ids, mask


def checked_messages(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Checks the messages of a conversation and joins the system message to the user's first.

    Raises `ValueError` if they are malformed.
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a conversation is a dict with a list of at least one message under 'messages'")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"message {index} of the conversation lacks a 'role' or a 'content'")
    messages = list(messages)
    first = messages[0]
    if first["role"] == "system":
        if len(messages) == 1 or messages[1]["role"] != "user":
            raise ValueError("a system message must be followed by a user message")
        for index in (0, 1):
            _check_text(messages[index], index)
        joined = first["content"] + "\n\n" + messages[1]["content"]
        messages[:2] = [{"role": "user", "content": joined}]
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(
                f"message {index} of the conversation is from {message['role']!r}, expected {expected!r}: "
                "roles must alternate, beginning with the user"
            )
        if expected == "user" or isinstance(message["content"], str):
            _check_text(message, index)
        else:
            _check_parts(message["content"], index)
    return messages


def _check_text(message: Mapping[str, Any], index: int) -> None:
    if not isinstance(message["content"], str):
        raise ValueError(f"the content of message {index}, from {message['role']!r}, is not a string")


def _check_parts(parts: Any, index: int) -> None:
    if not isinstance(parts, Sequence):
        raise ValueError(f"the content of message {index} is neither a string nor a list of parts")
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise ValueError(
                f"message {index} of the conversation has a part that is not "
                f"{{'type': {' | '.join(map(repr, PARTS))}, 'text': str}}: {part!r}"
            )
