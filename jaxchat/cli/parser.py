"""Argument parsers whose errors are one line, with the name that was probably meant."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxchat.errors import UserError, closest

COMMAND = "COMMAND"  # how help pages write a parser's commands
# What is wrong with an option's value: the beginning of argparse's message, and ours.
_PROBLEMS = {
    "ignored explicit argument": "takes no value",
    "expected": "needs a value",
    "invalid int value": "takes a whole number",
    "invalid float value": "takes a number",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and does not break names of options and data sets at their hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` instead of ending the process."""

    def __init__(self, *args: Any, add_help: bool = True, **options: Any):
        super().__init__(*args, add_help=False, **options)
        if add_help:
            self.add_argument("-h", "--help", action="help", help="Show this page.")

    def add_commands(self) -> Any:
        """The action that takes commands: `add_parser` adds one."""
        return self.add_subparsers(title="commands", metavar=COMMAND, required=True)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        if not has_commands and self.get_default("overrides") is None:
            self._refuse_unknown(words)  # first: argparse would complain about a missing option, not the misspelt one
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: list[str]) -> None:
        known = option_strings(self)
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                raise UserError(f"unknown option {name}{closest(name, known)} See {self.prog} --help")

    def error(self, message: str) -> NoReturn:
        name, colon, problem = message.removeprefix("argument ").partition(": ")
        told = next((ours for theirs, ours in _PROBLEMS.items() if problem.startswith(theirs)), None)
        if message.startswith("argument ") and told:
            raise UserError(f"{name} {told}; see {self.prog} --help")
        wrong = re.match(r"invalid choice: '([^']*)'", problem)
        choices = next((a.choices for a in self._actions if name in (a.metavar, *a.option_strings)), None)
        if wrong and choices:
            what = "unknown command" if name == COMMAND else f"{name}: unknown value"
            hint = closest(wrong[1], choices)
            raise UserError(f"{what} {wrong[1]!r}{hint} Choose from {', '.join(choices)}")
        raise UserError(f"{message}; see {self.prog} --help")


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a parser's options, for hints about misspelt ones."""
    return [name for action in parser._actions for name in action.option_strings]


def take_overrides(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    """Makes `command` the parser's, and lets fields of an experiment follow the parser's own options.

    The command finds them as `arguments.overrides`, and the names of the parser's own options, which hints about a
    misspelt field look among too, as `arguments.options`.
    """
    parser.set_defaults(command=command, overrides=(), options=option_strings(parser))
