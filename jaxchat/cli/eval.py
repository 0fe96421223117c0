"""`jaxchat eval`: what a model can do, by tasks, CORE, and bits per byte of text."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jaxchat.cli.answering import add_answering_model
from jaxchat.cli.exits import processes, several_processes
from jaxchat.cli.places import check_place
from jaxchat.cli.several import add_several_processes, cluster_of
from jaxchat.cli.values import number, path, whole, words
from jaxchat.config import DataConfig, Experiment, MeshConfig, Range
from jaxchat.errors import MissingData, UserError, check

if TYPE_CHECKING:
    from jaxchat.data.text.given import GivenFile
    from jaxchat.eval.core import Bundle
    from jaxchat.runs.directory import RunDirectory
    from jaxchat.tasks import Task

Entries = list[tuple[str, int | None]]
Say = Callable[[str], None]


def add_command(commands: Any) -> None:
    """Adds `eval` to the commands of `jaxchat`."""
    parser = commands.add_parser(
        "eval",
        help="Evaluate a model: tasks, CORE, bits per byte of text.",
        description="Asks a run's model questions and scores the answers, each score with its 95 % interval; computes "
        "CORE; measures the bits per byte of texts, by document and by file. Without --tasks, --core and --text it "
        "measures what the run's evaluate stage measures for this stage. Prints tables, and keeps in a folder all "
        "answers, the figures (report.json, report.md), and answers.html, a page to read answers and failures in. "
        "Started again, it keeps the tasks and CORE that are there, and measures texts anew. Several "
        "processes share the work.",
    )
    add = parser.add_argument
    add_answering_model(add)
    add("--tasks", nargs="+", type=words, metavar="NAME[:N]", help="Tasks to score, of N questions each or of all.")
    add(
        "--core",
        nargs="?",
        const="",
        type=lambda text: path(text) if text else "",
        metavar="DIR",
        help="Compute CORE with the bundle in DIR. Without DIR: with the one in the data folder.",
    )
    add(
        "--core-per-task",
        type=whole(Range(at_least=11)),
        metavar="N",
        help="Items of each of CORE's tasks, at most; other numbers are other items and examples. (default: all)",
    )
    add(
        "--text",
        nargs="*",
        type=path,
        metavar="PATH",
        help="Measure the bits per byte of files (parquet, jsonl, txt) or folders of them. Without PATH: of the run's "
        "validation text.",
    )
    add("--data", type=path, metavar="DIR", help="Folder whose eval/ has the questions. (default: the run's)")
    add(
        "--samples",
        type=whole(Range(at_least=1, at_most=4096)),
        default=1,
        metavar="K",
        help="Answers to each question, for pass@k; needs a temperature above 0. (default 1)",
    )
    add(
        "--temperature",
        type=number(Range(at_least=0, at_most=100)),
        metavar="T",
        help="How varied answers are. (default: 0, the likeliest; 1 with several samples)",
    )
    add(
        "--max-new-tokens",
        type=whole(Range(at_least=1, at_most=1 << 20)),
        metavar="N",
        help="Longest answer, in tokens. (default: as the run's evaluate stage)",
    )
    add(
        "--batch-rows",
        type=lambda text: text if text == "auto" else whole(Range(at_least=1, at_most=1 << 16))(text),
        metavar="N|auto",
        help="Questions that the model answers at once. auto: as many as fit into memory. (default: as the run's "
        "evaluate stage)",
    )
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="What the model computes in; auto: as the run does on this machine. Compare item by item with another "
        "program in float32. (default auto)",
    )
    add(
        "--humaneval",
        action="store_true",
        help="Score programs, by running what the model writes, contained: those of programs_1 to programs_5 where "
        "--tasks names them; otherwise humaneval joins the tasks.",
    )
    add(
        "--uncontained",
        action="store_true",
        help="With --humaneval: run programs even where this machine cannot contain them.",
    )
    add("--out", type=path, metavar="DIR", help="Folder for the results. (default RUN/eval/STAGE-STEP)")
    add_several_processes(parser)
    parser.set_defaults(command=_eval)


def _eval(arguments: argparse.Namespace) -> int:
    entries = _entries(arguments)
    if arguments.out is not None:
        check_place(arguments.out, "--out")
    cluster = cluster_of(arguments, alone_if_unsure=True)
    from jaxchat.runs.directory import RunDirectory  # slow to import, as what follows

    directory = RunDirectory(arguments.run)
    directory.check_there(arguments.run, "give --run the folder of a run")
    experiment = directory.read_config()
    data = _data(experiment, arguments.data)

    import jax  # which --help and bad options need not wait for
    from etils import epath

    from jaxchat.analysis.evaluation import Wanted, evaluate
    from jaxchat.devices.compile_cache import keep_compiled
    from jaxchat.devices.mesh import make_mesh
    from jaxchat.eval.tables import tables
    from jaxchat.infer.trained import load_model
    from jaxchat.ops.compute import compute_dtype
    from jaxchat.storage import to_path

    keep_compiled()
    processes().start(cluster)
    first = jax.process_index() == 0
    say = _say if first else _say_nothing
    if arguments.humaneval:
        _check_contained(arguments.uncontained, say)
    texts = _texts(arguments.text, data, directory, say)
    bundle = None if arguments.core is None else _bundle(arguments.core, data)
    given = _load(entries, data, directory, experiment, say, given=True) if entries is not None else []
    mesh = make_mesh(MeshConfig()) if jax.device_count() > 1 else None
    trained = load_model(arguments.run, arguments.stage, arguments.step, mesh=mesh)
    config = experiment.evaluate
    if entries is None and arguments.core is None and arguments.text is None:
        entries = _default_entries(trained.stage, arguments, experiment, say)
        given = _load(entries, data, directory, experiment, say, given=False)
        bundle = _default_bundle(trained.stage, data, experiment)
        check(
            bool(given) or bundle is not None,
            f"there is nothing to measure of {trained.stage}; name --tasks, --core or --text, and the data with --data",
        )
    if arguments.precision != "auto":
        experiment = dataclasses.replace(experiment, precision=arguments.precision)
    samples = arguments.samples
    wanted = Wanted(
        tasks=given,
        samples=samples,
        temperature=_temperature(arguments),
        max_new_tokens=arguments.max_new_tokens or config.max_new_tokens,
        batch_rows=arguments.batch_rows or config.batch_rows,
        bundle=bundle,
        core_per_task=arguments.core_per_task or (config.core_per_task if arguments.core is None else None),
        texts=texts,
        dtype=_name(compute_dtype(experiment)),
    )
    out = arguments.out or f"{arguments.run.rstrip('/')}/eval/{trained.stage}-{trained.step}"
    check_place(out, "--out")
    report = evaluate(trained, mesh, arguments.run, epath.Path(to_path(out)), wanted, say)
    if first:
        print(tables(report))
        say(f"\n{out} has all answers; {out}/answers.html is a page to read them in")
    if several_processes():
        processes().finish()
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say_nothing(line: str) -> None:
    """For processes other than the first, which says all."""


def _name(dtype: Any) -> str:
    import jax.numpy as jnp

    return jnp.dtype(dtype).name


# --- options ----------------------------------------------------------------------------------------------------------


def _entries(arguments: argparse.Namespace) -> Entries | None:
    """The tasks that the user names, with the most questions of each; None if none is named.

    Raises:
      UserError: options that do not go together; a task that is unknown, named twice, or has no answers to check.
    """
    check(
        arguments.samples == 1 or _temperature(arguments) > 0,
        f"--samples {arguments.samples} at temperature 0 are all the same; give --temperature a value above 0",
    )
    check(
        arguments.core_per_task is None or arguments.core is not None,
        "--core-per-task goes with --core; add it, or leave --core-per-task out",
    )
    check(not arguments.uncontained or arguments.humaneval, "--uncontained goes with --humaneval")
    named = [word for group in arguments.tasks or () for word in group]
    if arguments.humaneval and arguments.tasks and not any(_runs_programs(word) for word in named):
        named.append("humaneval")
    from jaxchat.stages.settings import naming  # slow to import
    from jaxchat.tasks import check_scorable, parse_mixture

    with naming("--tasks"):
        check_scorable(named)
        entries = parse_mixture(named)
        names = [name for name, _ in entries]
        for name in names:
            check(names.count(name) == 1, f"{name} is named more than once; name it once")
            check(
                arguments.humaneval or not _runs_programs(name),
                f"{name} runs programs that the model writes; add --humaneval if they may run here (docs/programs.md)",
            )
    return entries if arguments.tasks else None


def _temperature(arguments: argparse.Namespace) -> float:
    if arguments.temperature is not None:
        return arguments.temperature
    return 0.0 if arguments.samples == 1 else 1.0


def _runs_programs(entry: str) -> bool:
    from jaxchat.tasks import PROGRAMS

    return entry.partition(":")[0] in PROGRAMS


def _check_contained(uncontained: bool, say: Say) -> None:
    from jaxchat.tools.python import containment, listed, possible

    if possible() and not uncontained:
        raise UserError(
            f"this machine cannot contain the programs of a model: they could {listed(possible(), 'and')}; add "
            "--uncontained to run them all the same (docs/programs.md), or leave --humaneval out"
        )
    say(f"what the model writes runs in processes of its own: {containment()}")


# --- data -------------------------------------------------------------------------------------------------------------


def _data(experiment: Experiment, folder: str | None) -> DataConfig:
    """The run's data, or that in the folder that the user names."""
    from jaxchat.storage import is_folder, to_path

    if folder is None:
        return experiment.data
    check(is_folder(to_path(folder)), f"data folder {folder!r} does not exist; give --data a folder with eval/")
    return dataclasses.replace(experiment.data, path=folder)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Leaves out of messages about bad data the option to skip it, which the commands that train have."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).partition("; --data.on-bad=skip")[0]) from None


