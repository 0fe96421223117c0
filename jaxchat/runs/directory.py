"""The run directory: the experiment it belongs to, what each finished stage recorded, and where everything else is.

RUN/config.json           the experiment
RUN/data/                 the generated corpus, if the experiment uses one
RUN/tokenizer/            the tokenizer
RUN/STAGE/checkpoints/    the checkpoints of a stage that trains
RUN/STAGE/stage.json      the stage's record, once it is finished
RUN/metrics.jsonl         all metrics; at the end report.md, report.json and plots/

Nothing here imports JAX, so that tools that inspect a run start at once.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etils import epath

from jaxchat.config import Experiment
from jaxchat.errors import UserError, check
from jaxchat.runs.config_json import from_json, to_json
from jaxchat.storage import first_line, to_path

TRAINED = ("pretrain", "midtrain", "sft", "rl")  # the stages that leave parameters, in order
# What may change from one start of a run to the next: it affects neither the numbers nor the format of what is stored.
# (`on_nan` matters only where the numbers have ended.)
CHANGEABLE = ("stages", "logging", "cost", "mesh", "remat", "on_nan", "checkpoints", "name")


class RunDirectory:
    """Paths and records of the run in `path`, which may be anything that `etils.epath` opens.

    Raises:
      UserError: a path to a storage that is unknown, or whose package is not installed.
    """

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(to_path(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> epath.Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> epath.Path:
        """The folder of the tokenizer."""
        return self.path / "tokenizer"

    @property
    def generated_data(self) -> epath.Path:
        """The folder of the generated corpus."""
        return self.path / "data"

    def checkpoints(self, stage: str) -> epath.Path:
        """The folder of a stage's checkpoints."""
        return self.path / stage / "checkpoints"

    # --- the experiment -----------------------------------------------------------------------------------------

    def read_config(self) -> Experiment:
        """The experiment that the run belongs to.

        Raises:
          UserError: config.json is missing or damaged, or from another version of jaxchat.
        """
        check(self.config_file.exists(), f"{self} is not a run: it has no config.json")
        try:
            return from_json(self.config_file.read_text())
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.config_file} is damaged ({error}); restore it, or train again with launch.py --fresh"
            ) from None

    def open(self, experiment: Experiment, *, keep_config: bool = False) -> None:
        """Creates the directory with its config.json, or checks that it belongs to `experiment` and updates it.

        With `keep_config`, the config.json of a run that has a tokenizer stays as it is: for tools that inspect a run.

        Raises:
          UserError: the directory holds something else, or a run with other settings; it cannot be written.
        """
        if self.config_file.exists():
            self._check_same(self.read_config(), experiment)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self} is not empty and not a run of jaxchat; choose another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (keep_config and self.finished("tokenizer")):
                _replace(self.config_file, to_json(experiment))
        except OSError as error:
            problem = error.strerror or first_line(error)
            raise UserError(f"{self} cannot be created ({problem}); choose another --run-dir") from None

    def _check_same(self, before: Experiment, now: Experiment) -> None:
        remedy = "choose another --run-dir, or start over with --fresh"
        check(
            before.name == now.name,
            f"{self} is a run of experiment {before.name!r}, not {now.name!r}; {remedy}",
        )
        old, new = dataclasses.asdict(before), dataclasses.asdict(now)
        # A run that stopped at bad text may continue without it: what it has read stays the same.
        old["data"]["on_bad"] = new["data"]["on_bad"]
        for section, value in new.items():
            if value != old[section] and self._is_fixed(section):
                name, was, wanted = _first_difference(section, old[section], value)
                raise UserError(f"{self} was started with {name} {was}, not {wanted}; {remedy}")

    def _is_fixed(self, section: str) -> bool:
        """Whether something in the directory was made with this section of the config."""
        made = [name for name in ("data", "tokenizer", *TRAINED, "evaluate") if (self.path / name).exists()]
        if section in (*TRAINED, "evaluate", "tokenizer"):
            return section in made
        if section in CHANGEABLE:
            return False
        # All that was made depends on the text and the seed; the model and its optimizer matter once training began.
        return bool(made) if section in ("data", "seed") else any(stage in TRAINED for stage in made)

    # --- the stages ---------------------------------------------------------------------------------------------

    def read_record(self, stage: str) -> dict[str, Any] | None:
        """What `stage` wrote to its stage.json when it finished; None if it is not finished.

        Raises:
          UserError: the file is damaged.
        """
        path = self._record_file(stage)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            return record
        except ValueError as error:
            raise UserError(
                f"{path} is damaged ({error}); restore it, or delete it and run the stage {stage!r} again"
            ) from None

    def write_record(self, stage: str, record: dict[str, Any]) -> None:
        """Marks `stage` as finished."""
        path = self._record_file(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(record, indent=2) + "\n")

    def _record_file(self, stage: str) -> epath.Path:
        return self.path / stage / "stage.json"

    def finished(self, stage: str) -> bool:
        return self.read_record(stage) is not None

    def stages_with_model(self) -> list[str]:
        """The finished stages that left parameters, in order: not those that had nothing to train on."""
        return [stage for stage in TRAINED if (self.read_record(stage) or {}).get("steps")]


def _replace(path: epath.Path, text: str) -> None:
    """Writes a file atomically: a process killed here leaves either the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The name, old value and new value of the first field that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in new.items():
            if old.get(key) != value:
                return _first_difference(f"{name}.{key.replace('_', '-')}", old.get(key), value)
    return name, old, new
