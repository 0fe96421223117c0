"""The process that runs a model's code as a tool, and prints what it prints. Started by `tools.python.run_code`."""

from __future__ import annotations

import ast
import os
import sys
import types
from typing import NoReturn

from jaxchat.tools.sandbox import OPEN_FILES, contain, die_with_parent

STARTED = b"\0"


def main() -> NoReturn:
    """Runs the code that is standard input; writes `STARTED`, then its output, to standard output."""
    parent, cpu_seconds, _, *packages = sys.argv[2:]
    sys.argv[1:] = []  # a program may read its arguments, and has none
    die_with_parent(int(parent))
    code = sys.stdin.buffer.read().decode()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # instead of the file that the code came in
    os.closerange(3, OPEN_FILES)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        contain(int(cpu_seconds), packages)
        os.write(1, STARTED)
        _run(code)
        sys.stdout.flush()
    finally:  # also what the code has registered for its end does not run
        os._exit(0)


def _run(code: str) -> None:
    module = sys.modules["__main__"] = types.ModuleType("__main__")  # as dataclasses and typing look for it
    write, namespace = sys.stdout.write, module.__dict__
    try:
        tree = ast.parse(code, "program.py")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "program.py", "exec", dont_inherit=True), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program.py", "eval", dont_inherit=True), namespace)
            if value is not None:
                write(f"{value!r}\n")
    except BaseException as error:
        if not (isinstance(error, SystemExit) and error.code in (None, 0)):
            error.__traceback__ = None
            namespace.clear()  # there may be no memory left to write with
            write(f"{_line(error)}\n")


def _line(error: BaseException) -> str:
    """The last line of a traceback: the error's class and message."""
    try:
        message = str(error)
    except Exception:
        message = ""
    return f"{type(error).__qualname__}: {message}" if message else type(error).__qualname__
