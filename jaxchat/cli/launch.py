"""Runs an experiment: trains a chatbot from nothing, stage by stage.

    python launch.py --experiment=quickstart
    python launch.py --experiment=d12 --pretrain.num-iterations=200
    python launch.py --data=DIR --budget=2h
    python launch.py --experiment=d12 --data=DIR --identity=FILE
    python launch.py --experiment=finetune --init-from=RUN --data=DIR
    python launch.py --list

A run lives in runs/NAME. Started again, the same command skips finished stages
and resumes the unfinished one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from jaxchat.cli.exits import processes, run_command, several_processes
from jaxchat.cli.experiments import load_experiment, summaries
from jaxchat.cli.field_help import add_fields
from jaxchat.cli.options import configure, named_fields
from jaxchat.cli.parser import HelpFormatter, Parser, option_strings
from jaxchat.cli.places import check_place
from jaxchat.cli.several import add_several_processes, cluster_of
from jaxchat.cli.values import budget, path, words
from jaxchat.config import STAGES, Experiment
from jaxchat.config.amount import Amount
from jaxchat.devices.launchers import Cluster
from jaxchat.errors import check
from jaxchat.verbatim import one_line

if TYPE_CHECKING:
    from jaxchat.runs.directory import RunDirectory
    from jaxchat.runs.init_from import StartingModel
    from jaxchat.runs.time_budget import TimeBudget


def main(argv: list[str] | None = None) -> int:
    """Runs `launch.py ...` and returns its exit code, one of those of `jaxchat.cli.exits`."""
    arguments = sys.argv[1:] if argv is None else argv
    looks = not {"-h", "--help", "--list", "--dry-run"}.isdisjoint(arguments)
    return run_command(lambda: _run(arguments, time.monotonic()), resumes=not looks)


def _run(argv: list[str], began: float) -> int:
    parser = launch_parser()
    options, overrides = parser.parse_known_args(argv)
    if options.list:
        return _list()
    if options.help:
        return _help(parser, options.experiment)
    experiment = configure(options.experiment, overrides, options.data, option_strings(parser), options.identity)
    check(bool(experiment.name), "--name is empty; leave it out for the name of the experiment's file")
    from jaxchat.stages.own_conversations import ask_what_is_taught  # slow to import

    given = named_fields(overrides)
    experiment = ask_what_is_taught(experiment, given)
    if options.stages is not None:
        experiment = dataclasses.replace(experiment, stages=options.stages)
    directory = options.run_dir or f"runs/{experiment.name}"
    redo = options.redo or ()
    cluster = cluster_of(options)
    say = print if cluster is None or cluster.process_id == 0 else lambda line: None
    experiment, start = _start_from(options, experiment, directory, given, say)
    begun = None if options.fresh else _begun(directory)
    experiment = _keep_sizes(experiment, begun, given, budgeted=options.budget is not None)
    check_start(experiment, directory, redo=redo, fresh=options.fresh, init=start is not None)
    prepare_jax()
    if options.dry_run:
        check(options.budget is None, "--dry-run measures nothing, as a --budget has to; leave one of them out")
        return _dry_run(experiment, given, begun, start)
    amount = None if options.budget is None else (options.budget, began)
    return _train(experiment, directory, redo, options.fresh, cluster, given, start, begun, amount)


def launch_parser() -> Parser:
    """The options of launch.py, without the fields of an experiment."""
    parser = Parser(
        prog="launch.py",
        usage="python launch.py --experiment=NAME [OPTIONS] [--SECTION.FIELD=VALUE ...]",
        description=__doc__,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(overrides=())
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="Show this page; with --experiment, all its fields too.")
    add("--list", action="store_true", help="List the experiments.")
    add("--experiment", metavar="NAME", help="The experiment: a file in experiments/. (default auto, with --data)")
    add("--stages", type=words, metavar="A,B", help=f"Run only these stages, of {', '.join(STAGES)}.")
    add("--run-dir", type=path, metavar="DIR", help="Where the run lives. (default runs/NAME)")
    add(
        "--data",
        type=path,
        metavar="DIR",
        help="Folder with your text (parquet, jsonl or txt), or with pretrain/, chat/ and eval/. The experiment's data "
        "sets are downloaded to a folder without text. (default data/)",
    )
    add(
        "--identity",
        type=path,
        metavar="FILE",
        help="Who the model is: a text file with its name (name: Talin) and, if you like, maker, character, facts and "
        "lines of text. Midtraining and SFT learn it, and evaluation scores it.",
    )
    add(
        "--init-from",
        type=path,
        metavar="RUN",
        help="Start from the model and tokenizer of another run, trained or made by jaxchat import. The new run takes "
        "over its settings of the model.",
    )
    add(
        "--budget",
        type=budget,
        metavar="TIME",
        help="How long the run may take, such as 15m or 2h, or what it may cost, such as 10usd. The lengths of the "
        "stages follow from it, and with --experiment=auto the sizes.",
    )
    add(
        "--dry-run",
        action="store_true",
        help="Show parameters, steps, FLOPs, memory, hours and cost, without training.",
    )
    add("--fresh", action="store_true", help="Start over; an earlier run is renamed, not deleted.")
    add(
        "--redo",
        type=words,
        metavar="A,B",
        help="Do these stages again, and those that were made from them; what they left is renamed, not deleted.",
    )
    add_several_processes(parser)
    return parser


def _start_from(
    options: argparse.Namespace,
    experiment: Experiment,
    directory: str,
    given: Collection[str],
    say: Callable[[str], None],
) -> tuple[Experiment, StartingModel | None]:
    """The experiment with the model that the run starts from, and that model if it is another run's.

    A run that has begun with a model from elsewhere keeps to it, whatever has become of the other run since.
    """
    from jaxchat.runs.directory import RunDirectory  # slow to import, as what follows
    from jaxchat.runs.init_from import (
        STAGE,
        check_begun_with,
        find_start,
        outlived_start,
        own_start,
        same_place,
        with_model_of,
    )
    from jaxchat.stages.own_conversations import check_conversations
    from jaxchat.storage import to_run_directory

    check_place(directory, "--run-dir")
    run = RunDirectory(to_run_directory(directory))
    name, other = options.init_from, None
    again = options.fresh or STAGE in run.following(options.redo or ())
    if name is None:
        start = None if options.fresh else own_start(run)
    elif not again and (start := outlived_start(run, name)) is not None:
        say(f"{STAGE:<9} is this run's copy of the model of {name}, which has another one now or is gone")
    else:
        start = other = find_start(name)
        if options.fresh:
            check(not same_place(run, other.run), "--init-from names the run that --fresh puts aside")
        else:
            check_begun_with(run, other)
    if start is None:
        itself = options.stages is None and "tokenizer" not in experiment.stages and not run.is_run()
        check(
            not itself,
            f"{experiment.name} starts from a model: name its run with --init-from=RUN; jaxchat import makes one of a "
            "model from elsewhere",
        )
        return experiment, None
    experiment = with_model_of(experiment, start, given)
    check_conversations(experiment)
    return experiment, other


def check_start(
    experiment: Experiment, directory: str, *, redo: tuple[str, ...] = (), fresh: bool = False, init: bool = False
) -> None:
    """Checks all that can be checked without JAX, which takes seconds to import.

    Args:
      init: the run starts from the model of another one.

    Raises:
      UserError: a run would be refused.
    """
    from jaxchat.runs.directory import RunDirectory  # slow to import, as what follows
    from jaxchat.runs.init_from import STAGE
    from jaxchat.runs.starting import check_redo
    from jaxchat.stages.settings import check_run, check_settings
    from jaxchat.storage import to_run_directory

    check_settings(experiment)
    check_redo(redo, experiment.stages)
    check_place(directory, "--run-dir")
    run = RunDirectory(to_run_directory(directory))
    check_run(experiment, run, redo=STAGES if fresh else redo, given=("tokenizer", STAGE) if init else ())


def _begun(directory: str) -> RunDirectory | None:
    """The run that is in a directory, if there is one."""
    from jaxchat.runs.directory import RunDirectory  # slow to import, as what follows
    from jaxchat.storage import to_run_directory

    run = RunDirectory(to_run_directory(directory))
    return run if run.is_run() else None


def _keep_sizes(
    experiment: Experiment, begun: RunDirectory | None, given: Collection[str], *, budgeted: bool
) -> Experiment:
    """The experiment with what was decided for a run that goes on, from its text and its time."""
    if begun is not None and experiment.sizes != "fixed":
        from jaxchat.planning.settle import keep_sizes

        experiment = keep_sizes(experiment, begun, given)
    if begun is not None and (begun.path / "budget.json").exists():
        from jaxchat.planning.budget import keep_lengths

        experiment = keep_lengths(experiment, begun, given, budgeted=budgeted)
    return experiment


def _settle(
    experiment: Experiment, given: Collection[str], begun: RunDirectory | None, start: StartingModel | None
) -> Experiment:
    """The experiment with the sizes that it starts with; the text has been counted, and the user told."""
    if start is not None:  # its model has its sizes
        return experiment
    from jaxchat.devices.mesh import data_shards, make_mesh
    from jaxchat.planning.settle import settle
    from jaxchat.stages.pipeline import check_possible

    if experiment.sizes == "fixed":
        check_possible(experiment)  # before anything is read
    return settle(experiment, begun, given=given, shards=data_shards(make_mesh(experiment.mesh)))


def _settle_in_time(
    experiment: Experiment,
    amount: Amount,
    began: float,
    given: Collection[str],
    redo: Collection[str],
    begun: RunDirectory | None,
    start: StartingModel | None,
) -> tuple[Experiment, TimeBudget]:
    """As `_settle`, with what is left of the budget."""
    from jaxchat.planning.budget import open_budget, settle_in_time
    from jaxchat.stages.pipeline import check_possible

    if experiment.sizes == "fixed":
        check_possible(experiment)  # before anything is measured
    budget = open_budget(experiment, amount, begun, given=given, redo=redo, began=began)
    return settle_in_time(experiment, begun, budget, given=given, starts_from_model=start is not None), budget


def _say_rules(experiment: Experiment) -> None:
    from jaxchat.planning.rules import rules_lines

    for line in rules_lines(experiment):
        print(f"rules     {line}")


def _list() -> int:
    found = summaries()
    width = max(map(len, found), default=0)
    for name, summary in found.items():
        print(one_line(f"{name:<{width}} {summary}"))
    return 0


def _help(parser: Parser, name: str | None) -> int:
    if name is not None:
        add_fields(parser, load_experiment(name))
    parser.print_help()
    return 0


def prepare_jax() -> None:
    """Sets XLA's flags and keeps compiled programs between starts; to be called before JAX is used."""
    from jaxchat.devices.compile_cache import keep_compiled
    from jaxchat.devices.mesh import set_xla_flags

    set_xla_flags()
    keep_compiled()


