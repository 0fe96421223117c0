"""Experiments by name: the files in the folder `experiments` of a checkout.

They are files for the user to change, and so not part of the installed package.
"""

from __future__ import annotations

import ast
import dataclasses
import runpy
from pathlib import Path

from jaxchat.config import Experiment
from jaxchat.errors import UserError, check, closest


def experiments_folder() -> Path:
    """The folder `experiments` of the checkout that this package is part of, or else of the working directory.

    Raises:
      UserError: neither has one.
    """
    for checkout in (Path(__file__).parents[2], Path.cwd()):
        if (checkout / "launch.py").exists() and (checkout / "experiments").is_dir():
            return checkout / "experiments"
    raise UserError("no experiments here; start the command in the folder that has launch.py and experiments/")


def experiment_names() -> list[str]:
    """The names of all experiments, sorted."""
    return sorted(path.stem for path in experiments_folder().glob("*.py"))


def load_experiment(name: str) -> Experiment:
    """The `experiment` that experiments/NAME.py defines.

    Raises:
      UserError: there is no such file, or it defines none.
    """
    names = experiment_names()
    check(name in names, f"unknown experiment {name!r}{closest(name, names)} Experiments: {', '.join(names)}")
    path = experiments_folder() / f"{name}.py"
    experiment = runpy.run_path(str(path)).get("experiment")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no experiment; write experiment = Experiment(...) there")
    return dataclasses.replace(experiment, name=name)


def summaries() -> dict[str, str]:
    """The first line of each experiment's docstring, by name."""
    return {name: _summary(experiments_folder() / f"{name}.py") for name in experiment_names()}


def _summary(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return doc.partition("\n")[0]
