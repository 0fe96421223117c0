"""A run: one directory, one experiment, and what its stages have left there.

runs/NAME/config.json        the experiment
runs/NAME/data/              the generated corpus, where the experiment uses one
runs/NAME/tokenizer/         the tokenizer
runs/NAME/STAGE/             checkpoints of a stage, and stage.json once it is finished
runs/NAME/metrics.jsonl      all metrics; report.md, report.json, plots/ at the end

Of several processes, which must share the directory, process 0 alone writes (but for the checkpoints) and prints.
"""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
from etils import epath

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import Experiment
from jaxchat.data.hub.background import Arrivals
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.synthetic import write_synthetic
from jaxchat.data.text.shards import TextSplit, find_text
from jaxchat.devices.mesh import make_mesh, shardings
from jaxchat.devices.processes import agreed
from jaxchat.errors import MissingData, UserError, check
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, abstract_params
from jaxchat.ops import fp8
from jaxchat.runs.config_json import from_json, to_json
from jaxchat.runs.metrics import Metrics, machine_info, peak_memory_bytes
from jaxchat.storage import AnyPath, first_line, is_folder, to_path, to_run_directory
from jaxchat.tasks import Task, load_task, parse_mixture
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer

TRAINED = ("pretrain", "midtrain", "sft", "rl")  # the stages that leave parameters, in their order
GENERATED = ("chat", "sums", "letters", "facts", "long_sums")  # the tasks of the generated corpus
# What may differ between two starts of one run: it changes neither the numbers nor what is stored (`on_nan` where they
# have come to an end).
FREE = ("stages", "logging", "cost", "mesh", "remat", "on_nan", "checkpoints", "name")


