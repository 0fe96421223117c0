"""The tool that a model may call, as a user chooses it by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from jaxchat.errors import UserError, check, closest
from jaxchat.tools.calculator import calculate
from jaxchat.tools.python import containment, listed, possible, run_code

TOOLS = ("calculator", "python", "none")


class ChosenTool(NamedTuple):
    """What answers the model's calls, None for nothing, and what holds for it on this machine, empty for nothing."""

    answer: Callable[[str], str | None] | None
    says: str = ""


def choose_tool(name: str, *, uncontained: bool = False, cancelled: Callable[[], bool] = lambda: False) -> ChosenTool:
    """The tool called `name`, one of `TOOLS`.

    `python` leaves to the calculator what it understands, so that a model gets the answers that it was trained on.

    Args:
      uncontained: whether programs may run where this machine cannot contain them.
      cancelled: asked while a program runs; once it is true the program is stopped.

    Raises:
      UserError: there is no such tool, it runs no programs that could be uncontained, or it would run some that this
        machine cannot contain.
    """
    check(name in TOOLS, f"there is no tool {name!r}{closest(name, TOOLS)} Choose one of {', '.join(TOOLS)}")
    check(name == "python" or not uncontained, f"--uncontained goes with --tools python, not with --tools {name}")
    if name == "none":
        return ChosenTool(None)
    if name == "calculator":
        return ChosenTool(calculate)
    if possible() and not uncontained:
        raise UserError(
            f"this machine cannot contain the programs of a model: they could {listed(possible(), 'and')}; add "
            "--uncontained to run them all the same, or choose --tools calculator"
        )
    says = f"the model's programs run in processes of their own: {containment()}"
    return ChosenTool(functools.partial(_calculate_or_run, cancelled), says)


def _calculate_or_run(cancelled: Callable[[], bool], code: str) -> str:
    value = calculate(code)
    return run_code(code, cancelled=cancelled) if value is None else value
