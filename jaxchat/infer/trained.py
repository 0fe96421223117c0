"""The model of a run, ready to be talked to."""

from __future__ import annotations

import json
from typing import NamedTuple

from etils import epath

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment
from jaxchat.errors import UserError, check, closest
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, abstract_params
from jaxchat.stages.run import TRAINED, compute_dtype, read_config
from jaxchat.storage import is_folder, to_path
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """`params` lie on one device."""

    experiment: Experiment
    model: GPTConfig
    tokenizer: BaseTokenizer
    params: Params
    stage: str

    def engine(self) -> Engine:
        """An engine in the precision in which the run computes on this machine."""
        return Engine(self.model, self.params, self.tokenizer, dtype=compute_dtype(self.experiment))


def load_model(run_dir: epath.PathLike, stage: str | None = None, step: str | None = None) -> LoadedModel:
    """What `stage` of a run ended with, by default its last finished stage that trains; or was after an earlier `step`
    of those that were kept, `best` for the one that its evaluation found best.

    Raises:
      UserError: no run there, no such stage or step, or a stage that is not finished; the message lists those that are.
    """
    directory = epath.Path(to_path(run_dir))
    check(is_folder(directory), f"there is no run directory {run_dir}; train one with launch.py --run-dir {run_dir}")
    experiment = read_config(directory)
    finished = [name for name in TRAINED if _steps(directory / name / "stage.json")]
    there = f"finished: {', '.join(finished)}" if finished else "no stage that trains is finished there yet"
    check(
        stage is None or stage in TRAINED,
        f"there is no stage {stage!r} with a model{closest(str(stage), TRAINED)} In {run_dir} {there}",
    )
    check(bool(finished), f"{run_dir} has no model yet: {there}")
    check(stage is None or stage in finished, f"stage {stage!r} of {run_dir} is not finished; {there}")
    stage = stage or finished[-1]
    tokenizer = load_tokenizer(directory / "tokenizer")
    model = GPTConfig.of(experiment.model, tokenizer.vocab_size)
    checkpoints = Checkpoints(directory / stage / "checkpoints")
    params = checkpoints.restore_params(abstract_params(model), _step(checkpoints, step))
    return LoadedModel(experiment, model, tokenizer, params, stage)


def _step(checkpoints: Checkpoints, step: str | None) -> int | None:
    if step != "best":
        check(step is None or step.isdecimal(), f"--step is {step!r}; it must be a number, or best")
        return None if step is None else int(step)
    best = checkpoints.best_step()
    there = f"{checkpoints.directory} does not know which step is best"
    check(best is not None, f"{there}; train with --checkpoints.keep-best, or name one of {checkpoints.steps()}")
    return best


def _steps(record: epath.Path) -> int:
    """How many steps a stage has trained; 0 if it is not finished, or had nothing to train on."""
    try:
        return json.loads(record.read_text()).get("steps") or 0 if record.exists() else 0
    except (json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{record} is damaged ({error}); delete it and run the stage again") from None