class Run:
    """An opened run directory. `say` prints a line for the user."""

    def __init__(self, experiment: Experiment, directory: epath.PathLike, *, say=print, keep_config: bool = False):
        """Creates the directory, or checks that it belongs to `experiment`.

        With `keep_config` an earlier config.json stays as it is, unless the run has yet to make its tokenizer: for what
        looks at a run and is not one of its stages.

        Raises:
          UserError: the directory holds something else, or a run of other settings.
        """
        data = experiment.data
        check(
            data.folder is not None or data.generate,
            f"{experiment.name} trains on your text: give it a folder with --data=DIR, "
            "or name data sets with --data.download",
        )
        self.experiment, self.directory = experiment, to_run_directory(directory)
        self._say = say
        self.say = say if jax.process_index() == 0 else lambda line: None
        self.mesh = make_mesh(experiment.mesh)
        self.dtype = compute_dtype(experiment)
        agreed(lambda: self._open(keep_config))
        requests = parse_requests(data.download)
        self._arrivals = Arrivals(data.folder, requests, self.say) if requests else None

    def _open(self, keep_config: bool) -> None:
        config = self.directory / "config.json"
        if config.exists():
            self._check_same(read_config(self.directory))
        elif self.directory.exists() and (not self.directory.is_dir() or any(self.directory.iterdir())):
            raise UserError(f"{self.directory} is not empty and not a run of jaxchat; choose another --run-dir")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (keep_config and self._read_record("tokenizer") is not None):
                _write(config, to_json(self.experiment))
        except OSError as error:
            problem = error.strerror or first_line(error)
            raise UserError(f"{self.directory} cannot be made ({problem}); choose another --run-dir") from None

    def _check_same(self, before: Experiment) -> None:
        old, new = dataclasses.asdict(before), dataclasses.asdict(self.experiment)
        # A run that bad text has stopped may go on without it: what it has read is the same.
        old["data"]["on_bad"] = new["data"]["on_bad"]
        check(
            before.name == self.experiment.name,
            f"{self.directory} is a run of experiment {before.name!r}, not {self.experiment.name!r}; "
            "choose another --run-dir, or --fresh to begin anew",
        )
        for section, value in new.items():
            if value != old[section] and self._binds(section):
                name, was, now = _first_difference(section, old[section], value)
                raise UserError(
                    f"{self.directory} was begun with {name} {was}, not {now}; "
                    "choose another --run-dir, or --fresh to begin anew"
                )

    def _binds(self, section: str) -> bool:
        """Whether something in the directory was made with this section of the config."""
        there = [name for name in ("data", "tokenizer", *TRAINED, "evaluate") if (self.directory / name).exists()]
        if section in (*TRAINED, "evaluate", "tokenizer"):
            return section in there
        if section in FREE:
            return False
        # The text and the seed of what was generated; the model and its optimizer from the first training on.
        return bool(there) if section in ("data", "seed") else any(stage in TRAINED for stage in there)

    # --- data and tokenizer -------------------------------------------------------------------------------------

    @property
    def text_dir(self) -> AnyPath:
        """The folder of the pretraining text: the user's `pretrain/`, the user's folder, or the generated one."""
        user = self.experiment.data.folder
        if user is None:
            return self._generated() / "pretrain"
        path = to_path(user)
        check(is_folder(path), f"data folder {user} does not exist; give --data a folder with text")
        return path / "pretrain" if (path / "pretrain").is_dir() else path

    def text(self) -> TextSplit:
        """The pretraining text; files that are still to be downloaded are waited for when they are read.

        Raises:
          UserError: as `find_text`; the download cannot begin.
        """
        data = self.experiment.data
        if self._arrivals is not None:
            split = self._arrivals.text(data.val_shard, on_bad=data.on_bad)
        else:
            split = find_text(
                self.text_dir, data.val_shard, on_bad=data.on_bad, tell=lambda line: self.say(f"data      {line}")
            )
        if data.lanes > 1 and jax.process_count() > 1:
            # What is bad in a lane is seen by the processes alone that read it.
            split = dataclasses.replace(split, train=dataclasses.replace(split.train, tell=self._tell_as_process))
        return split

    def _tell_as_process(self, line: str) -> None:
        self._say(f"data      {line} (process {jax.process_index()})")

    def _generated(self) -> AnyPath:
        """The generated corpus, written once; a folder left unfinished is written again."""
        directory = to_path(self.directory / "data")
        agreed(lambda: self._generate(directory))
        return directory

    def _generate(self, directory: AnyPath) -> None:
        if (directory / "complete").exists():
            return
        data, started = self.experiment.data, time.perf_counter()
        self.say(f"data      generating the synthetic corpus in {directory}")
        write_synthetic(
            directory,
            seed=self.experiment.seed,
            documents=data.synthetic_documents,
            conversations=data.synthetic_conversations,
        )
        (directory / "complete").touch()
        self.say(f"data      done in {time.perf_counter() - started:.0f} s")

    def load_tasks(self, stage: str, mixture: tuple[str, ...], split: str, *, quiet: bool = False) -> list[Task]:
        """The tasks of `mixture` that the data has. The user's folder comes first; what the project generates itself
        fills in for a folder without conversations. A task found nowhere is left out, and the user is told. What is
        still to be downloaded is waited for."""
        if self._arrivals is not None:
            self._arrivals.wait_for_tasks()
        tasks, missing = [], []
        for name, limit in parse_mixture(mixture):
            try:
                tasks.append(self._load_task(name, split, limit))
            except MissingData as error:
                missing.append(f"{name} ({error})")
        if missing and not quiet:
            self.say(f"{stage:<9} left out, not in the data folder: {', '.join(missing)}")
        return tasks

    def _load_task(self, name: str, split: str, limit: int | None) -> Task:
        user = self.experiment.data.folder
        if user is not None:
            try:
                return load_task(name, split, user, limit)
            except MissingData:
                # The generated facts are of a world that the user's text does not know.
                has_chat = (to_path(user) / "chat").exists()
                if name not in GENERATED or name == "facts" or (name == "chat" and has_chat):
                    raise
        return load_task(name, split, self._generated(), limit)

    def tokenizer(self) -> BaseTokenizer:
        """The run's tokenizer.

        Raises:
          UserError: the tokenizer stage has not run.
        """
        check(self.finished("tokenizer"), f"{self.directory} has no tokenizer yet; run the stage 'tokenizer' first")
        return load_tokenizer(self.directory / "tokenizer")

    def model_config(self, tokenizer: BaseTokenizer) -> GPTConfig:
        """The experiment's model with the tokenizer's vocabulary, and with the token that begins a document where
        attention is to stop there."""
        return _model(self.experiment, tokenizer.vocab_size, tokenizer.bos_token_id)

    # --- stages -------------------------------------------------------------------------------------------------

    def record(self, stage: str) -> dict | None:
        """What `stage` wrote in its stage.json, None if it is not finished."""
        return agreed(lambda: self._read_record(stage))

    def _read_record(self, stage: str) -> dict | None:
        path = self.directory / stage / "stage.json"
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); restore it, or remove it to finish {stage} again") from None
        check(isinstance(record, dict), f"{path} is damaged; restore it, or remove it to finish {stage} again")
        return record

    def finished(self, stage: str) -> bool:
        return self.record(stage) is not None

    def finish(self, stage: str, **facts) -> None:
        """Marks `stage` as finished; `facts` are `parent`, `steps`, `tokens`, `seconds`, `started`, `metrics`, ..."""
        record = {"stage": stage, **facts, "finished": time.time(), "machine": machine_info()}
        record["peak_memory_bytes"] = peak_memory_bytes()
        agreed(lambda: self._write_record(stage, record))

    def _write_record(self, stage: str, record: dict) -> None:
        directory = self.directory / stage
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "stage.json", json.dumps(record, indent=2) + "\n")

    def parent_of(self, stage: str) -> str:
        """The last finished stage before `stage` that left parameters.

        Raises:
          UserError: there is none.
        """
        before = TRAINED[: TRAINED.index(stage)]
        parent = next((s for s in reversed(before) if (self.record(s) or {}).get("steps")), None)
        check(parent is not None, f"{stage} needs an earlier stage's parameters; run one of {', '.join(before)} first")
        return parent

    def checkpoints(self, stage: str) -> Checkpoints:
        return Checkpoints(self.directory / stage / "checkpoints", self.experiment.checkpoints)

    def load_params(self, stage: str, config: GPTConfig) -> tuple[Params, int]:
        """The parameters that `stage` ended with, laid out on this run's mesh, and its last step."""
        abstract = abstract_params(config)
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            abstract,
            shardings(self.mesh, abstract),
        )
        checkpoints = self.checkpoints(stage)
        step = checkpoints.latest_step()
        check(step is not None, f"stage {stage!r} of {self.directory} left no checkpoint; run it again")
        params = checkpoints.restore_params(abstract, step)
        checkpoints.close()
        return params, step

    def metrics(self, stage: str, total_steps: int | None = None) -> Metrics:
        log = self.experiment.logging
        return Metrics(self.directory, stage, tensorboard=log.tensorboard, wandb=log.wandb, total_steps=total_steps)


