"""The console command `jaxchat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxchat.cli import chat, data, lr_range, profile, tokenizer
from jaxchat.cli.exits import run_command
from jaxchat.cli.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxchat ...` and returns its exit code, one of those of `jaxchat.cli.exits`."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = jaxchat_parser()
    arguments, rest = parser.parse_known_args(argv)
    if "overrides" in arguments:
        arguments.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments.command(arguments)


def jaxchat_parser() -> Parser:
    """The parser of `jaxchat`, with all its commands."""
    parser = Parser(
        prog="jaxchat",
        description="Talk to a model that jaxchat has trained, compare tokenizers, download data, "
        "find learning rates, profile training.",
    )
    commands = parser.add_commands()
    for module in (chat, tokenizer, data, lr_range, profile):
        module.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
