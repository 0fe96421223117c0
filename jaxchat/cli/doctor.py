"""`jaxchat doctor`: what this machine has for training, what it lacks, and the command that fixes it."""

from __future__ import annotations

import argparse
from typing import Any

from jaxchat.cli.exits import BAD_INPUT
from jaxchat.cli.values import path
from jaxchat.config import Experiment
from jaxchat.verbatim import one_line


def add_command(commands: Any) -> None:
    """Adds `doctor` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "doctor",
        help="Look at this machine (devices, driver, kernels, memory, disk, hub), and say what to fix and how.",
        description="Says what this machine has for training and how fast it is, and for each problem the "
        "command that fixes it. Exit code 0: nothing to fix; 2: something. Each start of launch.py looks too, and says "
        "only what is wrong.",
    )
    add = parser.add_argument
    add("--run-dir", type=path, default="runs", metavar="DIR", help="Where runs are to live. (default runs)")
    add("--data", type=path, default="data", metavar="DIR", help="Where training data is to be. (default data)")
    parser.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from jaxchat.analysis.doctor import examine  # imports JAX: --help and bad options need not wait for it
    from jaxchat.cli.experiments import experiment_names, load_experiment
    from jaxchat.devices.compile_cache import keep_compiled
    from jaxchat.devices.mesh import set_xla_flags

    set_xla_flags()
    keep_compiled()
    experiments = {name: load_experiment(name) for name in experiment_names()}

    def say(subject: str, text: str) -> None:
        print(one_line(f"{subject:<9} {text}"), flush=True)

    problems = examine(experiments, arguments.run_dir, arguments.data, say)
    mendable = [problem for problem in problems if problem.mendable]
    for problem in problems:
        say("slow" if not problem.mendable else "problem", str(problem))
    if not mendable:
        print("nothing to mend")
    return BAD_INPUT if mendable else 0


def say_problems(experiment: Experiment, directory: str) -> None:
    """Says what will stop or slow a run on this machine: a line for each problem, nothing where all is well.

    Raises:
      UserError: JAX finds no devices at all.
    """
    import jax

    from jaxchat.analysis.doctor import problems_at_start

    problems = problems_at_start(experiment, directory)
    process = jax.process_index() if problems else 0
    for problem in problems:  # those of each host: they may differ
        print(one_line(f"{'warning':<9} {f'process {process}: ' if process else ''}{problem}"), flush=True)