def planned_model(experiment: Experiment) -> GPTConfig:
    """The experiment's model with the vocabulary that is asked for, before there is a tokenizer: for random tokens, of
    which any may stand for the one that begins a document."""
    return _model(experiment, experiment.tokenizer.vocab_size, 0)


def _model(experiment: Experiment, vocab_size: int, bos_token_id: int) -> GPTConfig:
    border = bos_token_id if experiment.data.mask_borders in ("attention", "both") else None
    return GPTConfig.of(experiment.model, vocab_size, border)


def compute_dtype(experiment: Experiment):
    """bf16 on GPU and TPU, fp32 on a CPU, unless the experiment says; what fp8 leaves to it too."""
    if experiment.precision in ("auto", "fp8"):
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(experiment.precision)


def trains_in_fp8(experiment: Experiment) -> bool:
    """Whether training computes the blocks' matrix products in fp8.

    Raises:
      UserError: it should, and this process's devices or the model's shape do not allow it.
    """
    if experiment.precision != "fp8":
        return False
    model, device = experiment.model, jax.devices()[0]
    check(
        fp8.supported(),
        f"precision fp8 needs an NVIDIA GPU of the Hopper generation or later, not {device.device_kind}; "
        "leave --precision out",
    )
    kv_width = model.kv_heads * model.head_dim
    check(
        kv_width % fp8.MULTIPLE == 0,
        f"precision fp8 needs keys of a multiple of {fp8.MULTIPLE} dimensions, not {kv_width}; choose another "
        "model.num-kv-heads, or leave --precision out",
    )
    return True


def read_config(directory: epath.PathLike) -> Experiment:
    """The experiment of a run directory.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = epath.Path(directory) / "config.json"
    check(path.exists(), f"{directory} is not a run: it has no config.json")
    try:
        return from_json(path.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or --fresh to begin anew") from None


def _write(path: epath.Path, text: str) -> None:
    """Replaces a file as a whole: whoever is killed here leaves the old one or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _first_difference(name: str, old, new) -> tuple[str, object, object]:
    """The path, old value and new value of the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            if old.get(key) != value:
                return _first_difference(f"{name}.{key.replace('_', '-')}", old.get(key), value)
    return name, old, new
