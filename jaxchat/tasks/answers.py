"""Scoring parts that tasks share: what an answer says, and whether it is the right letter or number."""

from __future__ import annotations

import re

from jaxchat.tasks.base import Conversation

_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")
_TOOL_MARK = re.compile(r"<\|(python|output)_(start|end)\|>")
_ANSWER_END = "<|assistant_end|>"
# A space that does not break a line is part of a number, as in 1 250.
_LAST_WORD = re.compile(r"(?:\S|[\u00a0\u2007\u2009\u202f])+\Z")


def visible_answer(completion: str, *, cut: bool = False) -> str:
    """What a completion says: its text outside of tool calls and their output, a line for each piece of it.

    It says nothing unless its last tool call or output is closed, since what would follow is the answer. Of an answer
    that was `cut` the last word does not count, because it may be incomplete: `9` may be the beginning of `92`. A word
    is complete if a space, a line's end or a tool call follows.
    """
    pieces, start, inside = [], 0, None
    said = completion.partition(_ANSWER_END)[0]
    for mark in _TOOL_MARK.finditer(said):
        if inside is None:
            pieces.append(said[start : mark.start()])
        kind, edge = mark.groups()
        if edge == "start":
            inside = kind
        elif inside == kind:
            inside = None
        start = mark.end()
    if inside is not None:
        return ""
    last = said[start:]
    pieces.append(_LAST_WORD.sub("", last) if cut else last)
    return "\n".join(piece for piece in pieces if piece.strip())


def score_choice(conversation: Conversation, completion: str, *, cut: bool = False) -> float:
    """1 if the answer begins with the right letter, not followed by another."""
    found = re.match(r"\W*([A-Z])(?!\w)", visible_answer(completion, cut=cut))
    return float(found is not None and found[1] == conversation["messages"][-1]["content"])


def last_number(text: str) -> str | None:
    """The last number in `text`, as `canonical_number` writes it, or None."""
    found = _NUMBER.findall(text)
    return canonical_number(found[-1]) if found else None


def canonical_number(number: str) -> str:
    """The number as the calculator would write it: "1,250.0" is "1250", ".50" is "0.5"."""
    plain = number.replace(",", "")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    sign, digits = ("-", plain[1:]) if plain.startswith("-") else ("", plain)
    whole, point, rest = digits.partition(".")
    digits = (whole.lstrip("0") or "0") + point + rest
    return digits if digits == "0" else sign + digits
