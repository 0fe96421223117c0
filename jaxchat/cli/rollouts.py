"""`jaxchat rollouts`: a page to read what reinforcement learning has sampled, with its rewards."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from jaxchat.cli.places import check_place
from jaxchat.cli.values import path, whole
from jaxchat.config import Range
from jaxchat.errors import check


def add_command(commands: Any) -> None:
    """Adds `rollouts` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "rollouts",
        help="Read what reinforcement learning has sampled, with its rewards.",
        description="Makes a page of the answers that a run has sampled in the stage rl, with rewards and advantages: "
        "the questions of a step, best or worst first, and how the answers to a question have changed. Prints a table "
        "of the steps. It needs no model, and can be done while the stage runs.",
    )
    add = parser.add_argument
    add("--run", required=True, type=path, metavar="DIR", help="The run's directory.")
    add(
        "--steps",
        nargs="+",
        type=whole(Range(at_least=0)),
        metavar="N",
        help="The steps to show. (default: up to 20 from the first to the last)",
    )
    add("--out", type=path, metavar="DIR", help="Folder for the page, rollouts.html. (default RUN/rl)")
    parser.set_defaults(command=_rollouts)


def _rollouts(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        check_place(arguments.out, "--out")
    from etils import epath  # slow to import, as what follows

    from jaxchat.analysis.rollouts import chosen_steps, opened, read_index, rollouts_page, summary_table
    from jaxchat.runs.directory import RunDirectory
    from jaxchat.runs.files import write_bytes
    from jaxchat.runs.progress import LiveLine
    from jaxchat.storage import to_path

    directory = RunDirectory(arguments.run)
    directory.check_there(arguments.run, "give --run the folder of a run")
    source = directory.rollouts
    check(
        source.exists(),
        f"{arguments.run} has no rl/rollouts.jsonl: the stage rl writes it from its first step on",
    )
    with opened(source) as file:
        line = LiveLine("rollouts", None)
        try:
            index = read_index(file, functools.partial(line.show_progress, "reading"))
        finally:
            line.close()
        check(
            bool(index.steps) or not index.damaged,
            f"{source} is damaged: none of its lines can be read; do the stage again with launch.py --redo=rl",
        )
        check(bool(index.steps), f"{source} has no answers yet; wait for the first step of rl")
        steps = chosen_steps(index, arguments.steps)
        html = rollouts_page(arguments.run, file, index, steps)
    if index.damaged:
        _say(f"{source}: {index.damaged:,} damaged {'line is' if index.damaged == 1 else 'lines are'} left out")
    out = (source.parent if arguments.out is None else epath.Path(to_path(arguments.out))) / "rollouts.html"
    write_bytes(out, html.encode("utf-8", "replace"))
    print(summary_table(index, steps))
    _say(f"\n{out} is a page to read the answers in; {source} has all of them")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
