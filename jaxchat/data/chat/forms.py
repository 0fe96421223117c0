"""The forms in which people have conversations, and the one in which jaxchat keeps them.

A record is read if it has one of these:

    messages, conversations or conversation    a list of turns: role and content, or from and value (ShareGPT)
    instruction and output, or response        Alpaca and Dolly, with input or context, and system
    prompt and response, or completion         strings, or lists of turns
    question, query, input or user             with response, answer, output or assistant
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxchat.data.text.reading import kind_of
from jaxchat.tokenizer.conversation import PARTS

Content = str | list[dict[str, str]]  # of a message: text, or (the assistant's only) text, tool calls and their output

_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "model"),
    "system": ("system", "developer"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_TURNS = ("messages", "conversations", "conversation")
_ASKED = ("instruction", "prompt", "question", "query", "input", "user")
_ANSWERED = ("output", "response", "completion", "answer", "assistant")
_CONTEXT = {"instruction": ("input", "context")}
_SYSTEM = ("system", "system_prompt")
_TEXT_PARTS = ("text", "input_text", "output_text")
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_TOOLS = 'write a call of a tool as a part {"type": "python", "text": ...} of the assistant\'s content'


def contents_of(record: Mapping[str, Any]) -> tuple[Content, ...]:
    """The contents of a conversation's messages: the user's, the assistant's, the user's, and so on.

    A system message is joined to the user's first by an empty line.

    Raises:
      ValueError: the record has no conversation, or one that cannot be trained on; the message says why.
    """
    system: str | None = None
    contents: list[Content] = []
    for number, turn in enumerate(_turns_of(record), start=1):
        role, content = _read_turn(turn, number)
        if role == "system":
            if number > 1:
                raise ValueError(f"message {number} is from the system; a system message comes first, and once")
            system = _text(content, number, role)
            continue
        expected = "assistant" if len(contents) % 2 else "user"
        if role != expected:
            before = f"message {number} is from the {role}, like the one before it" if contents else (
                f"the conversation begins with the {role}"
            )  # fmt: skip
            raise ValueError(f"{before}; user and assistant take turns, and the user begins")
        if role == "user":
            content = _text(content, number, role)
            contents.append(content if system is None else f"{system}\n\n{content}")
            system = None
        else:
            contents.append(content if isinstance(content, str) else _parts(content, number))
    if not contents:
        raise ValueError("the conversation has no message" + (" after the system's" if system is not None else ""))
    return tuple(contents)


def to_conversation(contents: Sequence[Content]) -> dict[str, Any]:
    """The conversation with these contents, as the tokenizer renders it."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


def _turns_of(record: Mapping[str, Any]) -> Sequence[Any]:
    for key in _TURNS:
        turns = record.get(key)
        if turns is not None:
            if not isinstance(turns, list):
                raise ValueError(f"{key!r} is {kind_of(turns)}, not a list of messages")
            return turns
    asked = next((key for key in _ASKED if record.get(key) is not None), None)
    answered = next((key for key in _ANSWERED if record.get(key) is not None), None)
    if asked is None or answered is None:
        raise ValueError(_no_conversation(record, (*_TURNS, *_ASKED) if asked is None else _ANSWERED))
    if record.get("history"):
        raise ValueError(f"'history' beside {asked!r} is not read; write all messages as {_EXAMPLE}")
    question, answer = record[asked], record[answered]
    if isinstance(question, list) and isinstance(answer, list):
        return [*question, *answer]
    for key in (asked, answered):
        if not isinstance(record[key], str):
            raise ValueError(f"{key!r} is {kind_of(record[key])}, not a string")
    context = next((record[key] for key in _CONTEXT.get(asked, ()) if record.get(key)), None)
    if context is not None:
        question = f"{question}\n\n{context}"
    system = next((record[key] for key in _SYSTEM if record.get(key)), None)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _no_conversation(record: Mapping[str, Any], missing: Sequence[str]) -> str:
    """Why a record has no conversation, when it has none of the fields `missing`."""
    null = next((key for key in missing if key in record), None)
    if null is not None:
        return f"{null!r} is null"
    if "chosen" in record:
        return f"'chosen' and 'rejected' are preferences, which are not trained on; write the chosen as {_EXAMPLE}"
    if ("role" in record and "content" in record) or ("from" in record and "value" in record):
        return f"a message by itself; write all messages of a conversation into one object: {_EXAMPLE}"
    keys = ", ".join(map(str, record)) or "none"
    return f"no conversation, but the fields {keys}; write it as {_EXAMPLE}"


def _read_turn(turn: Any, number: int) -> tuple[str, Any]:
    """The role (user, assistant or system) and the content of a message."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is {kind_of(turn)}; write {{'role': ..., 'content': ...}}")
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in turn), None)
    if keys is None:
        raise ValueError(f"message {number} has no 'role', but the fields {', '.join(map(str, turn)) or 'none'}")
    name, content = turn[keys[0]], turn.get(keys[1])
    role = _ROLE_OF.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"message {number} is from {name!r}, not from the system, the user or the assistant; {_TOOLS}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"message {number} has tool calls, which are not read; {_TOOLS}")
    if content is None:
        wrong = "is null" if keys[1] in turn else "is missing"
        raise ValueError(f"{keys[1]!r} of message {number}, from the {role}, {wrong}")
    return role, content


def _text(content: Any, number: int, role: str) -> str:
    """The text of a message, or of its parts, all of which must be text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of message {number}, from the {role}, is {kind_of(content)}, not text")
    return "".join(part["text"] for part in _parts(content, number, _TEXT_PARTS))


def _parts(content: Any, number: int, types: Sequence[str] = (*PARTS, *_TEXT_PARTS)) -> list[dict[str, str]]:
    if not isinstance(content, list):
        raise ValueError(f"the content of message {number} is {kind_of(content)}, neither text nor a list of parts")
    parts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
        if kind not in types or not isinstance(text, str):
            what = f"a part of type {kind!r}" if kind not in types and kind is not None else f"a part {str(part)[:60]}"
            known = ", ".join(dict.fromkeys("text" if name in _TEXT_PARTS else name for name in types))
            raise ValueError(f"message {number} has {what}; a part has a 'text', and its 'type' is one of {known}")
        parts.append({"type": "text" if kind in _TEXT_PARTS else kind, "text": text})
    return parts
