"""The options that name the model that answers."""

from __future__ import annotations

from typing import Any

from jaxchat.cli.values import path


def add_answering_model(add: Any) -> None:
    """Adds `--run`, `--stage` and `--step` by `add`, a parser's `add_argument`."""
    add("--run", required=True, type=path, metavar="DIR", help="The run's directory.")
    add(
        "--stage",
        metavar="STAGE",
        help="Stage whose model answers: pretrain, midtrain, sft or rl. (default: the last finished one)",
    )
    add("--step", metavar="N", help="A kept checkpoint of that stage: its step, or best. (default: its result)")
