"""Runs an experiment: trains a chatbot from nothing, stage by stage.

    python launch.py --experiment=quickstart
    python launch.py --experiment=d12 --pretrain.num-iterations=200
    python launch.py --experiment=d12 --data=DIR
    python launch.py --list

A run lives in runs/NAME. Started again, the command skips finished stages and resumes the unfinished one.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from jaxchat.config import STAGES, Experiment
from jaxchat.devices.launchers import PREEMPTED, Preempted, find_cluster
from jaxchat.errors import UserError, check, closest

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
GO_ON = "the same command goes on from here"
DERIVED = {"--model.vocab-size": "--tokenizer.vocab-size", "--model.border-token": "--data.mask-borders"}
EXPERIMENTS = Path(__file__).parent / "experiments"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after bad input, 75 after SIGTERM, 76 after the loss of a process, 130 after Ctrl-C.

    Of several processes, one that ends otherwise than by 0 takes the others with it.
    """
    try:
        with _sigterm_raises():
            return _launch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Preempted as stopped:
        code, message = PREEMPTED, str(stopped)
    except KeyboardInterrupt:
        code, message = 130, f"stopped; {GO_ON}"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            where = error.filename or "the run directory"
            return _end(2, f"error: {where}: {error.strerror}; put that right, and {GO_ON}")
        from jaxchat.storage import first_line, of_the_cloud  # slow to import

        if of_the_cloud(error):
            return _end(2, f"error: the storage failed ({first_line(error)}); {GO_ON}")
        if not _several():
            raise
        code, message = 1, f"error: {type(error).__name__}: {error}"
        _distributed().await_verdict()
        traceback.print_exc()
    return _end(code, message)


def _end(code: int, message: str) -> int:
    if _several():
        _distributed().leave(code, message)
    print(message, file=sys.stderr)
    return code


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the program in its own way; the training loop has another, which saves first."""

    def stop(number, frame):
        raise Preempted(f"stopped by SIGTERM; {GO_ON}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _distributed() -> ModuleType:
    return importlib.import_module("jaxchat.devices.processes")


def _several() -> bool:
    return "jaxchat.devices.processes" in sys.modules and _distributed().active()


def _launch(argv: list[str]) -> int:
    parser = _parser()
    try:
        options, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        kinds = {"ignored": "takes no value", "expected": "needs a value"}  # in argparse's words
        takes = next((told for word, told in kinds.items() if word in error.message), "takes a whole number")
        raise UserError(f"{error.argument_name} {takes}; see --help") from None
    if options.list:
        return _list()
    if options.help:
        return _help(parser, options.experiment)
    experiment = configure(options.experiment, overrides, options.data, option_strings(parser))
    if options.stages is not None:
        experiment = dataclasses.replace(experiment, stages=tuple(options.stages.split(",")))
    _prepare_jax(experiment, options.dry_run)
    if not options.dry_run:
        cluster = find_cluster(os.environ, options.coordinator, options.num_processes, options.process_id)
        _distributed().start(cluster)
    from jaxchat.stages.pipeline import check_possible, run_stages
    from jaxchat.stages.run import Run

    check_possible(experiment)
    if options.dry_run:
        from jaxchat.analysis.dry_run import dry_run

        dry_run(experiment)
        return 0
    directory = options.run_dir or f"runs/{experiment.name}"
    if options.fresh:
        _distributed().agreed(lambda: _set_aside(directory))
    run_stages(Run(experiment, directory))
    if _several():
        _distributed().finish()
        return 0
    if experiment.stages[-1] == "report":
        return _talk(directory)
    return 0


def _talk(directory: str) -> int:
    """The finished chatbot: its report, and a prompt to talk to it where somebody is there to type."""
    # Without an activated environment the command is beside this Python.
    command = "jaxchat" if shutil.which("jaxchat") else os.path.relpath(Path(sys.executable).with_name("jaxchat"))
    print(f"\nreport:     {directory}/report.md\ntalk to it: {command} chat --run {directory}")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return 0
    from jaxchat.cli.main import main as chat

    print()
    return chat(["chat", "--run", directory])


def _help(parser: argparse.ArgumentParser, name: str | None) -> int:
    experiment = None if name is None else load_experiment(name)
    parser.print_help()
    if experiment is not None:
        print(f"\noptions of {name} (a section, a dot, a field):\n", flush=True)
        with contextlib.suppress(SystemExit):  # how tyro ends after its help
            tyro.cli(Experiment, default=experiment, args=["--help"])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False, allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="this page; with --experiment, all its fields too")
    add("--list", action="store_true", help="the experiments, and exit")
    add("--experiment", metavar="NAME", help="one of experiments/")
    add("--stages", metavar="A,B", help=f"only these of: {','.join(STAGES)}")
    add("--run-dir", metavar="DIR", help="where the run lives (default runs/NAME)")
    add(
        "--data",
        metavar="DIR",
        help="your text (parquet, jsonl or txt), or a folder with pretrain/, chat/ and eval/; "
        "one without text is where the experiment's data sets are downloaded to (default data/)",
    )
    add("--dry-run", action="store_true", help="parameters, steps, FLOPs, memory, hours and cost, without training")
    add("--fresh", action="store_true", help="begin anew; an earlier run is moved aside, not deleted")
    several = "of several processes, where no launcher says it (deploy/): "
    add("--coordinator", metavar="HOST:PORT", help=f"{several}where process 0 is, and a free port there")
    add("--num-processes", metavar="N", type=int, help=f"{several}how many; 1 to train alone")
    add("--process-id", metavar="I", type=int, help=f"{several}which of them this one is, from 0")
    return parser


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """What a parser's options are called, for the hints about misspelt ones."""
    return [name for action in parser._actions for name in action.option_strings]


