"""`jaxchat lr-range`: how high the learning rates may be."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection
from typing import Any

from jaxchat.cli.options import configure, named_fields
from jaxchat.cli.parser import take_overrides
from jaxchat.cli.places import check_place
from jaxchat.cli.values import number, path, whole
from jaxchat.config import Experiment, Range


def add_command(commands: Any) -> None:
    """Adds `lr-range` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "lr-range",
        help="Find learning rates: a suggestion for each group of parameters.",
        description="Raises the learning rate of one group of parameters after another, each time from a fresh model, "
        "until the loss suffers, and suggests a rate for each. Writes lr_range.png and lr_range.json to the run's "
        "directory and changes nothing else there.",
        epilog="Fields of the experiment can be given too, such as --model.depth=6; "
        "python launch.py --experiment=NAME --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experiment", metavar="NAME", help="The experiment: a file in experiments/.")
    add("--run-dir", type=path, metavar="DIR", help="Where the run lives. (default runs/NAME)")
    add("--data", type=path, metavar="DIR", help="Folder with your text, as for launch.py.")
    add(
        "--steps",
        type=whole(Range(at_least=20, at_most=1_000_000)),
        default=200,
        metavar="N",
        help="Optimizer steps for each group. (default 200)",
    )
    rate = number(Range(above=0, at_most=1_000_000))
    add("--min", type=rate, metavar="RATE", help="First learning rate. (default: the configured one / 1000)")
    add("--max", type=rate, metavar="RATE", help="Last learning rate. (default: the configured one x 1000)")
    add(
        "--group",
        choices=("matrix", "embedding", "head", "all"),
        default="all",
        help="Group to test. (default all)",
    )
    take_overrides(parser, _lr_range)


def _lr_range(arguments: argparse.Namespace) -> int:
    experiment = configure(arguments.experiment, arguments.overrides, arguments.data, arguments.options)
    directory = arguments.run_dir or f"runs/{experiment.name}"
    check_place(directory, "--run-dir")
    from jaxchat.analysis.lr_range import GROUPS, run  # imports JAX: --help and bad options need not wait for it
    from jaxchat.devices.compile_cache import keep_compiled
    from jaxchat.runs.starting import take
    from jaxchat.stages.pipeline import check_possible
    from jaxchat.stages.workspace import Workspace

    keep_compiled()
    if experiment.sizes == "auto":
        experiment = _with_sizes(experiment, directory, named_fields(arguments.overrides))
    check_possible(experiment)
    groups = GROUPS if arguments.group == "all" else (arguments.group,)
    with contextlib.ExitStack() as held:
        take(directory, held)
        workspace = Workspace(experiment, directory, keep_config=True)
        run(workspace, arguments.steps, arguments.min, arguments.max, groups)
    return 0


def _with_sizes(experiment: Experiment, directory: str, given: Collection[str]) -> Experiment:
    """The experiment with the sizes of the run in the directory, or of one that would begin there."""
    from jaxchat.planning.settle import keep_sizes, settle
    from jaxchat.runs.directory import RunDirectory
    from jaxchat.storage import to_run_directory

    run = RunDirectory(to_run_directory(directory))
    return keep_sizes(experiment, run, given) if run.is_run() else settle(experiment, None, given=given)