def _dry_run(
    experiment: Experiment, given: Collection[str], begun: RunDirectory | None, start: StartingModel | None
) -> int:
    import jax

    from jaxchat.analysis.planned_devices import stand_in

    stand_in(experiment.cost)
    if experiment.cost.devices > 1 and jax.config.jax_num_cpu_devices <= 1:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", experiment.cost.devices)  # a CPU stands for the experiment's devices
    from jaxchat.analysis.dry_run import analysed, dry_run
    from jaxchat.stages.pipeline import check_possible
    from jaxchat.stages.preflight import check_planned_data
    from jaxchat.stages.settings import describe_programs

    _say_rules(experiment)
    experiment = _settle(analysed(experiment), given, begun, start)
    check_possible(experiment)
    check_planned_data(experiment, given)
    programs = describe_programs(experiment)
    dry_run(experiment)
    if programs:
        print(f"programs      {programs}")
    return 0


def _train(
    experiment: Experiment,
    directory: str,
    redo: Collection[str],
    fresh: bool,
    cluster: Cluster | None,
    given: Collection[str],
    start: StartingModel | None,
    begun: RunDirectory | None,
    allowed: tuple[Amount, float] | None,
) -> int:
    processes().start(cluster)
    from jaxchat.cli.doctor import say_problems
    from jaxchat.runs.starting import take
    from jaxchat.stages.pipeline import check_possible, run_stages
    from jaxchat.stages.workspace import Workspace

    say_problems(experiment, directory)
    processes().on_process_zero(lambda: _say_rules(experiment))
    if allowed is None:
        experiment, budget = _settle(experiment, given, begun, start), None
    else:
        experiment, budget = _settle_in_time(experiment, *allowed, given, redo, begun, start)
    check_possible(experiment)
    with contextlib.ExitStack() as held:
        processes().on_process_zero(lambda: take(directory, held, fresh=fresh))
        run_stages(Workspace(experiment, directory, redo=redo, budget=budget), given, start)
    if several_processes():
        processes().finish()
        return 0
    if experiment.stages[-1] == "report":
        return _talk(directory)
    return 0


def _talk(directory: str) -> int:
    """Points to the report and the chat; starts the chat where somebody is at a terminal."""
    # Without an activated environment the command is beside this Python.
    command = "jaxchat" if shutil.which("jaxchat") else os.path.relpath(Path(sys.executable).with_name("jaxchat"))
    run = [f"--run={directory}"] if directory.startswith("-") else ["--run", directory]
    talk = shlex.join([command, "chat", *run])
    print(f"\nreport:     {directory}/report.md\ntalk to it: {talk}")
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return 0
    from jaxchat.cli.main import main as jaxchat

    print()
    return jaxchat(["chat", *run])
