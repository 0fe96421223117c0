"""The calculator of nanochat's engine: Python's own arithmetic and `'word'.count('x')`. Nothing is ever executed.

nanochat evaluates a call with `eval` after a look at its characters. Here it is parsed and computed node by node. In
calls with `.count(`, of which nanochat lets any expression of letters, quotes and parentheses pass, only the methods
in `_METHODS` are known.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

_ARITHMETIC = frozenset("0123456789*+-/.() ")
_COUNTING = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'\"()._ ")
# Words that make nanochat refuse a call wherever they stand, even inside of a string: 'direct'.count('r').
_REFUSED = (
    "__", "import", "exec", "eval", "compile", "open", "file", "input", "globals", "locals", "vars", "dir",
    "getattr", "setattr", "delattr", "hasattr",
)  # fmt: skip
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_METHODS = ("count", "lower", "upper", "strip", "split")
MAX_LENGTH = 4096  # characters: parsing takes memory, and numbers grow with the expression


def calculate(expression: str) -> str | None:
    """The value as Python writes it (`6/2` is "3.0"), or None where nanochat gives no output. Never raises.

    Commas are removed first, so that `1,250` is a number.
    """
    expression = expression.replace(",", "")
    if _ARITHMETIC.issuperset(expression):
        allowed = "**" not in expression
    else:
        lower = expression.lower()
        allowed = _COUNTING.issuperset(expression) and ".count(" in expression
        allowed = allowed and not any(word in lower for word in _REFUSED)
    if not allowed or len(expression) > MAX_LENGTH:
        return None
    try:
        value = _value(ast.parse(expression.lstrip(" \t"), mode="eval").body)
        return None if value is None else str(value)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.Tuple) and not node.elts:
        return ()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        owner = _value(node.func.value)
        if isinstance(owner, str | list) and not node.keywords:
            return getattr(owner, node.func.attr)(*map(_value, node.args))
    raise TypeError(f"{ast.dump(node)} is no arithmetic")
