"""Values of options as `argparse` takes them: numbers in a range, paths, and lists of words.

Each raises `argparse.ArgumentTypeError`, whose message goes on after the option's name: `is 0; it must be at least 1`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jaxchat.config import Range, checked_path, shown
from jaxchat.config.amount import Amount, parse_amount

_Wrong = argparse.ArgumentTypeError


def whole(limits: Range) -> Callable[[str], int]:
    """A whole number in a range."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _Wrong("takes a whole number") from None
        return _in_range(value, limits, whole=True)

    return convert


def number(limits: Range) -> Callable[[str], float]:
    """A number in a range."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _Wrong("takes a number") from None
        return _in_range(value, limits, whole=False)

    return convert


def _in_range(value: float, limits: Range, *, whole: bool) -> Any:
    problem = limits.problem(value, whole)
    if problem:
        raise _Wrong(f"is {shown(value)}; it must be {problem}")
    return value


def budget(text: str) -> Amount:
    """A time or a price."""
    try:
        return parse_amount(text)
    except ValueError as error:
        raise _Wrong(str(error)) from None


def path(text: str) -> str:
    """The path of a file or folder; a leading ~ is the home folder."""
    if not text:
        raise _Wrong("is empty; name a file or folder")
    try:
        return checked_path(text)
    except ValueError as error:
        raise _Wrong(f"is {shown(text)}; it must be {error}") from None


def words(text: str) -> tuple[str, ...]:
    """Words that are separated by commas."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise _Wrong(f"is {shown(text)}; it must be words separated by commas" if text.strip() else "needs a value")
    return found
