"""`jaxchat chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from jaxchat.cli.values import number, path, whole
from jaxchat.config import Range


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
    add("--run", required=True, type=path, metavar="DIR", help="The run's directory.")
    add(
        "--stage",
        metavar="STAGE",
        help="Stage whose model answers: pretrain, midtrain, sft or rl. (default: the last finished one)",
    )
    add("--step", metavar="N", help="A kept checkpoint of that stage: its step, or best. (default: the last)")
    add(
        "-p",
        "--prompt",
        metavar="TEXT",
        help="Print the answer to TEXT and exit; with -, to standard input.",
    )
    add(
        "--temperature",
        type=number(Range(at_least=0)),
        default=0.6,
        metavar="X",
        help="Sampling temperature; 0 always takes the likeliest token. (default 0.6)",
    )
    count = whole(Range(at_least=1))
    add("--top-k", type=count, default=50, metavar="K", help="Sample from the K likeliest tokens. (default 50)")
    add(
        "--seed",
        type=whole(Range(at_least=0)),
        metavar="N",
        help="Random seed, to repeat a conversation exactly. (default: a new one each time)",
    )
    add("--max-tokens", type=count, default=256, metavar="N", help="Longest answer, in tokens. (default 256)")
    parser.set_defaults(command=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from jaxchat.devices.compile_cache import keep_compiled  # imports JAX: --help and bad options need not wait for it
    from jaxchat.serve.terminal import chat

    keep_compiled()
    options = {name: getattr(arguments, name) for name in ("step", "temperature", "top_k", "seed", "max_tokens")}
    return chat(arguments.run, arguments.stage, arguments.prompt, **options)
