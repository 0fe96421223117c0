"""`jaxchat serve`: a model behind OpenAI's HTTP API, and a page to talk to it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from jaxchat.cli.answering import add_answering_model
from jaxchat.cli.precision import add_precision_options
from jaxchat.cli.tools import add_tool_options
from jaxchat.cli.values import whole
from jaxchat.config import Range
from jaxchat.errors import check


def add_command(commands: Any) -> None:
    """Adds `serve` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "serve",
        help="Serve a model: a page to talk to it, and OpenAI's API.",
        description="Serve a model: a page to talk to it and look inside, and OpenAI's HTTP API for programs. The "
        "address is printed once it answers. Ctrl-C or SIGTERM ends it when the answers under way are finished.",
    )
    add = parser.add_argument
    add_answering_model(add)
    add("--watch", action="store_true", help="Show the run only, also while it trains; no model is loaded.")
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all networks. (default 127.0.0.1)")
    port = whole(Range(at_least=0, at_most=65535))
    add("--port", type=port, default=8000, metavar="N", help="Port to listen on; 0 for any free one. (default 8000)")
    add("--open", action="store_true", help="Open the page in the browser.")
    add(
        "--api-key",
        metavar="KEY",
        help="Key that clients must send. (default: the environment's JAXCHAT_API_KEY; without it, none)",
    )
    add("--no-api-key", action="store_true", help="Let everyone in who can reach the address.")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="Another site that may use the server from a browser, such as https://chat.example.com; may be repeated.",
    )
    add("--name", metavar="NAME", help="The model's name for clients. (default: the name of the run's directory)")
    rows, count = whole(Range(at_least=1, at_most=4096)), whole(Range(at_least=1))
    add("--rows", type=rows, default=64, metavar="N", help="Most requests that are computed at once. (default 64)")
    add("--max-waiting", type=count, default=256, metavar="N", help="Most requests that wait. (default 256)")
    add_precision_options(add)
    add_tool_options(add)
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from jaxchat.serve.http.start import Options, serve  # imports a web server: --help need not wait for it

    if arguments.watch:
        idle = next((name for name in ("stage", "step") if getattr(arguments, name) is not None), None)
        check(idle is None, f"--watch loads no model, which --{idle} would choose; leave one of them out")
    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    given["allow_origin"] = tuple(arguments.allow_origin)
    return serve(Options(**given))
