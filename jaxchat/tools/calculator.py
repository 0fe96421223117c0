"""The calculator that the model calls: arithmetic, and counting in a string. Nothing is ever executed.

The expression is cut into the few tokens below and evaluated as it is read, by precedence climbing. Its length, its
depth, and the size of every number are bounded, so that every call returns at once.
"""

from __future__ import annotations

import math
import operator
import re
from fractions import Fraction

MAX_LENGTH = 4096  # characters: more than a thousand terms
MAX_DEPTH = 100  # of parentheses and powers within each other
MAX_DIGITS = 50  # of a number before its point
EXACT_BITS = 2048  # a fraction with a larger denominator becomes a float
SIGNIFICANT = 12  # digits of a number that is not whole
DECIMALS = 2  # of such a number at least, if it has many digits before its point

_DIGITS = "[0-9](?:_?[0-9])*"
_EXPONENT = f"(?:[eE][-+]?{_DIGITS})?"
_TOKEN = re.compile(
    rf"""[ \t]*(?:
    (?P<number>(?:[1-9][0-9]{{0,2}}(?:,[0-9]{{3}})+(?![0-9_])|{_DIGITS})(?:\.(?:{_DIGITS})?)?{_EXPONENT}|\.{_DIGITS}{_EXPONENT})
    |(?P<string>'[^'\\\n\r\0]*'|"[^"\\\n\r\0]*")
    |(?P<operator>\*\*|//|[-+*/%(),]|\.count\b)
    )""",
    re.VERBOSE,
)  # fmt: skip
_LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "**": 3}
_POWER = _LEVELS["**"]

Number = int | Fraction | float


class _Refused(Exception):
    """An expression is not allowed."""


def calculate(expression: str) -> str | None:
    """Evaluates `expression` to the text that the model sees, or None if it is not allowed. Never raises.

    Allowed are + - * / // % ** (with Python's meaning and precedence) with numbers and parentheses, and
    `'word'.count('x')`. Commas must stand between groups of three digits: 1,250 but not 12,50. Whole numbers and their
    quotients are exact, and numbers with a point or an exponent are Python's floats. Whole results are written without
    a point, others with at most 12 significant digits, or two decimals if that is more: 0.1 + 0.2 is "0.3", 6 / 2 is
    "3", 2 / 3 is "0.666666666667".
    """
    expression = expression.strip()
    if len(expression) > MAX_LENGTH:
        return None
    try:
        tokens = _tokens(expression)
        value = _evaluate(tokens, 1, MAX_DEPTH)
        if len(tokens) > 1 or isinstance(value, str):
            return None
        return _text(value)
    except (_Refused, ValueError, ArithmeticError, RecursionError):
        return None


def _tokens(expression: str) -> list[str]:
    """The tokens in reverse, after a last one that is empty: each is taken with `pop`."""
    tokens, position = [], 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise _Refused
        tokens.append(match[match.lastgroup or 0])
        position = match.end()
    return ["", *reversed(tokens)]


def _evaluate(tokens: list[str], floor: int, depth: int) -> Number | str:
    """The value of the longest expression whose operators have at least the level `floor`."""
    if depth == 0:
        raise _Refused
    sign = 0
    while tokens[-1] in ("+", "-"):
        sign = (sign or 1) * (-1 if tokens.pop() == "-" else 1)
    if sign:
        value = _apply("*", sign, _evaluate(tokens, _POWER, depth - 1))
    else:
        value = _operand(tokens, depth)
    while (level := _LEVELS.get(tokens[-1], 0)) >= floor:
        name = tokens.pop()
        # Powers group from the right, and their exponent may have a sign: 2**-3**2 is 2**(-(3**2)).
        value = _apply(name, value, _evaluate(tokens, level if name == "**" else level + 1, depth - 1))
    return value


def _operand(tokens: list[str], depth: int) -> Number | str:
    """A number, a string or an expression in parentheses, with the calls of `count` that follow it."""
    token = tokens.pop()
    if token == "(":
        value = _evaluate(tokens, 1, depth - 1)
        _expect(tokens, ")")
    elif token[:1] in ("'", '"'):
        value = token[1:-1]
        while tokens[-1][:1] in ("'", '"'):
            value += tokens.pop()[1:-1]
    else:
        value = _number(token)
    while tokens[-1] == ".count":
        tokens.pop()
        _expect(tokens, "(")
        part = _evaluate(tokens, 1, depth - 1)
        if tokens[-1] == ",":
            tokens.pop()
        _expect(tokens, ")")
        if not (isinstance(value, str) and isinstance(part, str)):
            raise _Refused
        value = value.count(part)
    return value


def _expect(tokens: list[str], token: str) -> None:
    if tokens.pop() != token:
        raise _Refused


def _number(token: str) -> Number:
    if not token[:1].isdigit() and token[:1] != ".":
        raise _Refused
    digits = token.replace(",", "")
    if not digits.replace("_", "").isdigit():
        return _bounded(float(digits))
    if digits[0] == "0" and digits.strip("0_"):  # 007 is not a number in Python
        raise _Refused
    return _bounded(int(digits))


def _apply(name: str, left: Number | str, right: Number | str) -> Number:
    if isinstance(left, str) or isinstance(right, str):
        raise _Refused
    match name:
        case "+":
            return _bounded(left + right)
        case "-":
            return _bounded(left - right)
        case "*":
            return _bounded(left * right)
        case "/":
            exact = not (isinstance(left, float) or isinstance(right, float))
            return _bounded(Fraction(left) / Fraction(right) if exact else left / right)
        case "//":
            return _bounded(left // right)
        case "%":
            return _bounded(left % right)
        case _:
            return _bounded(_power(left, right))


def _power(base: Number, exponent: Number) -> Number | complex:
    # Refused before it is computed: 9**9**9 would exhaust the machine.
    if abs(base) > 1 and exponent > 0 and exponent * math.log10(abs(base)) > MAX_DIGITS:
        raise _Refused
    if isinstance(base, float) or not isinstance(exponent, int) or (isinstance(base, int) and exponent >= 0):
        return operator.pow(base, exponent)
    base = Fraction(base)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    return base**exponent if bits * abs(exponent) <= EXACT_BITS else float(base) ** exponent


def _bounded(value: Number | complex) -> Number:
    if isinstance(value, complex) or not abs(value) < 10**MAX_DIGITS:  # also refuses NaN and infinity
        raise _Refused
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return value.numerator
        if value.denominator.bit_length() > EXACT_BITS:
            return float(value)
    return value


def _text(value: Number) -> str:
    if isinstance(value, float) and value.is_integer():
        # Above 2**53 a float is not exact: the digits that Python writes say so, as in 1e+49.
        return str(int(value)) if abs(value) <= 2**53 else repr(value)
    if isinstance(value, int):
        return str(value)
    before_point = len(str(abs(int(value))))
    digits = max(SIGNIFICANT, before_point + DECIMALS)
    if digits <= 15 or isinstance(value, float):
        return f"{float(value):.{digits}g}"
    hundredths = round(value * 10**DECIMALS)
    whole, rest = divmod(abs(hundredths), 10**DECIMALS)
    return f"{'-' * (hundredths < 0)}{whole}.{rest:0{DECIMALS}}".rstrip("0").rstrip(".")
