"""Scoring parts that tasks share: what an answer says, and whether it is the right number, name or letter."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from jaxchat.tasks.base import Conversation
from jaxchat.tasks.numbers import last_number, parse_number, plain_text

_TOOL_MARK = re.compile(r"<\|(python|output)_(start|end)\|>")
_ANSWER_END = "<|assistant_end|>"
# To the last space, but for one that does not break the line: that is part of a number, as in 1 250. An operator stays,
# because the number before it is not the answer.
_WHOLE_WORDS = re.compile(r".*[^\S\u00a0\u2007\u2009\u202f](?:[-+*/×÷−]\Z)?", re.DOTALL)
_HYPHENS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-") | {"’": "'"})
_SMALL_WORDS = "(?:an?|the|in|at|on|from|of|to|by|with|be|called|named|lives?|living)"
# Scripts that put no spaces between words, or, as Korean, particles right after a name: there any place may end a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_LETTER = rf"[^\W{_UNSPACED}]"
# Hyphens and apostrophes inside of words are part of them, but not a genitive's; so are the signs of C++ and C#.
_BEFORE, _AFTER = rf"(?<!{_LETTER})(?<!{_LETTER}[-'])", rf"(?!{_LETTER}|-{_LETTER}|'(?!s\b){_LETTER}|[+#])"
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])")
_CHOICE = re.compile(
    r"[\W_]*(?:(?:(?:the|my|final|correct|right|best)\s+)*(?:answer|choice|option|letter)\b(?:\s+is\b)?[\W_]*){0,2}"
    r"(?-i:([A-Z]))(?![^\W_]|[-'][^\W_]|[+#])",
    re.IGNORECASE,
)
_JOINED_CHOICES = r"[\s\W_]*(?:and|or|,|/|&)[\s(*_]*[{letters}](?!\w)"
_ONLY_CHOICES = r"(?:[\W_]*[{letters}](?!\w))+[\W_]*\Z"  # B C
_ARTICLE = re.compile(r" (?!is\b|because\b|since\b|as\b|and\b|or\b)[a-z]")  # "A stone", "I think"


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
    pieces.append(said[start:])
    if cut:
        whole = _WHOLE_WORDS.match(pieces[-1])
        pieces[-1] = whole[0] if whole else ""
    return "\n".join(piece for piece in pieces if piece.strip())


def score_value(answer: str, others: Sequence[str], completion: str, *, cut: bool = False) -> float:
    """1 if the completion's last number is `answer`, or, for a name, if it has that name and none of `others`.

    Numbers are read by `tasks.numbers`: operands (`92` in `34 + 58 is 92` is none) and several numbers at once (`92 or
    93`) do not count. Names count as whole words, whatever their case, and not after `not`; a name within a longer one,
    such as York in New York, does not count. In scripts without spaces a name may be anywhere.
    """
    visible = visible_answer(completion, cut=cut)
    number = parse_number(answer)
    if number is not None:
        return float(last_number(visible) == number)
    right = _plain_name(answer)
    said = _names_in(visible, {right, *map(_plain_name, others)})
    return float(said == {right})


def score_choice(conversation: Conversation, completion: str, *, cut: bool = False) -> float:
    """1 if the answer begins with the right letter, alone or after `The answer is`, and with no other letter.

    Letters are capitals, as in the question. An A or I that begins a sentence (`A stone`) is not a letter of a choice.
    """
    visible = plain_text(visible_answer(completion, cut=cut))
    found = _CHOICE.match(visible)
    letters = "".join(conversation["letters"])
    others = "|".join((_JOINED_CHOICES, _ONLY_CHOICES)).replace("{letters}", letters)
    if found is None or re.compile(others).match(visible, found.end()):
        return 0.0
    if found[1] in "AI" and _ARTICLE.match(visible, found.end()):
        return 0.0
    return float(found[1] == conversation["messages"][-1]["content"])


def _plain_name(text: str) -> str:
    """`text` in one form: composed characters, no case, single spaces, ASCII hyphens, no emphasis by underscores."""
    plain = unicodedata.normalize("NFKC", text).translate(_HYPHENS)
    return " ".join(_EMPHASIS.sub("", plain).casefold().split())


def _names_in(text: str, names: set[str]) -> set[str]:
    """Those of `names` that `text` has as whole words, the longer of two that overlap."""
    ordered = sorted((name for name in names if name), key=len, reverse=True)
    denied = rf"(?P<denied>(?:\b(?:not|cannot|never|neither|nor)|n't)\s(?:{_SMALL_WORDS}\s)*)?"
    pattern = f"{denied}(?P<name>{'|'.join(map(_whole, ordered))})"
    found = re.finditer(pattern, _plain_name(text)) if ordered else ()
    return {match["name"] for match in found if not match["denied"]}


def _whole(name: str) -> str:
    """The pattern of `name` as whole words: nothing of its word may come before or after it."""
    unspaced = re.compile(f"[{_UNSPACED}]")
    before, after = ("" if unspaced.match(end) else edge for end, edge in ((name[0], _BEFORE), (name[-1], _AFTER)))
    return f"{before}{re.escape(name)}{after}"
