"""`jaxchat profile`: where the time of a training step goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jaxchat.cli.options import configure
from jaxchat.cli.parser import take_overrides
from jaxchat.cli.places import check_place
from jaxchat.cli.values import path, whole
from jaxchat.config import Range


def add_command(commands: Any) -> None:
    """Adds `profile` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "profile",
        help="Show where the time of a training step goes.",
        description="Runs a few pretraining steps of an experiment on random tokens under the profiler. Prints the "
        "time of each part of the model, of communication, copies and idleness, and the longest kernels; keeps the "
        "trace.",
        epilog="Fields of the experiment can be given too, such as --model.depth=6; "
        "python launch.py --experiment=NAME --help lists them. On a GPU, command buffers are off while profiling: the "
        "profiler cannot tell which instruction a kernel in one belongs to.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experiment", metavar="NAME", help="The experiment: a file in experiments/.")
    steps = whole(Range(at_least=1, at_most=10_000))
    add("--steps", type=steps, default=5, metavar="N", help="Optimizer steps in the trace. (default 5)")
    add("--trace", type=path, metavar="DIR", help="Where to keep the trace. (default runs/profiles/NAME)")
    take_overrides(parser, _profile)


def _profile(arguments: argparse.Namespace) -> int:
    experiment = configure(arguments.experiment, arguments.overrides, None, arguments.options)
    directory = arguments.trace or f"runs/profiles/{experiment.name}"
    check_place(directory, "--trace")
    from jaxchat.analysis.profile import profile  # imports JAX: --help and bad options need not wait for it
    from jaxchat.devices.mesh import set_xla_flags

    set_xla_flags("--xla_gpu_enable_command_buffer=")  # the profiler does not see the kernels in command buffers
    profile(experiment, steps=arguments.steps, directory=Path(directory))
    return 0
