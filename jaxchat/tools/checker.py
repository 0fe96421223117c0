"""The process that judges a program: it has the tests, and asks the program's process for results by value.

Two processes, so that the verdict never comes from the one that runs the model's code:

    evaluator  → request →  checker (tests, expected values)  → calls →   worker (the model's program)
               ← verdict ←                                    ← values ←

The worker is forked before the checker has read the tests, so they are nowhere in its memory. It gets arguments and
gives back values as plain data (`tools.plain`); comparing is done here, with built-in types. Started by `tools.python`.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import types
from typing import Any, BinaryIO, NoReturn

from jaxchat.tools import plain
from jaxchat.tools.sandbox import OPEN_FILES, contain, die_with_parent

PASSED, FAILED = b"passed", b"failed"
_LONGEST_LINE = 16 << 20  # bytes of an answer; a longer one is no answer


class Ended(BaseException):
    """The program's process has ended, talks nonsense, or has used up its time. No `except Exception` catches it."""


class Failed(Exception):
    """The program raised an exception that cannot be made anew here."""


def main() -> NoReturn:
    """Reads a request from standard input, and writes PASSED or FAILED to standard output."""
    evaluator, cpu_seconds, wall_seconds, *packages = sys.argv[2:]
    sys.argv[1:] = []  # a program may read its arguments, and has none
    die_with_parent(int(evaluator))
    request, verdict = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    call, answer, checker = os.pipe(), os.pipe(), os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            _keep(call[0], answer[1])
            die_with_parent(checker)
            contain(int(cpu_seconds), packages)
            _serve(os.fdopen(call[0], "rb"), answer[1])
        finally:
            os._exit(1)
    _keep(call[1], answer[0], request, verdict)
    contain(int(cpu_seconds), packages, may_kill=True)
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, float(wall_seconds), 1.0)  # again, should the tests swallow it
    try:
        passed = _judge(json.loads(os.fdopen(request, "rb").read()), call[1], os.fdopen(answer[0], "rb"))
    except BaseException:
        passed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    os.write(verdict, PASSED if passed else FAILED)
    os._exit(0)


def _keep(*descriptors: int) -> None:
    """Closes all other open files but the standard ones; there are few, since this process was given none."""
    low = 3
    for descriptor in sorted(descriptors):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, OPEN_FILES)


def _time_is_up(signal_number: int, frame: object) -> NoReturn:
    raise Ended


def _judge(request: dict[str, str], calls: int, answers: BinaryIO) -> bool:
    """Whether the program runs to its end and passes the tests."""

    def ask(question: Any) -> Any:
        _send(calls, plain.dumps(question))
        line = answers.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise Ended
        try:
            kind, value = plain.loads(line)
            error = _exception(*value) if kind == "error" else None
        except Exception:
            raise Ended from None
        if error is not None:
            raise error
        return value

    def candidate(*args: Any, **kwargs: Any) -> Any:
        return ask((args, kwargs))

    ask((request["context"], request["program"], request["entry_point"]))
    if request["tests"]:
        namespace: dict[str, Any] = {"__name__": "tests"}
        _execute(request["context"], namespace)
        namespace[request["entry_point"]] = candidate
        _execute(request["tests"], namespace)
        namespace["check"](candidate)
    return True


def _exception(name: str, args: tuple[Any, ...]) -> Exception:
    """The exception of which `_error` has written the name and arguments."""
    kind = getattr(builtins, name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(*args)
        except Exception:
            pass  # some take no others than their own
    return Failed()


def _serve(calls: BinaryIO, answers: int) -> None:
    """Runs the program, then calls its function as often as it is asked to. The worker's whole life."""
    context, program, entry_point = plain.loads(calls.readline())
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and typing look for the names of annotations
    try:
        for source in (context, program):
            _execute(source, module.__dict__)
        answer = plain.dumps(("value", None))
    except Exception as error:
        answer = _error(error)
    _send(answers, answer)
    while line := calls.readline():
        args, kwargs = plain.loads(line)
        try:
            answer = plain.dumps(("value", getattr(module, entry_point)(*args, **kwargs)))
        except Exception as error:
            answer = _error(error)
        _send(answers, answer)


def _error(error: Exception) -> bytes:
    """A line for an exception: the nearest built-in class that it belongs to, and its arguments."""
    name = next(kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    try:
        return plain.dumps(("error", (name, error.args)))
    except Exception:
        return plain.dumps(("error", (name, ())))


def _execute(source: str, namespace: dict[str, Any]) -> None:
    exec(compile(source, "program.py", "exec", dont_inherit=True), namespace)


def _send(descriptor: int, line: bytes) -> None:
    while line:
        line = line[os.write(descriptor, line) :]
