"""The model that a stage of a run has trained, ready to generate."""

from __future__ import annotations

from typing import Any, NamedTuple

from etils import epath
from jax.sharding import Mesh

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError, check, closest
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, abstract_params
from jaxchat.model.parameters import abstract_on
from jaxchat.ops.compute import compute_dtype
from jaxchat.runs.directory import EARLIER, TRAINED, RunDirectory
from jaxchat.runs.files import read_bytes
from jaxchat.runs.records import IMPORT_AGAIN, came_by_import
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer
from jaxchat.tokenizer.base import FILE_NAME


class TrainedModel(NamedTuple):
    """The model of `stage` after `step` steps; `params` are on one device, or on a mesh that was asked for."""

    experiment: Experiment
    model: GPTConfig
    tokenizer: BaseTokenizer
    params: Params
    stage: str
    step: int | None = None

    def engine(self, **options: Any) -> Engine:
        """An engine that computes in the run's precision on this machine; `options` are further ones of `Engine`."""
        return Engine(self.model, self.params, self.tokenizer, dtype=compute_dtype(self.experiment), **options)


def load_model(
    run_dir: epath.PathLike, stage: str | None = None, step: str | None = None, *, mesh: Mesh | None = None
) -> TrainedModel:
    """The model that is the result of `stage` of a run, by default of the last finished stage that trains.

    Of several processes each must make the same call.

    Args:
      step: another step whose checkpoint was kept, or `best` for the one that the stage's evaluation found best.
      mesh: whose devices get the parameters; by default they are on one of this process.

    Raises:
      UserError: there is no such run, stage or step, or the stage is not finished; the message lists those that are.
        Or the run's tokenizer is not the one whose ids the model has learned.
    """
    directory = RunDirectory(run_dir)
    directory.check_there(run_dir, f"train one with launch.py --run-dir {run_dir}")
    experiment = directory.read_config()
    stage = str(on_process_zero(lambda: _finished_stage(directory, run_dir, stage)))
    experiment = directory.config_of(stage) or experiment
    tokenizer = load_tokenizer_of(directory)
    _check_learned(directory, stage)
    model = GPTConfig.of(experiment.model, tokenizer.vocab_size)
    checkpoints = Checkpoints(directory.checkpoints(stage))
    if step is None:
        at = on_process_zero(lambda: directory.result_step(stage))
    else:
        at = _checkpoint_step(checkpoints, step)
    params = checkpoints.restore_params(abstract_params(model) if mesh is None else abstract_on(mesh, model), at)
    return TrainedModel(experiment, model, tokenizer, params, stage, at)


def _finished_stage(directory: RunDirectory, run_dir: epath.PathLike, stage: str | None) -> str:
    """The stage, if it is finished; of None the last finished one that trains."""
    finished = directory.stages_with_model()
    there = f"finished: {', '.join(finished)}" if finished else "no stage that trains is finished yet"
    check(
        stage is None or stage in TRAINED,
        f"{stage!r} is not a stage with a model{closest(str(stage), TRAINED)} In {run_dir} {there}",
    )
    check(bool(finished) or stage is not None, f"{run_dir} has no model yet: {there}")
    check(stage is None or directory.leaves_model(stage), f"stage {stage!r} of {run_dir} is not finished; {there}")
    return stage or finished[-1]


def load_tokenizer_of(directory: RunDirectory) -> BaseTokenizer:
    """The tokenizer of a run.

    Raises:
      UserError: it is missing, damaged, or of another size than the run's own.
    """
    record = directory.read_record("tokenizer") or {}
    file, folder = directory.tokenizer / FILE_NAME, directory.tokenizer
    if came_by_import(record):
        again = mended = IMPORT_AGAIN
    else:
        again = "the same launch.py command makes it again, from the same text"
        mended = f"delete the folder {folder}: {again}"
    read_bytes(file, mended)  # which tells a file that cannot be read from one that is damaged
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        remedy = mended if folder.exists() else again
        raise UserError(f"{str(error).rpartition('; ')[0] or error}; {remedy}") from None
    size = (record.get("metrics") or {}).get("vocab_size")
    check(
        size in (None, tokenizer.vocab_size),
        f"{file} has {tokenizer.vocab_size:,} ids and the run's own tokenizer has {size}: "
        "it is that of another run; put the run's own file back",
    )
    return tokenizer


def _check_learned(directory: RunDirectory, stage: str) -> None:
    """Raises UserError if the run's tokenizer is not the one whose ids a stage's model has learned, as far as is known.

    Another one of the same size would turn all that the model says into nonsense.
    """
    learned = ((directory.begun(stage) or {}).get("made_from") or {}).get("tokenizer")
    check(
        learned in (None, EARLIER, directory.new_id("tokenizer")),
        f"{directory.tokenizer} has the tokenizer of another run, not that of {stage}; put the right one back",
    )


def _checkpoint_step(checkpoints: Checkpoints, step: str) -> int | None:
    if step != "best":
        check(step.isdecimal(), f"--step is {step!r}; it must be a number, or best")
        return int(step)
    best = checkpoints.best_step()
    check(
        best is not None,
        f"{checkpoints.directory} does not know which step is best; train with --checkpoints.keep-best, "
        f"or name one of {checkpoints.steps()}",
    )
    return best
