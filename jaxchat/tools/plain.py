"""Plain data as one line of JSON that keeps the types: what the checker and a model's program send to each other.

Only the value crosses, never an object: what a class overrides (`__eq__`, `__bool__`, `__len__`) stays behind.
"""

from __future__ import annotations

import json
from collections import UserList, UserString, deque
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sized, ValuesView
from collections.abc import Set as AnySet
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

_LARGEST = 1 << 53  # a longer number goes as hexadecimal digits, which are read in linear time and without a limit
_COLLECTIONS: tuple[tuple[str, Any], ...] = (
    ("list", list),
    ("tuple", tuple),
    ("set", set),
    ("frozenset", frozenset),
    ("deque", deque),
)
_VIEWS = (("keys", KeysView), ("pairs", ItemsView), ("values", ValuesView))


class Opaque:
    """Stands for a value that is no plain data. It equals nothing, and is as true as the value."""

    def __init__(self, true: bool):
        self._true = true

    def __bool__(self) -> bool:
        return self._true


class Items:
    """Stands for a collection that equals nothing but has a length, such as an array. Its items can be looked at."""

    def __init__(self, items: list[Any]):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


def dumps(value: Any) -> bytes:
    """`value` as a line. A subclass becomes its built-in class, an iterator one that has been read to its end.

    Numbers of NumPy become Python's. What equals plain data by Python's own classes, such as a `ChainMap` or a
    `UserList`, becomes that. Another collection becomes `Items`, and any other object `Opaque`.

    Raises:
      RecursionError: the value is nested too deeply, or in itself.
    """
    return json.dumps(_encode(value)).encode() + b"\n"


def loads(line: bytes) -> Any:
    """The value of a line that `dumps` wrote.

    Raises:
      ValueError, TypeError, RecursionError: it is no such line.
    """
    return _decode(json.loads(line))


def _encode(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()  # a number of NumPy
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Integral):
        number = int.__int__(value) if isinstance(value, int) else int(value)
        return number if -_LARGEST < number < _LARGEST else {"int": hex(number)}
    if isinstance(value, UserString):
        return str(value)
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    for name, kind in _COLLECTIONS:
        if isinstance(value, kind):
            return {name: [_encode(item) for item in kind.__iter__(value)]}
    if isinstance(value, range):
        return {"range": [_encode(part) for part in (value.start, value.stop, value.step)]}
    for name, kind in (*_VIEWS, ("list", UserList), ("set", AnySet)):
        if isinstance(value, kind):
            return {name: [_encode(item) for item in value]}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, Fraction):
        return {"fraction": [_encode(value.numerator), _encode(value.denominator)]}
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Iterable) and not isinstance(value, type):
        kept = isinstance(value, Sized) and not isinstance(value, Iterator)
        return {"items" if kept else "iterator": [_encode(item) for item in value]}
    return {"opaque": bool(value)}


def _decode(data: Any) -> Any:
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a bare list")
        return data
    ((name, content),) = data.items()
    match name:
        case "int":
            return int(content, 16)
        case "dict":
            return {_decode(key): _decode(item) for key, item in content}
        case "list" | "tuple" | "set" | "frozenset" | "deque":
            return dict(_COLLECTIONS)[name](_decode(item) for item in content)
        case "range":
            return range(*(_decode(part) for part in content))
        case "keys":
            return dict.fromkeys(_decode(item) for item in content).keys()
        case "pairs":
            return dict(_decode(item) for item in content).items()
        case "values":
            return dict(enumerate(_decode(item) for item in content)).values()
        case "items":
            return Items([_decode(item) for item in content])
        case "iterator":
            return iter([_decode(item) for item in content])
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "complex":
            return complex(*content)
        case "decimal":
            return Decimal(content)
        case "fraction":
            return Fraction(*(_decode(part) for part in content))
    return Opaque(content is not False)
