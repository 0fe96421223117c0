"""`jaxchat chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable
from typing import Any

from jaxchat.cli.answering import add_answering_model
from jaxchat.cli.precision import add_precision_options, precision
from jaxchat.cli.tools import add_tool_options
from jaxchat.errors import UserError
from jaxchat.serve.settings import SETTINGS, Setting, Settings


def add_command(commands: Any) -> None:
    """Adds `chat` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "chat",
        help="Talk to a model in the terminal.",
        description="Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. "
        "A pipe or a file as standard input is one message, all of its lines, and its answer is printed. Only answers "
        "go to standard output; remarks, such as that an answer was cut, go to standard error.",
    )
    add = parser.add_argument
    add_answering_model(add)
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="Print the answer to TEXT and exit; with -, to standard input.",
    )
    add("--system", metavar="TEXT", help="System prompt: text that the model is told before the first question.")
    for setting in SETTINGS.values():
        default = None if setting.name == "seed" else setting.default
        said = "a new one each time" if default is None else default
        add(
            f"--{setting.name}",
            type=_value(setting),
            default=default,
            metavar=setting.letter,
            help=f"{setting.help} (default{':' * (default is None)} {said})",
        )
    add_precision_options(add)
    add_tool_options(add)
    add("--no-history", action="store_true", help="Neither read nor keep the history of what is typed.")
    parser.set_defaults(command=_chat)


def _value(setting: Setting) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return setting.parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _chat(arguments: argparse.Namespace) -> int:
    from jaxchat.devices.compile_cache import keep_compiled  # imports JAX: --help and bad options need not wait for it
    from jaxchat.serve.line_editor import history_file
    from jaxchat.serve.terminal import chat

    keep_compiled()
    values = {setting.field: getattr(arguments, setting.field) for setting in SETTINGS.values()}
    if arguments.seed is None:
        values["seed"] = secrets.randbelow(2**31)
    return chat(
        arguments.run,
        arguments.stage,
        arguments.prompt,
        step=arguments.step,
        settings=Settings(**values),
        system=arguments.system or "",
        tools=arguments.tools,
        uncontained=arguments.uncontained,
        **precision(arguments),
        history=None if arguments.no_history else history_file(),
    )
