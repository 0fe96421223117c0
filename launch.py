"""Runs an experiment: trains a chatbot from nothing, stage by stage.

    python launch.py --experiment=quickstart
    python launch.py --experiment=d12 --data=DIR --pretrain.num-iterations=200
    python launch.py --list

A run lives in runs/NAME. Started again, the command skips finished stages and resumes the unfinished one.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
from pathlib import Path

import tyro

from jaxchat.config import STAGES, Experiment, UserError, check, closest

EXPERIMENTS = Path(__file__).parent / "experiments"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 after bad input, 130 after Ctrl-C."""
    try:
        return _launch(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _launch(argv: list[str]) -> int:
    parser = _parser()
    options, overrides = parser.parse_known_args(argv)
    if options.list:
        return _list()
    if options.help:
        parser.print_help()
        if options.experiment:
            print(f"\noptions of {options.experiment} (a section, a dot, a field):\n")
            tyro.cli(Experiment, default=load_experiment(options.experiment), args=["--help"])
        return 0
    check(options.experiment is not None, f"name an experiment: --experiment={'|'.join(experiment_names())}")
    experiment = override(load_experiment(options.experiment), overrides)
    if options.stages is not None:
        experiment = dataclasses.replace(experiment, stages=tuple(options.stages.split(",")))
    if options.data is not None:
        path = os.path.abspath(options.data)
        check(os.path.isdir(path), f"data folder {options.data} does not exist; give --data a folder with text")
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path=path))
    _prepare_jax(experiment, options.dry_run)
    if options.dry_run:
        from jaxchat.stages.dry_run import dry_run

        dry_run(experiment)
        return 0
    directory = Path(options.run_dir or f"runs/{experiment.name}")
    if options.fresh:
        _set_aside(directory)
    from jaxchat.stages.pipeline import run_stages
    from jaxchat.stages.run import Run

    run_stages(Run(experiment, options.run_dir or directory))
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
    add("--data", metavar="DIR", help="your text (parquet, jsonl or txt), or a folder with pretrain/, chat/ and eval/")
    add("--dry-run", action="store_true", help="parameters, steps, FLOPs, memory, hours and cost, without training")
    add("--fresh", action="store_true", help="begin anew; an earlier run is moved aside, not deleted")
    return parser


def experiment_names() -> list[str]:
    """The files of experiments/, by name."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem != "__init__")


def load_experiment(name: str) -> Experiment:
    """The `experiment` that experiments/NAME.py defines.

    Raises:
      UserError: there is no such file.
    """
    names = experiment_names()
    check(name in names, f"unknown experiment {name!r}{closest(name, names)} There are: {', '.join(names)}")
    return dataclasses.replace(importlib.import_module(f"experiments.{name}").experiment, name=name)


def override(experiment: Experiment, arguments: list[str]) -> Experiment:
    """`experiment` with the fields named in `arguments`, such as `--pretrain.num-iterations=100`.

    Raises:
      UserError: an unknown field (with the closest one), a value of the wrong type, or one that is not possible.
    """
    fields = _field_names(experiment)
    for argument in arguments:
        flag = argument.split("=")[0]
        if re.match(r"--?[A-Za-z]", flag):
            known = flag.startswith("--") and flag[2:].replace("_", "-").removeprefix("no-") in fields
            known = known or flag.replace(".no-", ".").replace("_", "-")[2:] in fields
            check(known, f"unknown option {flag}{closest(flag[2:], fields)} See --help --experiment={experiment.name}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(Experiment, default=experiment, args=arguments)
    except SystemExit:
        # tyro draws a box: what it says, on one line.
        words = " ".join(re.sub(r"[│╭╮╰╯─┃]+|\x1b\[[0-9;]*m", " ", said.getvalue()).split())
        words = re.sub(r"^Parsing error |For full helptext.*$", "", words).strip()
        raise UserError(f"{words or 'options not understood'}; see --help --experiment={experiment.name}") from None


def _field_names(config, prefix: str = "") -> set[str]:
    names = set()
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        names |= _field_names(value, f"{name}.") if dataclasses.is_dataclass(value) else {name}
    return names


def _prepare_jax(experiment: Experiment, dry_run: bool) -> None:
    """Compiled programs are kept between runs; a dry run on a CPU pretends to have the experiment's devices."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxchat/compiled"))
    jax.config.update("jax_compilation_cache_dir", cache)
    if dry_run and experiment.cost.devices > 1 and jax.config.jax_num_cpu_devices <= 1:
        jax.config.update("jax_num_cpu_devices", experiment.cost.devices)


def _list() -> int:
    for name in experiment_names():
        # Parsed, not imported: a docstring needs no JAX.
        doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text())) or ""
        print(f"{name:<12} {doc.splitlines()[0] if doc else ''}")
    return 0


def _set_aside(directory: Path) -> None:
    """Renames an earlier run to the first free NAME.old-K."""
    if not directory.exists():
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(aside)
    print(f"the earlier run is now {aside}")


if __name__ == "__main__":
    sys.exit(main())
