"""The process that calls a user's reward function: it imports the function, and then answers one call after another.

Both ways go lines of JSON, through the standard input and output that the process began with. What the function prints
goes nowhere, so that it cannot get among them, nor onto the terminal. Started by `rl.reward`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import reprlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxchat.errors import UserError, check, closest
from jaxchat.tools.sandbox import die_with_parent

LONGEST = 300  # characters of an error's message
_FORM = "write `def {name}(question, answer, conversation)`"


def main() -> NoReturn:
    """Imports the function, says so or what is wrong with it, and calls it for each line of standard input."""
    parent, where = sys.argv[1:]
    die_with_parent(int(parent))
    calls, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    try:
        function, file = load(where)
    except UserError as error:
        _send(answers, {"refused": str(error)})
        os._exit(1)
    _send(answers, {"ready": True})
    for line in calls:
        _send(answers, _call(function, file, json.loads(line)))
    os._exit(0)


def load(where: str) -> tuple[Callable[..., Any], str]:
    """The function that `module:function` or `file.py:function` names, and the file that it is in.

    Raises:
      UserError: there is no such module or function; it fails to import; it cannot be called with three arguments.
    """
    place, _, name = where.rpartition(":")
    check(
        bool(place) and name.isidentifier(),
        f"{where!r} is not a module and a function; write module:function or file.py:function, such as "
        "my_reward.py:reward",
    )
    sys.argv = [place]
    spec, file = _find(place)
    try:
        if place.endswith(".py"):
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses and pickle look for its names
            assert spec.loader is not None
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except BaseException as error:
        raise UserError(f"{shown(file)} fails to import: {described(error, file)}; correct that first") from None
    own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    check(hasattr(module, name), f"{shown(file)} has no function {name!r}{closest(name, own)}")
    function = getattr(module, name)
    form = _FORM.format(name=name)
    check(callable(function), f"{name} in {shown(file)} is of class {type(function).__name__}, not a function; {form}")
    check(not inspect.iscoroutinefunction(function), f"{name} in {shown(file)} is async; {form}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C do not tell
        return function, file
    try:
        signature.bind("", "", {})
    except TypeError:
        raise UserError(
            f"{name}{signature} in {shown(file)} does not take three arguments, but it is called with the question, "
            f"the answer and the conversation; {form}"
        ) from None
    return function, file


def _find(place: str) -> tuple[Any, str]:
    """The import spec of a file or module, and its file."""
    if place.endswith(".py"):
        path = Path(place).absolute()
        if not path.is_file():
            near = [other.name for other in path.parent.glob("*.py")]
            raise UserError(f"there is no file {place}{closest(path.name, near)}")
        return importlib.util.spec_from_file_location(path.stem, path), str(path)
    missing = UserError(
        f"there is no module {place!r} in {os.getcwd()}, nor is one installed"
        f"{closest(place, [path.stem for path in Path().glob('*.py')])}"
    )
    try:
        spec = importlib.util.find_spec(place)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            raise missing from None
        raise UserError(f"{place} fails to import: {described(error, '')}; correct that first") from None
    except BaseException as error:  # a package on the way to it
        raise UserError(f"{place} fails to import: {described(error, '')}; correct that first") from None
    if spec is None:
        raise missing
    return spec, spec.origin or place


def _call(function: Callable[..., Any], file: str, arguments: list[Any]) -> dict[str, Any]:
    """The reward that the function gives, or what is wrong with it."""
    try:
        value = function(*arguments)
        found = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        number = float(found) if isinstance(found, numbers.Number) else None  # pyright: ignore[reportArgumentType]
        if number is None:
            return {"problem": f"it returned {reprlib.repr(value)}, which is not a number"}
        return {"reward": number} if math.isfinite(number) else {"problem": f"it returned {number}"}
    except BaseException as error:
        return {"problem": described(error, file)}


def described(error: BaseException, file: str) -> str:
    """An exception in a line, with the last place in `file`, or in a file beside it, that it came through."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    message = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        frames, message = [(error.filename, error.lineno)], error.msg
    folder = os.path.join(os.path.dirname(file), "")
    own = [frame for frame in frames if file and frame[0].startswith(folder) and "site-packages" not in frame[0]]
    text = " ".join(f"{type(error).__name__}: {message}".removesuffix(": ").split())
    place = "".join(f" ({shown(path)}, line {line})" for path, line in own[-1:])
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]} ...") + place


def shown(file: str) -> str:
    """A file's path as a user would write it."""
    return os.path.relpath(file) if file.startswith(os.path.join(os.getcwd(), "")) else file


def _send(descriptor: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
