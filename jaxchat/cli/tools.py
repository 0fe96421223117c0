"""The options that choose the model's tool: `--tools` and `--uncontained`."""

from __future__ import annotations

from typing import Any

from jaxchat.tools.choice import TOOLS


def add_tool_options(add: Any) -> None:
    """Adds the options by `add`, a parser's `add_argument`; `choose_tool` takes their values."""
    add(
        "--tools",
        choices=TOOLS,
        default="calculator",
        help="What answers the model's calls: the calculator; python, which runs the code that the model writes, in a "
        "contained process; or none. (default calculator)",
    )
    add(
        "--uncontained",
        action="store_true",
        help="With --tools python: run the model's code even where this machine cannot contain it.",
    )
