"""Experiments by name, from the files of a checkout, without a change to the module search path."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxchat.cli import experiments
from jaxchat.cli.experiments import experiment_names, load_experiment, summaries
from jaxchat.errors import UserError
from tests.tiny import ROOT, refusal


def test_experiments_of_this_checkout():
    before = list(sys.path)
    loaded = [load_experiment(name) for name in experiment_names()]
    assert [experiment.name for experiment in loaded] == experiment_names()
    assert {"quickstart", "d12", "speedrun"} <= set(experiment_names())
    assert sys.path == before and not any(name.startswith("experiments") for name in sys.modules)
    assert all(len(summary) > 20 for summary in summaries().values()) and set(summaries()) == set(experiment_names())


def test_files_that_are_not_experiments(tmp_path, monkeypatch):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "number.py").write_text("experiment = 3")
    monkeypatch.setattr(experiments, "experiments_folder", lambda: tmp_path)
    assert summaries() == {"empty": "", "number": ""}
    for name in ("empty", "number"):
        with pytest.raises(UserError, match=f"{name}.py defines no experiment; write experiment = Experiment"):
            load_experiment(name)


def test_the_checkout_is_the_packages_or_the_working_directory(tmp_path):
    """The installed package has no experiments: those of the working directory are used, nothing else there is."""
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "experiments", checkout / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "launch.py").touch()
    (checkout / "experiments" / "mine.py").write_text("from jaxchat.recipes import on_text\nexperiment = 3\n")
    (checkout / "json.py").write_text("raise SystemExit('a file of the working directory was imported')")
    (elsewhere / "site").mkdir(parents=True)
    (elsewhere / "site" / "jaxchat").symlink_to(ROOT / "jaxchat")
    (elsewhere / "experiments").mkdir()  # of another project
    program = [sys.executable, "-c", "import sys; from jaxchat.cli.launch import main; sys.exit(main(sys.argv[1:]))"]
    environment = {**os.environ, "PYTHONPATH": str(elsewhere / "site"), "PYTHONSAFEPATH": "1"}

    def start(folder):
        arguments = [*program, "--experiment=mine"]
        return refusal(subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True))

    assert f"{checkout / 'experiments' / 'mine.py'} defines no experiment" in start(checkout)
    assert "start the command in the folder that has launch.py and experiments/" in start(elsewhere)
