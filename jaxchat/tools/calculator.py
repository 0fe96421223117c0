"""The calculator that the model calls: arithmetic, and counting in a string. Nothing is ever executed.

An expression must match a regular expression, is parsed by Python's grammar, and is evaluated by the few rules below; a
node without a rule is refused. Numbers, exponents, depth and length are bounded, so that every call returns at once.
"""

from __future__ import annotations

import ast
import math
import operator
import re

MAX_LENGTH = 512
MAX_DEPTH = 100
MAX_DIGITS = 50  # of any intermediate result, integer or float

# Most else in Python's grammar (names, subscripts, comparisons, escapes in strings) cannot be spelled with these.
_ALPHABET = re.compile(r"""(?:'[^'\\]*'|"[^"\\]*"|\.count\b|[0-9eE.+\-*/%(),_ \t])+""")
_STRING_OR_GROUP = re.compile(r"""('[^']*'|"[^"]*")|(?<=\d),(?=\d{3}(?!\d))""")

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class _Refused(Exception):
    """An expression is not allowed."""


def calculate(expression: str) -> str | None:
    """Evaluates `expression` to the text that the model sees, or None if it is not allowed. Never raises.

    Allowed are + - * / // % ** (with Python's meaning) with numbers and parentheses, and `'word'.count('x')`. Commas
    between groups of three digits are dropped. Whole numbers are written without a point, others with at most 12
    significant digits: 0.1 + 0.2 is "0.3", 6 / 2 is "3".
    """
    expression = expression.strip()
    if len(expression) > MAX_LENGTH or not _ALPHABET.fullmatch(expression):
        return None
    expression = _STRING_OR_GROUP.sub(lambda match: match[1] or "", expression)
    try:
        value = _number(ast.parse(expression, mode="eval").body, MAX_DEPTH)
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e15):
        return f"{value:.12g}"
    return str(int(value))


def _number(node: ast.expr, depth: int) -> int | float:
    if depth == 0:
        raise _Refused
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_number(operand, depth - 1))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(_number(left, depth - 1), _number(right, depth - 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_number(left, depth - 1), _number(right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise _Refused
    if isinstance(value, complex) or not abs(value) < 10**MAX_DIGITS:  # also refuses NaN and infinity
        raise _Refused
    return value


def _power(base: int | float, exponent: int | float) -> int | float | complex:
    # Refused before it is computed: 9**9**9 would exhaust the machine.
    if abs(base) > 1 and exponent > 0 and exponent * math.log10(abs(base)) > MAX_DIGITS:
        raise _Refused
    return base**exponent
