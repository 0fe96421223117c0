"""Conversations as JSON files: `{"messages": [{"role", "content"}, ...]}`, as the API and the page write them too.

An answer with tool calls has them in `tool_runs`, a list of `{"call", "output", "at"}`; `at` is the number of
characters of its content before the call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat.errors import UserError, check
from jaxchat.runs.files import Object, misfit, parse_json
from jaxchat.tokenizer import BaseTokenizer

LARGEST = 16 * 2**20  # bytes of a file
CALL = ("<|python_start|>", "<|python_end|>")
OUTPUT = ("<|output_start|>", "<|output_end|>")
_RUN = Object({"call": str, "output": str, "at": int})
_SCHEMA = Object({"messages": [Object({"role": str, "content": str}, {"tool_runs": [_RUN]})]})


def message_of(tokenizer: BaseTokenizer, tokens: Sequence[int]) -> dict[str, Any]:
    """The assistant's message that `tokens` are: its content, and its whole tool calls."""
    marks = [tokenizer.encode_special(name) for name in (*CALL, *OUTPUT)]
    content, runs, at = "", [], 0
    while at < len(tokens):
        start = _index(tokens, marks[0], at)
        content += tokenizer.decode(tokens[at:start])
        if start == len(tokens):
            break
        end, output, at = (_index(tokens, mark, start) for mark in marks[1:])
        again = _index(tokens, marks[0], start + 1)  # then only what comes after it was a call
        if not (end < output < at and output == end + 1) or again < end:
            content, at = content + tokenizer.decode(tokens[start : start + 1]), start + 1
            continue
        call, result = tokenizer.decode(tokens[start + 1 : end]), tokenizer.decode(tokens[output + 1 : at])
        runs.append({"call": call, "output": result, "at": len(content)})
        at += 1
    return {"role": "assistant", "content": content} | ({"tool_runs": runs} if runs else {})


def _index(tokens: Sequence[int], token: int, start: int) -> int:
    """Where `token` comes next; the end of `tokens` if it does not."""
    return next((at for at in range(start, len(tokens)) if tokens[at] == token), len(tokens))


def tokens_of(tokenizer: BaseTokenizer, message: dict[str, Any]) -> list[int]:
    """The tokens of an assistant's message, in the form that the model was trained on."""
    content, tokens, begin = message["content"], [], 0
    for run in message.get("tool_runs", []):
        tokens += tokenizer.encode(content[begin : run["at"]]) if run["at"] > begin else []
        tokens += tokenizer.encode(run["call"], *CALL) + tokenizer.encode(run["output"], *OUTPUT)
        begin = run["at"]
    return tokens + (tokenizer.encode(content[begin:]) if content[begin:] else [])


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The messages of a file: perhaps one of the system, then the user's and the assistant's in turn.

    Raises:
      UserError: the file cannot be read, or is not of this form.
    """
    try:
        check(not path.exists() or path.is_file(), f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    check(len(data) <= LARGEST, f"{path} has more than {LARGEST // 2**20} MiB; it is no conversation")
    try:
        value = parse_json(data)
        if fault := misfit(value, _SCHEMA) or _disorder(value["messages"]):
            raise ValueError(fault)
    except ValueError as error:
        raise UserError(f"{path} is not a conversation that /save writes: {error}") from None
    return value["messages"]


def _disorder(messages: list[dict[str, Any]]) -> str | None:
    """What is wrong with the order of messages, or with the places of their tool calls; None if nothing is."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i, message in enumerate(messages):
        expected = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if message["role"] != expected:
            return f"messages[{i}] is from {message['role']!r}, not {expected!r}"
        places = [0, *(run["at"] for run in message.get("tool_runs", [])), len(message["content"])]
        if places != sorted(places):
            return f"messages[{i}].tool_runs are not in order within its content"
    return None


def write_messages(path: Path, messages: list[dict[str, Any]], *, replace: bool) -> None:
    """Writes a file in one step; one that is there stays unless `replace` is set.

    Raises:
      UserError: there is a file, or it cannot be written.
    """
    text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
    try:
        check(not path.is_dir(), f"{path} is a folder; name a file in it")
        check(replace or not os.path.lexists(path), f"{path} is there already; /save! {path} replaces it")
        target = path.resolve()  # a link stays one
        part = target.with_name(f".{target.name}.part")
        try:
            part.write_bytes(text.encode(errors="replace"))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path} cannot be written ({why}); nothing is lost, name another file") from None
