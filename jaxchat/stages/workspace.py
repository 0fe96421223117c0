"""What a stage works with: its run directory, the mesh, the data, the tokenizer, parameters, and where it reports.

Of several processes, which must share the run directory, only process 0 writes to it (checkpoints excepted) and prints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax
from etils import epath

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment, SupervisedConfig
from jaxchat.data.hub.background_download import BackgroundDownload
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.text.folder import TextSplits, find_text
from jaxchat.data.text.reading import Findings
from jaxchat.devices.machine import machine_info, peak_memory_bytes
from jaxchat.devices.mesh import data_shards, make_mesh
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import MissingData, check
from jaxchat.infer.trained import load_tokenizer_of
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params
from jaxchat.model.parameters import abstract_on
from jaxchat.ops.compute import Compute, compute_dtype
from jaxchat.runs.directory import TRAINED, RunDirectory
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.time_budget import TimeBudget
from jaxchat.stages.generated import write_generated
from jaxchat.stages.preflight import check_data, left_out
from jaxchat.stages.settings import check_has_data
from jaxchat.stages.task_source import TaskSource, dataset_of
from jaxchat.stages.text_check import check_text, check_tokens
from jaxchat.storage import AnyPath, is_folder, to_path, to_run_directory
from jaxchat.tasks import Task, parse_mixture
from jaxchat.tasks.base import Split
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer
from jaxchat.train.budget import BatchPlan, plans_of_stage

KEEP_SECONDS = 10.0  # of a budget, that a run which is killed may spend without a record


class Workspace:
    """One experiment in one run directory, opened on this machine's devices. `say` prints a line for the user."""

    def __init__(
        self,
        experiment: Experiment,
        directory: epath.PathLike,
        *,
        say=print,
        redo: Collection[str] = (),
        keep_config: bool = False,
        budget: TimeBudget | None = None,
    ):
        """Opens the directory as `RunDirectory.open` does; the stages `redo` count as not finished from then on.

        `budget` decides how long the stages are; None leaves that to their settings.

        Raises:
          UserError: the directory holds something else, or a run with other settings; the experiment has no text; the
            mesh does not match the devices.
        """
        check_has_data(experiment)
        data = experiment.data
        self.experiment, self.directory = experiment, RunDirectory(to_run_directory(directory))
        self.budget = budget
        self._say = say
        self.say = say if jax.process_index() == 0 else lambda line: None
        self.most_bytes: int | None = None  # that a step may take on a device, if one ran out of memory
        self._said: set[str] = set()
        self._text_checked = self._generated_checked = False
        self.mesh = make_mesh(experiment.mesh)
        self.compute = Compute(compute_dtype(experiment), self.mesh)
        on_process_zero(lambda: self.directory.open(experiment, redo=redo, keep_config=keep_config, say=self.say))
        requests = parse_requests(data.download)
        self._again = set(on_process_zero(lambda: self.directory.following(redo)))
        self._download = BackgroundDownload(data.folder, requests, self.say) if requests and data.folder else None

    def say_once(self, line: str) -> None:
        """Prints a line for the user, unless it was printed before."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    # --- data and tokenizer -------------------------------------------------------------------------------------

    @property
    def text_dir(self) -> AnyPath:
        """The folder with the pretraining text, in it or in its `pretrain/`: the user's, or the generated one."""
        user = self.experiment.data.folder
        if user is None:
            return self._generated()
        path = to_path(user)
        check(is_folder(path), f"data folder {user} does not exist; give --data a folder with text")
        return path

    def text(self) -> TextSplits:
        """The pretraining text. Reading it waits for files that are still to be downloaded.

        Raises:
          UserError: as `find_text`; the download cannot start.
        """
        data = self.experiment.data
        if self._download is not None:
            split = self._download.text(data.val_shard, on_bad=data.on_bad)
        else:
            split = find_text(
                self.text_dir, data.val_shard, on_bad=data.on_bad, say=lambda line: self.say(f"data      {line}")
            )
        if data.lanes > 1 and jax.process_count() > 1:
            # Only the processes that read a lane see what is bad in it.
            split = dataclasses.replace(split, train=dataclasses.replace(split.train, say=self._tell_as_process))
        return split

    def _tell_as_process(self, line: str) -> None:
        self._say(f"data      {line} (process {jax.process_index()})")

    def _generated(self) -> AnyPath:
        """The generated corpus, written once; one that was left unfinished is written again."""
        on_process_zero(lambda: str(self._write_generated()))
        return to_path(self.directory.generated_data)

    def _write_generated(self) -> AnyPath:
        directory = to_path(self.directory.generated_data)
        if not self._generated_checked:
            write_generated(directory, self.experiment, self.say)
        self._generated_checked = True
        return directory

    def check_data(self, stages: Sequence[str], given: Collection[str] = ()) -> None:
        """Checks the text, conversations and questions of `stages`, as `check_text` and `preflight.check_data` do.

        What it says, it says once. With the run's tokenizer, or the user's, it knows exactly what is too long.
        """
        if any(self.experiment.reads_text(stage) for stage in stages):
            text = self.text()
            on_process_zero(lambda: self._check_text(text))
        source = TaskSource(self.experiment.data, self._write_generated, self.is_downloading)
        on_process_zero(
            lambda: check_data(
                self.experiment, source, stages, tokenizer=self._known_tokenizer(), given=given, say=self.say_once
            )
        )

    def _check_text(self, text: TextSplits) -> None:
        if not self._text_checked:
            check_text(self.experiment, text, self.say)
        self._text_checked = True
        if (tokenizer := self._known_tokenizer()) is not None:
            check_tokens(self.experiment, text, tokenizer)

    def _known_tokenizer(self) -> BaseTokenizer | None:
        if "tokenizer" not in self._again and self.directory.finished("tokenizer"):
            return load_tokenizer_of(self.directory)
        users = self.experiment.tokenizer.path
        return None if users is None else load_tokenizer(users)

    def is_downloading(self, task: str) -> bool:
        """Whether the files of a task are still to be downloaded."""
        return self._download is not None and dataset_of(task) in self._download.missing_tasks()

    def load_tasks(
        self,
        stage: str,
        mixture: tuple[str, ...],
        split: Split,
        *,
        quiet: bool = False,
        findings: Findings | None = None,
    ) -> list[Task]:
        """The tasks of `mixture` that the data has, after waiting for downloads.

        The user's folder comes first. If it has no conversations, the tasks that jaxchat generates take their place. A
        task that is found nowhere is left out, with a line for the user.

        Args:
          findings: counts the bad items that are left out; `check_data` has said which.
        """
        if self._download is not None:
            self._download.wait_for_tasks()
        source = TaskSource(self.experiment.data, self._generated)
        findings = findings or Findings(self.experiment.data.on_bad, lambda line: None)
        tasks, missing = [], []
        for name, limit in parse_mixture(mixture):
            try:
                tasks.append(source.load(name, split, limit, findings))
            except MissingData as error:
                missing.append(f"{name} ({error})")
        if missing and not quiet:
            self.say_once(left_out(stage, missing))
        return tasks

    def tokenizer(self) -> BaseTokenizer:
        """The run's tokenizer.

        Raises:
          UserError: the tokenizer stage has not run.
        """
        check(self.finished("tokenizer"), f"{self.directory} has no tokenizer yet; run the stage 'tokenizer' first")
        return load_tokenizer_of(self.directory)

    # --- the model ----------------------------------------------------------------------------------------------

    def model_config(self, tokenizer: BaseTokenizer) -> GPTConfig:
        """The experiment's model for this tokenizer."""
        return _model(self.experiment, tokenizer.vocab_size, tokenizer.bos_token_id)

    def batch_plans(self, config: SupervisedConfig) -> tuple[BatchPlan, ...]:
        """How an optimizer step of the stage with `config` may be split over devices and micro-batches.

        Raises:
          UserError: as `split_batch`.
        """
        return plans_of_stage(config, self.experiment.model.sequence_len, data_shards(self.mesh))

    def within(self, limit: int | None) -> int | None:
        """The bytes that a step may take, of `limit` by the devices' own account, after one ran out of memory."""
        return limit if self.most_bytes is None else min(self.most_bytes, limit or self.most_bytes)

    def checkpoints(self, stage: str) -> Checkpoints:
        """The checkpoints of a stage, of which the best is kept too where it may be the stage's result."""
        config = self.experiment.checkpoints
        keep_best = config.keep_best or stage != "rl"
        return Checkpoints(self.directory.checkpoints(stage), dataclasses.replace(config, keep_best=keep_best))

    def load_params(self, stage: str, config: GPTConfig) -> tuple[Params, int]:
        """The parameters that are the result of `stage`, laid out on the mesh, and the step that they are of."""
        checkpoints = self.checkpoints(stage)
        step = on_process_zero(lambda: self.directory.result_step(stage))
        params = checkpoints.restore_params(abstract_on(self.mesh, config), step)
        checkpoints.close()
        return params, step

    # --- the stages' records ------------------------------------------------------------------------------------

    def finished(self, stage: str) -> bool:
        return stage not in self._again and on_process_zero(lambda: self.directory.finished(stage))

    def set_aside_redone(self) -> None:
        """Sets the stages aside that are to be done again, once nothing can refuse the run."""
        if self._again:
            on_process_zero(lambda: self.directory.do_again(self.experiment, self._again, self.say))
        self._again = set()

    def begin(self, stage: str) -> None:
        """Records that `stage` is being made, of what, and with the experiment's settings.

        Raises:
          UserError: as `parent_of`.
        """
        sources = []
        if stage in TRAINED:
            sources = ["tokenizer", *([self.parent_of(stage)] if stage != "pretrain" else [])]
        on_process_zero(lambda: self.directory.begin(stage, self.experiment, sources))

    def set_aside_stale(self, stage: str) -> None:
        """Sets a stage aside that was made from an earlier making of another one."""

        def check_it():
            if older := self.directory.stale(stage):
                self.say(f"{stage:<9} was made from an earlier {older}")
                self.directory.set_aside(stage, self.say)

        on_process_zero(check_it)

    def finish(self, stage: str, **facts: Any) -> None:
        """Marks `stage` as finished; `facts` are `parent`, `steps`, `tokens`, `seconds`, `started`, `metrics`, ..."""
        record = {**facts, "finished": time.time(), "machine": machine_info()}
        record["peak_memory_bytes"] = peak_memory_bytes()

        def write():
            new = stage == "tokenizer"  # its identity is what it contains
            made = {"stage": stage, "id": self.directory.new_id(stage) if new else self.directory.id_of(stage)}
            self.directory.write_record(stage, {name: value for name, value in made.items() if value} | record)

        on_process_zero(write)

    def keep_time(self, every: float = KEEP_SECONDS) -> None:
        """Writes how much of the budget is spent, if it was not written within `every` seconds."""
        if self.budget is not None and jax.process_index() == 0:
            self.budget.write(self.directory.path, every)

    def stages_with_model(self) -> list[str]:
        """The finished stages that left parameters, in order."""
        return on_process_zero(self.directory.stages_with_model)

    def parent_of(self, stage: str) -> str:
        """The last finished stage before `stage` that left parameters.

        Raises:
          UserError: there is none, or it was made from what has been made again since.
        """
        before = TRAINED[: TRAINED.index(stage)]
        finished = on_process_zero(lambda: [name for name in before if self.directory.leaves_model(name)])
        check(bool(finished), f"{stage} needs an earlier stage's parameters; run one of {', '.join(before)} first")
        parent = finished[-1]
        older = on_process_zero(lambda: self.directory.stale(parent))
        check(
            older is None,
            f"{parent} was made from an earlier {older}; do it again with --redo={parent} before {stage}",
        )
        return parent

    def metrics(self, stage: str, total_steps: int | None = None) -> Metrics:
        """The log of a stage, as a context manager; process 0 alone writes and shows it."""
        log = self.experiment.logging
        return Metrics(
            self.directory.path,
            stage,
            identity=self.directory.id_of(stage) if jax.process_index() == 0 else None,
            tensorboard=log.tensorboard,
            wandb=log.wandb,
            total_steps=total_steps,
            enabled=jax.process_index() == 0,
        )


def planned_model(experiment: Experiment) -> GPTConfig:
    """The experiment's model before there is a tokenizer, with the vocabulary size that the experiment asks for.

    It is for random tokens: id 0 stands for the token that begins a document.
    """
    return _model(experiment, experiment.tokenizer.vocab_size, 0)


def _model(experiment: Experiment, vocab_size: int, bos_token_id: int) -> GPTConfig:
    border = bos_token_id if experiment.data.mask_borders in ("attention", "both") else None
    return GPTConfig.of(experiment.model, vocab_size, border)
