"""`jaxchat tokenizer eval`: how well a tokenizer compresses, and how others do."""

from __future__ import annotations

import argparse
from typing import Any

from jaxchat.cli.values import path


def add_command(commands: Any) -> None:
    """Adds `tokenizer` to the commands of `jaxchat`."""
    tokenizer = commands.add_parser("tokenizer", help="Measure how well a tokenizer compresses, and compare it.")
    tokenizer_commands = tokenizer.add_commands()
    parser = tokenizer_commands.add_parser(
        "eval",
        help="Bytes per token on several kinds of text.",
        description="Bytes per token on news, code, math, other scripts, and the training text; more is better. "
        "PATH and FILE are a run directory, a folder with a tokenizer.json, or a .json or .tiktoken file.",
    )
    add = parser.add_argument
    add("path", type=path, metavar="PATH", help="The tokenizer.")
    add("--against", type=path, nargs="+", default=[], metavar="FILE", help="Tokenizers to compare it with.")
    add("--text", type=path, metavar="TEXT", help="Folder or file of text. (default: the text of the run in PATH)")
    add(
        "--pattern", metavar="REGEX", help="Split pattern of .tiktoken files that are not named after a known encoding."
    )
    add("--json", action="store_true", help="Print JSON instead of a table.")
    parser.set_defaults(command=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from jaxchat.analysis.compression import evaluate  # slow to import: --help and bad options need not wait for it

    evaluate(arguments.path, arguments.against, arguments.text, pattern=arguments.pattern, as_json=arguments.json)
    return 0