@_refusing()
def _texts(paths: Sequence[str] | None, data: DataConfig, directory: RunDirectory, say: Say) -> list[GivenFile]:
    """The text to measure: what the user names, or the run's validation text."""
    if paths is None:
        return []
    from jaxchat.analysis.run_text import text_of, trained_on
    from jaxchat.data.text.given import GivenFile, given_files

    if paths:
        files = given_files(paths, say)
        known = {file.path: file.name for file in files}
        for path in trained_on(directory, known):
            say(f"{known[path]} was trained on: how well it is predicted says nothing about other text")
        return files
    check(
        data.folder is not None or directory.generated_data.exists(),
        "the run has no data folder with validation text; name files or folders with --text, or a data folder with "
        "--data",
    )
    text = text_of(directory, data, on_bad="refuse", say=say).val
    return [
        GivenFile(f"{file.name} (validation)", file, dataclasses.replace(text, files=(file,))) for file in text.files
    ]


def _bundle(named: str, data: DataConfig) -> Bundle:
    """The bundle of CORE in the folder that the user names, or in the data folder."""
    from jaxchat.eval.core import find_bundle, load_bundle

    if named:
        return load_bundle(find_bundle(named) or named)
    found = None if data.folder is None else find_bundle(data.folder)
    where = "the run has no data folder" if data.folder is None else f"{data.folder} has no eval_bundle/"
    if found is None:
        raise UserError(f"{where}; 'jaxchat data get core' downloads the bundle, and --core DIR names another folder")
    return load_bundle(found)


