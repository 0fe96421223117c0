"""Argument parsers whose errors are one line, with the name that was probably meant."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jaxchat.config import shown
from jaxchat.errors import UserError, check, closest

COMMAND = "COMMAND"  # how help pages write a parser's commands
# What is wrong with an option's value: the beginning of argparse's message, and ours.
_PROBLEMS = {"ignored explicit argument": "takes no value", "expected": "needs a value"}
# The dashes that word processors and web pages make of two hyphens.
_LONG_DASH = re.compile(r"[\u2010-\u2015\u2212]+-?(?=[A-Za-z][\w.-]*(=|$))")


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
        for word in words:
            whole = not any(0xD800 <= ord(character) < 0xE000 for character in word)
            check(whole, f"{shown(word)} is not UTF-8; rename what it names, or set a UTF-8 locale")
        if self.get_default("overrides") is None:
            self._refuse_unknown(words)  # first: argparse would complain about a missing option, not the misspelt one
        return super().parse_known_args(words, namespace)

    def _refuse_unknown(self, words: list[str]) -> None:
        known = option_strings(self)
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for word in words:
            if word == "--" or (has_commands and not word.startswith("-")):
                return  # what follows a command is for its own parser
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                raise UserError(f"unknown option {shorten(name)}{closest(name, known)} See {self.prog} --help")
            # argparse would take -prompt for -p with the value "rompt".
            long = name.startswith("-") and len(name) > 2 and f"-{name}" in known
            check(not long, f"unknown option {name}, did you mean '-{name}'? See {self.prog} --help")

    def error(self, message: str) -> NoReturn:
        name, _, problem = message.removeprefix("argument ").partition(": ")
        name = name.rpartition("/")[2]  # of -p/--prompt the name that explains itself
        if message.startswith("argument "):
            told = next((ours for theirs, ours in _PROBLEMS.items() if problem.startswith(theirs)), problem)
            choice = next((a for a in self._actions if a.choices and name in (a.metavar, *a.option_strings)), None)
            wrong = re.match(r"invalid choice: (.*?)(?: \(choose from .*\))?$", problem, re.DOTALL)
            if wrong and choice:
                self._refuse_choice(name, wrong[1], choice.choices or ())
            raise UserError(f"{name} {told}" if ";" in told else f"{name} {told}; see {self.prog} --help")
        raise UserError(f"{message}; see {self.prog} --help")

    def _refuse_choice(self, name: str, word: str, choices: Iterable[str]) -> NoReturn:
        what = "unknown command" if name == COMMAND else f"{name}: unknown value"
        hint = closest(word.strip("'\""), choices)
        raise UserError(f"{what} {shorten(word)}{hint} Choose from {', '.join(choices)}")


def shorten(word: str) -> str:
    """A word of the command line for a message."""
    return word if len(word) <= 60 else f"{word[:60]}…"


def refuse_long_dash(word: str) -> None:
    """Raises UserError for an option whose hyphens have become a dash, as in text copied from a document."""
    meant = _LONG_DASH.sub("--", word, count=1)
    check(meant == word, f"{shorten(word)} begins with a dash; write two hyphens: {shorten(meant)}")


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The names of a parser's options, for hints about misspelt ones."""
    return [name for action in parser._actions for name in action.option_strings]


def take_overrides(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    """Makes `command` the parser's, and lets fields of an experiment follow the parser's own options.

    The command finds them as `arguments.overrides`, and the names of the parser's own options, which hints about a
    misspelt field look among too, as `arguments.options`.
    """
    parser.set_defaults(command=command, overrides=(), options=option_strings(parser))
