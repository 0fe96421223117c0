"""Runs that start from the model of another run: which model that is, and what it decides in the new run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from etils import epath

from jaxchat.config import TRAINED, Experiment
from jaxchat.errors import UserError, check
from jaxchat.runs.directory import RunDirectory
from jaxchat.storage import is_folder, to_run_directory

STAGE = "pretrain"  # as which the model counts in the new run, so that every later stage can follow
OPTION = "--init-from"


@dataclass(frozen=True)
class StartingModel:
    """The model that `stage` of `run` has as its result, that of `step`, and the experiment that it was made with."""

    run: RunDirectory
    stage: str
    step: int
    made: Experiment

    def source(self) -> dict[str, Any]:
        """Where the model comes from, for the records of the new run."""
        facts: dict[str, Any] = {"from": "jaxchat", "run": str(self.run), "stage": self.stage, "step": self.step}
        earlier = (self.run.read_record(self.stage) or {}).get("imported") or {}
        known = {"id": self.run.id_of(self.stage), "rms_norm_eps": earlier.get("rms_norm_eps")}
        return facts | {name: value for name, value in known.items() if value is not None}


def find_start(name: epath.PathLike) -> StartingModel:
    """The model that a run directory has: that of its last finished stage.

    Raises:
      UserError: it is none, or has no model yet.
    """
    run = RunDirectory(to_run_directory(name))
    there = is_folder(run.path)
    check(there or not run.path.exists(), f"{OPTION}: {name} is a file; name the folder of a run")
    check(there, f"{OPTION}: there is no run directory {name}")
    files = [path.name for path in run.path.iterdir()]
    form = "hf" if any(file.endswith(".safetensors") for file in files) else "nanochat"
    foreign = any(file.endswith((".safetensors", ".pt")) for file in files)
    check(
        not foreign,
        f"{OPTION}: {name} is not a run; make one of its model: jaxchat import --from {form} {name} --run DIR",
    )
    config = run.read_config()
    stages = run.stages_with_model()
    check(bool(stages), f"{OPTION}: {name} has no model yet; finish one of its stages {', '.join(TRAINED)}")
    stage = stages[-1]
    return StartingModel(run, stage, run.result_step(stage), run.config_of(stage) or config)


def own_start(run: RunDirectory) -> StartingModel | None:
    """The model that a run began with, if it came from elsewhere."""
    if "imported" not in (run.read_record("tokenizer") or {}):
        return None
    stage = next((stage for stage in TRAINED if "imported" in (run.read_record(stage) or {})), None)
    made = run.config_of(stage) if stage else None
    return StartingModel(run, stage, run.result_step(stage), made) if stage and made else None


def outlived_start(run: RunDirectory, name: epath.PathLike) -> StartingModel | None:
    """The model that a run began with, if it came from the run `name`, which has another one now, or is gone."""
    if not run.is_run():
        return None
    begun = (run.read_record("tokenizer") or {}).get("imported") or {}
    if "run" not in begun or not same_place(RunDirectory(name), RunDirectory(begun["run"])):
        return None
    with contextlib.suppress(UserError):
        if find_start(name).source().get("id") == begun.get("id"):
            return None
    return own_start(run)


def with_model_of(experiment: Experiment, start: StartingModel, given: Collection[str]) -> Experiment:
    """`experiment` with the model and the size of the vocabulary of `start`; its context may be shorter.

    Args:
      given: the fields that the user has set, such as `model.depth`.

    Raises:
      UserError: a field that the user has set contradicts the model.
    """
    model, asked = start.made.model, experiment.model
    tokenizer = sorted(name for name in given if name.startswith("tokenizer."))
    check(
        not tokenizer,
        f"--{_option(tokenizer[0] if tokenizer else '')}: the run takes the tokenizer of {start.run}; leave it out",
    )
    for field in dataclasses.fields(model):
        here, there = getattr(asked, field.name), getattr(model, field.name)
        option = f"--model.{_option(field.name)}"
        if f"model.{field.name}" not in given or here == there:
            continue
        check(
            field.name == "sequence_len",
            f"{option} is {here}, but the model of {start.run} has {there}, which cannot change; leave it out",
        )
        check(here < there, f"{option} is {here}; it must be at most {there}, which {start.run} was trained with")
        check(
            set(model.window_pattern) == {"L"},
            f"{option}: the windows of {start.run} follow from its context of {there}; leave it out",
        )
        model = dataclasses.replace(model, sequence_len=here)
    sizes = dataclasses.replace(experiment.tokenizer, vocab_size=start.made.tokenizer.vocab_size, path=None)
    return dataclasses.replace(experiment, model=model, tokenizer=sizes)


def check_begun_with(run: RunDirectory, start: StartingModel) -> None:
    """Checks that a run, if there is one, began with the model of `start`.

    Raises:
      UserError: it did not.
    """
    check(not same_place(run, start.run), f"{OPTION} names the run itself; choose another --run-dir")
    if not run.is_run():
        return
    choose = "choose another --run-dir, or start over with --fresh"
    begun = (run.read_record("tokenizer") or {}).get("imported")
    own = begun is None and any(run.made(stage) for stage in ("tokenizer", *TRAINED))
    check(not own, f"{run} did not begin with the model of another run; {choose}")
    same = begun is None or begun.get("id") == start.source().get("id")
    check(same, f"{run} began with another model than {start.run} has now; {choose}")


def same_place(one: RunDirectory, other: RunDirectory) -> bool:
    """Whether two run directories are one."""
    return one.path.resolve() == other.path.resolve()


def _option(field: str) -> str:
    return field.replace("_", "-")
