"""What each setting may be: its type and, for a number, its range, declared beside the field and checked in one place.

depth: Annotated[int, Range(at_least=1, at_most=256)] = 12
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from jaxchat.errors import UserError

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "rl", "evaluate", "report")
# Limits of numbers that declare none: devices count steps and tokens in int32, and compute in float32.
LARGEST_INT = 2**31 - 1
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-30, 1e30
LONGEST_TEXT = 4000  # characters: somewhat less than what a path may have on Linux
LONGEST_NAME = 255  # bytes of a file's or folder's
SHOWN = 60  # characters of a value that a message repeats


class Impossible(UserError):
    """A setting that cannot be; the message begins with its name, such as `rl.top-k is 0`."""

    def __init__(self, message: str, of_a_stage: bool = False):
        super().__init__(message)
        self.of_a_stage = of_a_stage  # the name still lacks the stage: `epochs is 0`

    def within(self, section: str) -> Impossible:
        """The same error as one of the section `section`, whose name it gets where it lacks one."""
        complete = not self.of_a_stage or section not in STAGES
        return self if complete else Impossible(f"{section}.{self}")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be. They are finite, and within the limits of this module besides."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __str__(self) -> str:
        limits = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{words} {_number(limit)}" for words, limit in limits if limit is not None)

    def sentence(self) -> str:
        """The range for a help page."""
        return f"{str(self)[0].upper()}{str(self)[1:]}."

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def problem(self, value: Any, whole: bool) -> str | None:
        """What `value` must be instead, in words; None if it is fine."""
        if value not in self:  # as NaN is in none
            finite = isinstance(value, Integral) or math.isfinite(value)
            return str(self) if finite else f"finite, {self}"
        if self.at_most is None and self.below is None:
            limit = LARGEST_INT if whole else LARGEST_FLOAT
            if value > limit:
                return f"at most {_number(limit)}" if value < math.inf else f"finite, {self}"
        return f"at least {SMALLEST_FLOAT}" if self.above == 0 and value < SMALLEST_FLOAT else None


@dataclass(frozen=True)
class UserPath:
    """Marks text that is or may be a path: a leading ~ stands for the home folder."""


class Section:
    """A section of the settings, a frozen dataclass whose fields are checked when it is built."""

    section: ClassVar[str] = ""  # its name
    of_a_stage: ClassVar[bool] = False  # whether there is one for several stages, so that the name needs the stage's

    def __post_init__(self) -> None:
        for name, kind, marks in declared(type(self)):
            try:
                value = _checked(kind, getattr(self, name), marks)
            except _Wrong as wrong:
                self.refuse(name, str(wrong))
            object.__setattr__(self, name, value)

    def refuse(self, name: str, must_be: str) -> None:
        """Raises `Impossible` about a field; `must_be` is what it must be instead."""
        self.check(False, f"{option_name(name)} is {shown(getattr(self, name))}; it must be {must_be}")

    def check(self, condition: bool, message: str) -> None:
        """Raises `Impossible` unless `condition` holds; `message` begins with the name of one of the fields."""
        if not condition:
            raise Impossible(f"{self.section}.{message}" if self.section else message, self.of_a_stage)


class _Wrong(ValueError):
    """What a value must be instead."""


@functools.cache
def declared(section: type) -> tuple[tuple[str, Any, tuple[Any, ...]], ...]:
    """Of each field of a section's class: its name, its type, and what is declared with it in `Annotated`."""
    hints, marked = get_type_hints(section), get_type_hints(section, include_extras=True)
    fields = [field.name for field in dataclasses.fields(section)]
    return tuple((name, hints[name], getattr(marked[name], "__metadata__", ())) for name in fields)


def declared_range(section: type, name: str) -> Range | None:
    """The range of a field, None if it has none."""
    marks = next(marks for field, _, marks in declared(section) if field == name)
    return next((mark for mark in marks if isinstance(mark, Range)), None)


def _checked(kind: Any, value: Any, marks: tuple[Any, ...], *, needed: bool = False) -> Any:
    """`value` as a `kind`; raises `_Wrong`. Text that is `needed` is not empty."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
        (some,) = [part for part in parts if part is not type(None) and get_origin(part) is not Literal]
        if (value is None and type(None) in parts) or (isinstance(value, str) and value in words):
            return value
        try:
            return _checked(some, value, marks, needed=some is str)
        except _Wrong as wrong:
            raise _Wrong(", or ".join([str(wrong), *words])) from None
    if origin is tuple:
        if isinstance(value, list):
            value = tuple(value)
        many = parts[-1] is Ellipsis
        if not isinstance(value, tuple) or not (many or len(value) == len(parts)):
            raise _Wrong("a tuple of words, such as ('a', 'b')" if many else describe(kind))
        return tuple(_checked(parts[0], each, marks, needed=True) for each in value)
    if origin is Literal:
        fits = isinstance(value, str) and value in parts
    elif kind is float:
        fits = isinstance(value, Real) and not isinstance(value, bool)
    elif kind is int:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise _Wrong(f"of class {kind.__name__}" if dataclasses.is_dataclass(kind) else describe(kind))
    if isinstance(value, Real) and kind in (int, float):
        for limits in marks:
            if isinstance(limits, Range) and (problem := limits.problem(value, kind is int)):
                raise _Wrong(problem)
        return kind(value) + 0  # pyright: ignore[reportArgumentType]  (-0.0 becomes 0.0)
    if isinstance(value, str) and kind is str:
        if needed and not value:
            raise _Wrong("text that is not empty")
        is_path = any(isinstance(mark, UserPath) for mark in marks)
        return checked_path(value) if is_path else _checked_text(value)
    return value


def _checked_text(text: str) -> str:
    if "\0" in text or any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise _Wrong("text in UTF-8, without null characters")
    if len(text) > LONGEST_TEXT:
        raise _Wrong(f"at most {LONGEST_TEXT:,} characters long")
    return text


def checked_path(text: str) -> str:
    """Text that is or may be a path, with the home folder for a leading ~.

    Raises:
      ValueError: no file can have this name; the message says what it must be instead.
    """
    text = os.path.expanduser(_checked_text(text))
    if any(len(part.encode()) > LONGEST_NAME for part in text.split("/")):
        raise _Wrong(f"of names of at most {LONGEST_NAME} bytes")
    return text


def describe(kind: Any) -> str:
    """The values of a type, in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"{'one of ' if len(parts) > 1 else ''}{', '.join(parts)}"
    if get_origin(kind) is tuple:
        many = "words" if parts[0] is str else "numbers"
        return many if parts[-1] is Ellipsis else f"{len(parts)} numbers separated by spaces"
    return " or ".join(map(describe, parts))


def option_name(field: str) -> str:
    """A field's name as the command line and all messages write it."""
    return field.replace("_", "-")


def shown(value: Any) -> str:
    """A value for a message: long ones are cut."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write out the longest
        return f"a whole number of about {int(value.bit_length() * math.log10(2)):,} digits"
    if isinstance(value, tuple | list):
        text = f"({', '.join(map(shown, value))})"
    else:
        text = " ".join((repr(value) if isinstance(value, str) else str(value)).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"
