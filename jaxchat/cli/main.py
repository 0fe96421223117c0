"""The console command `jaxchat`.

Nothing slow is imported before `main` has seen to Ctrl-C.
"""

from __future__ import annotations

from jaxchat import stopping

TYPE_CHECKING = False  # as in `stopping`
if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxchat.cli.parser import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxchat ...` and returns its exit code, one of those of `jaxchat.cli.exits`.

    Without `argv` it is the program itself: it takes the arguments of the command line, and ends the process.
    """
    if argv is None:
        stopping.begin()
    from jaxchat.cli.exits import leave, run_command

    code = run_command(lambda: _run(argv))
    return leave(code) if argv is None else code


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
    from jaxchat.cli import (
        bench,
        chat,
        data,
        doctor,
        eval,
        export,
        import_,
        lr_range,
        profile,
        rollouts,
        serve,
        tokenizer,
    )
    from jaxchat.cli.parser import Parser

    parser = Parser(
        prog="jaxchat",
        description="Talk to a model that jaxchat has trained, serve it, evaluate, export and import models, "
        "read what reinforcement learning has sampled, compare tokenizers, download data, find learning rates, profile "
        "training, measure generation, say what this machine lacks.",
    )
    commands = parser.add_commands()
    for module in (chat, serve, eval, rollouts, export, import_, tokenizer, data, lr_range, profile, bench, doctor):
        module.add_command(commands)
    return parser


if __name__ == "__main__":
    main()
