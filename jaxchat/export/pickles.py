"""Pickles as plain data.

A pickle is a program, which may call any function of Python. `read_pickle` takes the few instructions that build data,
and where the program would call something it only notes what: nothing outside this file is looked up or called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Name:
    """Something that a pickle refers to by module and name, such as `torch.FloatStorage`."""

    name: str


@dataclass(frozen=True)
class Persistent:
    """Something that a pickle refers to and that lies outside it."""

    id: Any


@dataclass(eq=False)
class Made:
    """What a pickle would make by calling `name` with `args`, with what it would then put into it.

    Attributes:
      items: keys and values, as of a dictionary.
      state: what it would be given to restore itself from.
    """

    name: str
    args: tuple
    items: dict[Any, Any] = field(default_factory=dict)
    state: Any = None


# Instructions that push their argument.
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes, allowed: Collection[str]) -> Any:
    """The data in a pickle: of Python's own types, and of `Name`, `Persistent` and `Made`.

    Args:
      allowed: the names, such as `collections.OrderedDict`, that the pickle may refer to.

    Raises:
      ValueError: it refers to another name, has an instruction that no data needs, or is damaged; the message says
        which, as a clause.
    """
    try:
        return _run(data, allowed)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no whole pickle: {type(error).__name__}: {error}") from None


def _run(data: bytes, allowed: Collection[str]) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below the marks
    memo: dict[int, Any] = {}

    def name(module: Any, last: Any) -> Name:
        if not (isinstance(module, str) and isinstance(last, str)):
            raise ValueError("it is no whole pickle: it names something by what is no text")
        if f"{module}.{last}" not in allowed:
            raise ValueError(f"it names {module}.{last}, which jaxchat neither runs nor needs")
        return Name(f"{module}.{last}")

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case known if known in _CONSTANTS:
                stack.append(argument)
            case known if known in _SINGLE:
                stack.append(_SINGLE[known])
            case known if known in _TUPLES:
                count = _TUPLES[known]
                parts = tuple(stack[-count:])
                del stack[-count:]
                stack.append(parts)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                parts = tuple(since_mark())
                stack.append(parts)
            case "LIST":
                parts = since_mark()
                stack.append(parts)
            case "DICT":
                parts = since_mark()
                stack.append(_pairs(parts))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _dict(stack[-1]).update(_pairs([key, value]))
            case "SETITEMS":
                parts = since_mark()
                _dict(stack[-1]).update(_pairs(parts))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                parts = since_mark()
                stack[-1].extend(parts)
            case "GLOBAL":
                stack.append(name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(name(module, last))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = stack.pop(), stack.pop()
                stack.append(Made(maker.name, tuple(arguments)))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "BINPERSID":
                stack.append(Persistent(stack.pop()))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "POP":
                stack.pop()
            case other:
                raise ValueError(f"it has the instruction {other}, which no data needs")
    raise ValueError("it is no whole pickle: it ends early")


def _dict(target: Any) -> dict:
    return target.items if isinstance(target, Made) else target


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    # Other keys might be tuples in tuples, of which a few bytes can make more than anybody can hash.
    if not all(isinstance(key, (str, bytes, int)) for key in parts[::2]):
        raise ValueError("a key of its dictionaries is neither text nor a number")
    return dict(zip(parts[::2], parts[1::2], strict=True))