@_refusing()
def _load(
    entries: Entries, data: DataConfig, directory: RunDirectory, experiment: Experiment, say: Say, *, given: bool
) -> list[tuple[Task, int | None]]:
    """The tasks, from the data folder or the run's generated corpus.

    Args:
      given: whether the user has named them, so that all must be there.
    """
    from jaxchat.data.text.reading import Findings
    from jaxchat.stages.task_source import NotYet, TaskSource, dataset_of
    from jaxchat.storage import to_path

    generated = to_path(directory.generated_data)
    source = TaskSource(data, (lambda: generated) if generated.is_dir() else None)
    findings, found = Findings(experiment.data.on_bad, say), []
    for name, limit in entries:
        try:
            found.append((source.load(name, "test", None, findings), limit))
        except (MissingData, NotYet) as error:
            why = f"{name} needs {generated}, which does not exist" if isinstance(error, NotYet) else str(error)
            dataset = dataset_of(name)
            get = f"'jaxchat data get {dataset}' downloads it, and " if dataset else ""
            check(not given, f"{why}; {get}--data names the folder that has it")
            say(f"left out: {why}")
    return found


def _default_entries(stage: str, arguments: argparse.Namespace, experiment: Experiment, say: Say) -> Entries:
    """The tasks of the run's evaluate stage, if it measures `stage`."""
    from jaxchat.tasks import parse_mixture

    config = experiment.evaluate
    entries = [
        (name, limit if config.limit is None else min(limit or config.limit, config.limit))
        for name, limit in parse_mixture(config.tasks)
    ]
    allowed = []
    for entry in entries:
        if _runs_programs(entry[0]) and not arguments.humaneval:
            say(f"left out: {entry[0]}, which runs programs that the model writes; --humaneval allows it")
        else:
            allowed.append(entry)
    if arguments.humaneval and not any(_runs_programs(name) for name, _ in allowed):
        allowed.append(("humaneval", config.limit))
    return allowed if stage in config.of else []


def _default_bundle(stage: str, data: DataConfig, experiment: Experiment) -> Bundle | None:
    """The bundle of CORE in the data folder, if the run's evaluate stage measures `stage` by it."""
    from jaxchat.eval.core import find_bundle, load_bundle

    found = None if data.folder is None or stage not in experiment.evaluate.core else find_bundle(data.folder)
    return None if found is None else load_bundle(found)