def configure(name: str | None, overrides: list[str], data: str | None, options: Sequence[str]) -> Experiment:
    """Experiment `name` with the user's overrides and folder of text; `options` are the command's own, for hints.

    Raises:
      UserError: no name, an unknown one, a folder that is not there, or as `override`.
    """
    check(name is not None, f"name an experiment: --experiment={'|'.join(experiment_names())}")
    experiment = override(load_experiment(name), overrides, options)
    folder = experiment.data.path if data is None else data
    if folder is None:
        return experiment
    from jaxchat.storage import is_folder, is_remote, to_path  # slow to import, as what follows

    check(not os.path.isfile(folder), f"{folder!r} is a file; give --data the folder that it is in")
    there = folder != "" and is_folder(to_path(folder))
    check(there, f"data folder {folder!r} does not exist; give --data a folder with text")
    settings = {"path": folder if is_remote(folder) else os.path.abspath(folder)}
    if experiment.data.download and not any(word.startswith("--data.download") for word in overrides):
        from jaxchat.data.hub.download import own_text

        if is_remote(folder) or own_text(Path(folder)):
            settings["download"] = ()  # who brings text of their own gets what they bring, and nothing else
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, **settings))


def experiment_names() -> list[str]:
    """The files of experiments/, by name."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem != "__init__")


def load_experiment(name: str) -> Experiment:
    """The `experiment` that experiments/NAME.py defines.

    Raises:
      UserError: there is no such file.
    """
    names = experiment_names()
    hint = closest(name, names)
    check(name in names, f"unknown experiment {name!r}{hint} There are: {', '.join(names)}")
    return dataclasses.replace(importlib.import_module(f"experiments.{name}").experiment, name=name)


def override(experiment: Experiment, arguments: list[str], options: Sequence[str] = ()) -> Experiment:
    """`experiment` with the fields named in `arguments`, such as `--pretrain.num-iterations=100`.

    A field that is a list takes its words with spaces or commas between them. The hint about an unknown option looks
    among the fields and `options`.

    Raises:
      UserError: an unknown field (with the closest one), a value of the wrong type, or one that is not possible.
    """
    for word in arguments:
        instead = DERIVED.get(word.partition("=")[0].replace("_", "-"))
        check(instead is None, f"{word.partition('=')[0]} follows from the tokenizer; write {instead}")
    fields = _fields(type(experiment))
    groups = _by_option(arguments, fields, options)
    try:
        return _parse(experiment, [word for group in groups for word in group])
    except (SystemExit, UserError) as error:
        # By itself, the option at fault fails in the same way.
        for group in groups:
            try:
                _parse(experiment, group)
            except SystemExit:
                if isinstance(error, SystemExit):
                    raise UserError(_explain(group, fields)) from None
            except UserError as alone:
                if str(alone) == str(error):
                    raise UserError(f"{_written(group)}: {alone}") from None
        raise UserError(str(error)) from None


def _parse(experiment: Experiment, arguments: list[str]) -> Experiment:
    """Raises SystemExit, silently, for what tyro does not understand, and UserError for impossible values."""
    unread = io.StringIO()
    with contextlib.redirect_stderr(unread), contextlib.redirect_stdout(unread):
        return tyro.cli(Experiment, default=experiment, args=arguments)


def _fields(config: type, prefix: str = "") -> dict[str, Any]:
    """The type of each field, by its name on the command line."""
    fields: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        path = prefix + name.replace("_", "-")
        fields |= _fields(kind, f"{path}.") if dataclasses.is_dataclass(kind) else {path: kind}
    return fields


def _by_option(arguments: list[str], fields: dict[str, Any], options: Sequence[str]) -> list[list[str]]:
    """Each option with its values, as tyro wants them: `--rl.tasks=a,b` becomes `--rl.tasks a b`."""
    groups: list[list[str]] = []
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument) is None:
            check(bool(groups), f"{argument!r} is not an option; options begin with --, see --help")
            groups[-1].append(argument)
            continue
        flag, equals, value = argument.partition("=")
        kind = fields.get(_field(flag, fields))
        if kind is None:
            hint = closest(flag, [*(f"--{name}" for name in fields), *options])
            raise UserError(f"unknown option {flag}{hint} See --help with --experiment=NAME for all")
        many = equals and get_args(kind)[-1:] == (Ellipsis,)
        groups.append([flag, *value.split(",")] if many else [argument])
    return groups


def _field(flag: str, fields: dict[str, Any]) -> str:
    """The field of an option; `--data.no-shuffle` is one of `data.shuffle`."""
    name = flag.removeprefix("--").replace("_", "-")
    section, _, last = name.rpartition(".")
    positive = f"{section}.{last.removeprefix('no-')}"
    return positive if fields.get(positive) is bool else name


def _written(group: list[str]) -> str:
    return " ".join(group)


def _explain(group: list[str], fields: dict[str, Any]) -> str:
    """What an option takes, when it was given something else."""
    flag = group[0].partition("=")[0]
    name = _field(flag, fields)
    if fields[name] is bool:
        section, _, last = name.rpartition(".")
        return f"{_written(group)}: write --{name} for yes, --{section}.no-{last} for no, without a value"
    if group == [flag]:
        return f"{flag} needs a value: {_describe(fields[name])}"
    return f"{_written(group)}: the value must be {_describe(fields[name])}"


def _describe(kind: Any) -> str:
    """What may be written for a type, in words."""
    words = {int: "a whole number", float: "a number", str: "text", type(None): "None"}
    if kind in words:
        return words[kind]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(parts)}"
    if get_origin(kind) is tuple:
        return "words" if parts[-1] is Ellipsis else f"{len(parts)} numbers with spaces between them"
    return " or ".join(map(_describe, parts))


def _prepare_jax(experiment: Experiment, dry_run: bool) -> None:
    """Compiled programs are kept between runs; a dry run on a CPU pretends to have the experiment's devices."""
    import jax

    from jaxchat.devices.mesh import set_xla_flags
    from jaxchat.ops.programs import keep_compiled

    set_xla_flags()
    keep_compiled()
    if dry_run and experiment.cost.devices > 1 and jax.config.jax_num_cpu_devices <= 1:
        jax.config.update("jax_num_cpu_devices", experiment.cost.devices)


def _list() -> int:
    for name in experiment_names():
        # Parsed, not imported: a docstring needs no JAX.
        doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text())) or ""
        print(f"{name:<12} {doc.splitlines()[0] if doc else ''}")
    return 0


def _set_aside(name: str) -> None:
    """Renames an earlier run to the first free NAME.old-K.

    Raises:
      UserError: the directory is not a run.
    """
    check("://" not in name, f"--fresh moves aside what is on this machine, not {name}; choose another --run-dir")
    directory = Path(name).absolute()
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    check((directory / "config.json").exists(), f"{directory} is not a run of jaxchat and stays; choose --run-dir")
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"the earlier run is now {aside}")


if __name__ == "__main__":
    code = main()
    checkpoint = sys.modules.get("jaxchat.checkpoint")
    if code and checkpoint is not None and checkpoint.Checkpoints.failed:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
