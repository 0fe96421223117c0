"""Plain data as one line of JSON that keeps the types: what the checker and a model's program send to each other.

Only the value crosses, never an object: what a class overrides (`__eq__`, `__bool__`, `__len__`) stays behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

_LARGEST = 1 << 53  # a longer number goes as hexadecimal digits, which are read in linear time and without a limit
_SEQUENCES = (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset))


class Opaque:
    """Stands for a value that is no plain data. It equals nothing, and it is true, as most objects are."""


def dumps(value: Any) -> bytes:
    """`value` as a line. A subclass becomes its built-in class, an iterator one that has been read to its end.

    Numbers of NumPy become Python's. What is neither plain nor iterable becomes `Opaque`.

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
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in dict.items(value)]}
    for name, kind in _SEQUENCES:
        if isinstance(value, kind):
            return {name: [_encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, Fraction):
        return {"fraction": [_encode(value.numerator), _encode(value.denominator)]}
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Iterable) and not isinstance(value, type):
        return {"iterator": [_encode(item) for item in value]}
    return {"opaque": None}


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
        case "list" | "tuple" | "set" | "frozenset":
            return dict(_SEQUENCES)[name](_decode(item) for item in content)
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
    return Opaque()
