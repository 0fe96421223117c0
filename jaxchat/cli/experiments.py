"""Experiments by name: the files in the folder `experiments` of a checkout.

They are files for the user to change, and so not part of the installed package.
"""

from __future__ import annotations

import ast
import dataclasses
import runpy
import shlex
import traceback
from pathlib import Path

from jaxchat.config import Experiment, shown
from jaxchat.errors import UserError, closest


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
    """The names of all experiments, sorted: of the Python files, but for hidden ones, as editors leave them."""
    files = [path for path in experiments_folder().glob("*.py") if path.is_file()]
    return sorted(path.stem for path in files if not path.name.startswith((".", "_")))


def load_experiment(name: str) -> Experiment:
    """The `experiment` that experiments/NAME.py defines.

    Raises:
      UserError: there is no such file, or it defines none, or it cannot be run; the message names its line.
    """
    names = experiment_names()
    if name not in names:
        raise UserError(f"unknown experiment {shown(name)}{_hint(name, names)} Experiments: {', '.join(names)}")
    path = experiments_folder() / f"{name}.py"
    try:
        experiment = runpy.run_path(str(path)).get("experiment")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a file of the user's raises, SystemExit too
        raise UserError(_problem(path, error)) from None
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} defines no experiment; write experiment = Experiment(...) there")
    return dataclasses.replace(experiment, name=name)


def _hint(name: str, names: list[str]) -> str:
    """What was meant, or how a file of one's own becomes an experiment."""
    stem = Path(name).stem if name.endswith(".py") else name
    if name.endswith(".py") and stem not in names:
        return f"; put the file into {experiments_folder()}, and write --experiment={shlex.quote(stem)}."
    return closest(stem, names)


def summaries() -> dict[str, str]:
    """The first line of each experiment's docstring, by name; of a file that is no Python, what is wrong with it."""
    return {name: _summary(experiments_folder() / f"{name}.py") for name in experiment_names()}


def _summary(path: Path) -> str:
    try:
        doc = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError) as error:
        return f"broken: {_problem(path, error)}"
    return doc.partition("\n")[0]


def _problem(path: Path, error: BaseException) -> str:
    """`FILE:LINE: what is wrong`, with the line of this file that the error came from."""
    if isinstance(error, SyntaxError):
        line, what = error.lineno, f"{type(error).__name__}: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
        what = f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        what = str(error)
    if isinstance(error, SystemExit):
        what = "it ends the program; an experiment only defines its settings"
    return f"{path}:{line}: {what}" if line else f"{path}: {what}"
