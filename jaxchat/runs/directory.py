"""The run directory: the experiment it belongs to, what each stage has made of what, and where everything else is.

RUN/config.json           the experiment, as it was started last
RUN/data/                 the generated corpus, if the experiment uses one
RUN/tokenizer/            the tokenizer
RUN/STAGE/begun.json      which making of the stage this is, of what, and with which settings
RUN/STAGE/checkpoints/    the checkpoints of a stage that trains
RUN/STAGE/stage.json      the stage's record, once it is finished
RUN/STAGE.old-K/          a stage that was set aside to be done again
RUN/metrics.jsonl         all metrics; at the end report.md, report.json and plots/

Nothing here imports JAX, so that tools that inspect a run start at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any

from etils import epath

from jaxchat.config import STAGES, TRAINED, Experiment
from jaxchat.errors import UserError, check
from jaxchat.runs import metrics
from jaxchat.runs.config_json import build
from jaxchat.runs.deciding import deciding, shown
from jaxchat.runs.files import LOCK, Object, damaged, free_name, read_bytes, read_json, write_json
from jaxchat.runs.records import BEGUN, RECORD, result_step
from jaxchat.stopping import done_once
from jaxchat.storage import is_folder, is_remote, reason, storage_errors, to_path

Say = Callable[[str], None]
_ID = 12  # characters
EARLIER = "earlier"  # the identity of what a stage was made from, where that is there no more and has left no other


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

    def answers(self, stage: str, task: str) -> epath.Path:
        """The file with the answers that a stage's model gave to a task's questions, a line each."""
        return self.path / "evaluate" / stage / f"{task}.jsonl"

    @property
    def rollouts(self) -> epath.Path:
        """The file with what was sampled in reinforcement learning, a line for each question of a step."""
        return self.path / "rl" / "rollouts.jsonl"

    # --- the experiment -----------------------------------------------------------------------------------------

    def read_config(self) -> Experiment:
        """The experiment that the run belongs to.

        Raises:
          UserError: config.json is missing or damaged, or from another version of jaxchat.
        """
        remedy = "restore it, or train again with launch.py --fresh"
        if any((self.path / stage / "begun.json").exists() for stage in STAGES):
            remedy = "delete it: the same launch.py command writes it again"
        config = read_json(self.config_file, Object({"name": str}), remedy)
        if config is None and "delete" in remedy:
            raise UserError(f"{self.config_file} is missing; the same launch.py command writes it again")
        if config is None:
            raise UserError(f"{self} is not a run: it has no config.json; name the folder of a run, as launch.py makes")
        return self._experiment(self.config_file, config, remedy)

    def _experiment(self, path: epath.Path, config: dict[str, Any], remedy: str) -> Experiment:
        try:
            return build(config)
        except (UserError, ValueError, TypeError, AttributeError) as error:
            raise damaged(path, str(error), remedy) from None

    def check_there(self, name: epath.PathLike, remedy: str) -> None:
        """Checks that the directory, which the user calls `name`, exists.

        Raises:
          UserError: nothing is there, or a file; or as `is_folder`.
        """
        if not is_folder(self.path):
            check(not self.path.exists(), f"{name} is a file, not a run directory; name the folder of a run")
            raise UserError(f"there is no run directory {name}; {remedy}")

    def is_run(self) -> bool:
        """Whether the directory holds a run; False if there is none, or it is empty.

        Raises:
          UserError: it holds something else.
        """
        if self.config_file.exists() or any((self.path / stage / "begun.json").exists() for stage in STAGES):
            return True
        try:
            found = self.path.exists() and (
                not self.path.is_dir() or any(path.name != LOCK for path in self.path.iterdir())
            )
        except storage_errors() as error:
            raise UserError(f"{self} cannot be read ({reason(error)}); choose another --run-dir") from None
        check(not found, f"{self} is not empty and not a run of jaxchat; choose another --run-dir")
        return False

    def open(
        self,
        experiment: Experiment,
        *,
        redo: Collection[str] = (),
        keep_config: bool = False,
        say: Say = lambda line: None,
    ) -> None:
        """Creates the directory with its config.json, or checks that it belongs to `experiment` and updates it.

        Args:
          redo: stages that `do_again` will set aside, with those that were made from them; it then updates config.json.
          keep_config: the config.json of a run that has a tokenizer stays as it is: for tools that inspect a run.
          say: takes lines for the user.

        Raises:
          UserError: the directory holds something else, or a run with other settings; it cannot be written.
        """
        try:
            there = self.is_run()
            if there:
                if self._has_config():
                    self._complete_records(self.read_config(), redo)
                self.check(experiment, redo=redo, trains=not keep_config, say=say)
            self.path.mkdir(parents=True, exist_ok=True)
            if not (redo and there) and not (keep_config and self.finished("tokenizer")):
                write_json(self.config_file, dataclasses.asdict(experiment))
        except OSError as error:
            raise UserError(f"{self} cannot be created ({reason(error)}); choose another --run-dir") from None

    def check(
        self,
        experiment: Experiment,
        *,
        redo: Collection[str] = (),
        trains: bool = True,
        say: Say = lambda line: None,
    ) -> None:
        """Checks that `experiment` can go on with what is in the directory, if anything is; writes nothing.

        Args:
          trains: whether the command has --redo and --fresh, so that messages may name them.

        Raises:
          UserError: as `open`.
        """
        if not self.is_run():
            return
        before = self.read_config() if self._has_config() else None
        check(
            before is None or before.name == experiment.name,
            f"{self} is a run of experiment {before and before.name!r}, not {experiment.name!r}; choose another "
            f"--run-dir{', or start over with --fresh' if trains else ''}",
        )
        again = self.following(redo)
        for stage in STAGES:
            if stage not in again and self.made(stage):
                self._check_same(stage, self.config_of(stage) or before, experiment, trains, say)

    def _has_config(self) -> bool:
        """Whether config.json is there, or must be, since no stage has recorded its settings."""
        return self.config_file.exists() or not any(self.begun(stage) for stage in STAGES)

    def _check_same(self, stage: str, before: Experiment | None, now: Experiment, trains: bool, say: Say) -> None:
        """Raises a UserError if settings that have decided what `stage` made differ from those of `now`."""
        if before is None:
            return
        finished = self.finished(stage)
        old, new = (deciding(experiment, stage, finished=finished) for experiment in (before, now))
        if "imported" in (self.read_record(stage) or {}):  # nothing here has made it: it fixes only what it is
            old, new = ({n: v for n, v in settings.items() if n.startswith("model.")} for settings in (old, new))
        # What only one of them has comes last: another setting, which is the one to name, has mostly brought it in.
        for name in sorted({**new, **old}, key=lambda name: (name in old) != (name in new)):
            if old.get(name) != new.get(name):
                again = f", do the stage again with --redo={stage}," if trains else ""
                raise UserError(
                    f"{self}: {stage} was {'made' if finished else 'begun'} with {name} {shown(old.get(name))}, not "
                    f"{shown(new.get(name))}; leave it at that{again} or choose another --run-dir"
                )
        if stage in ("tokenizer", "pretrain") and before.data.folder != now.data.folder:
            say(f"data      {stage} was {'made' if finished else 'begun'} from {before.data.folder}")

    # --- the stages ---------------------------------------------------------------------------------------------

    def read_record(self, stage: str) -> dict[str, Any] | None:
        """What `stage` wrote to its stage.json when it finished; None if it is not finished.

        Raises:
          UserError: the file is damaged.
        """
        again = f"do the stage again with --redo={stage}"
        if stage in TRAINED:
            again = f"delete it, and the stage ends anew from its last checkpoint; or {again}"
        return read_json(self._record_file(stage), RECORD, again)

    def write_record(self, stage: str, record: dict[str, Any]) -> None:
        """Marks `stage` as finished."""
        write_json(self._record_file(stage), record)

    def _record_file(self, stage: str) -> epath.Path:
        return self.path / stage / "stage.json"

    def finished(self, stage: str) -> bool:
        return self.read_record(stage) is not None

    def made(self, stage: str) -> bool:
        """Whether the stage is finished, or has a checkpoint."""
        if self._record_file(stage).exists():
            return True
        folder = self.checkpoints(stage)
        return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())

    def stages_with_model(self) -> list[str]:
        """The finished stages that left parameters, in order.

        Not those that had nothing to train on, nor those that were made from what has been made again since.
        """
        return [stage for stage in TRAINED if self.leaves_model(stage) and self.stale(stage) is None]

    def leaves_model(self, stage: str) -> bool:
        """Whether the stage is finished and has trained, or was imported: not without anything to train on."""
        record = self.read_record(stage) or {}
        return bool(record.get("steps")) or "imported" in record

    def result_step(self, stage: str) -> int:
        """The step whose checkpoint is the result of a finished stage: its last or, where validation turned, its best.

        Raises:
          UserError: the stage is not finished; the checkpoint is gone.
        """
        record, folder = self.read_record(stage), self.checkpoints(stage)
        check(record is not None, f"stage {stage!r} of {self} is not finished; run it first")
        step = result_step(record or {})
        if not (folder / str(step)).exists():
            earlier = max(
                (int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else (), default=None
            )
            remedy = f"do the stage again with --redo={stage}"
            if earlier is not None:
                remedy = f"delete {self._record_file(stage)} to go on from step {earlier:,}, or {remedy}"
            raise UserError(f"{folder} has no checkpoint of step {step:,}, the result of {stage}; {remedy}")
        return step

    # --- what was made of what ----------------------------------------------------------------------------------

    def begun(self, stage: str) -> dict[str, Any] | None:
        """What `begin` wrote; None if the stage was not begun, or begun by an earlier version.

        Raises:
          UserError: the file is damaged.
        """
        remedy = f"delete it: {stage} then counts as made with the settings of config.json"
        return read_json(self.path / stage / "begun.json", BEGUN, remedy)

    def begin(self, stage: str, experiment: Experiment, sources: Collection[str] = ()) -> None:
        """Records that `stage` is made, or goes on being made, with the experiment's settings.

        Args:
          sources: the stages of whose results it is made.
        """
        goes_on = self.begun(stage) if self.made(stage) else None
        write_json(
            self.path / stage / "begun.json",
            {
                "stage": stage,
                "id": goes_on["id"] if goes_on else uuid.uuid4().hex[:_ID],
                "started": goes_on["started"] if goes_on else time.time(),
                "made_from": {source: identity for source in sources if (identity := self.id_of(source))},
                "config": dataclasses.asdict(experiment),
                **({"step": goes_on["step"]} if goes_on and "step" in goes_on else {}),
            },
        )

    def note(self, stage: str, **facts: Any) -> None:
        """Adds facts to what `begin` wrote, if it did; they stay while the stage goes on."""
        begun = self.begun(stage)
        if begun is not None and any(begun.get(name) != fact for name, fact in facts.items()):
            write_json(self.path / stage / "begun.json", {**begun, **facts})

    def id_of(self, stage: str) -> str | None:
        """What tells this making of a stage from others; None if there is none, or it is of an earlier version."""
        return (self.read_record(stage) or {}).get("id") or (self.begun(stage) or {}).get("id")

    def new_id(self, stage: str) -> str:
        """The identity of a stage that has just been made: of a tokenizer its contents, since it can be made again."""
        data = read_bytes(self.tokenizer / "tokenizer.json", "") if stage == "tokenizer" else None
        return uuid.uuid4().hex[:_ID] if data is None else hashlib.sha256(data).hexdigest()[:_ID]

    def config_of(self, stage: str) -> Experiment | None:
        """The settings with which a stage was made; None if that is not recorded."""
        begun = self.begun(stage)
        remedy = f"use the version of jaxchat that wrote it, or do the stage again with --redo={stage}"
        return self._experiment(self.path / stage / "begun.json", begun["config"], remedy) if begun else None

    def stale(self, stage: str) -> str | None:
        """The stage of an earlier making of which `stage` was made, directly or not; None if all are still there."""
        for source, identity in ((self.begun(stage) or {}).get("made_from") or {}).items():
            if self.id_of(source) not in (None, identity):
                return source
            if older := self.stale(source):
                return older
        return None

    def _complete_records(self, before: Experiment, redo: Collection[str]) -> None:
        """Writes the begun.json of stages that an earlier version has made, with the settings of config.json."""
        for stage in STAGES:
            if stage in redo or not self.made(stage) or self.begun(stage) is not None:
                continue
            record = self.read_record(stage) or {}
            sources = ["tokenizer", *([record["parent"]["stage"]] if record.get("parent") else [])]
            made_from = {}
            for source in sources if stage in TRAINED else ():
                made = self.read_record(source) or {}
                later = (made.get("finished") or 0) > (record.get("started") or made.get("finished") or 0)
                if self.id_of(source):
                    made_from[source] = EARLIER if later else self.id_of(source)
            facts = {
                "stage": stage,
                "id": record.get("id") or self.new_id(stage),
                "started": record.get("started") or 0.0,
            }
            config = dataclasses.asdict(before)
            write_json(self.path / stage / "begun.json", {**facts, "made_from": made_from, "config": config})

    # --- doing a stage again ------------------------------------------------------------------------------------

    def do_again(self, experiment: Experiment, stages: Collection[str], say: Say = lambda line: None) -> None:
        """Sets the stages and all that were made from them aside, to be done again as `experiment` says."""
        for stage in self.following(stages):
            self.set_aside(stage, say)
        if stages:
            done_once("--redo")
        write_json(self.config_file, dataclasses.asdict(experiment))

    def following(self, stages: Collection[str]) -> list[str]:
        """The stages and all that were made from them, in order."""
        found = set(stages)
        for stage in TRAINED if found else ():
            if stage not in found and not found.isdisjoint((self.begun(stage) or {}).get("made_from") or {}):
                found.add(stage)
        return [stage for stage in STAGES if stage in found]

    def set_aside(self, stage: str, say: Say) -> None:
        """Renames a stage's folder to STAGE.old-K, with the stage's metrics and what was logged or found out about it.

        Raises:
          UserError: the run is in cloud storage.
        """
        folder = self.path / stage
        if not folder.exists():
            return
        check(not is_remote(self.path), f"stages can be set aside on this machine only, not in {self}; delete {folder}")
        aside = epath.Path(free_name(folder))
        folder.rename(aside)
        for name in (f"evaluate/{stage}", f"tensorboard/{stage}", f"wandb/{stage}.id"):
            if (self.path / name).exists():
                (self.path / name).rename(aside / name.replace("/", "-"))
        metrics.move(self.path, aside, lambda line: stage in (line["stage"], line.get("of")))
        say(f"{stage:<9} is done again; what it left is now in {aside}")

    # --- metrics ------------------------------------------------------------------------------------------------

    def read_metrics(self, say: Say = lambda line: None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that are about what is in the directory now, as `jaxchat.runs.metrics` reads them.

        Left out are lines of stages that were deleted, or made from what has been made again since, and scores of
        models that are no longer there. Damaged lines are left out too, and counted by `say`.
        """
        # The files of a stage are read once, not for each line: in cloud storage each takes its time.
        there = {stage for stage in STAGES if (self.path / stage).exists() and self.stale(stage) is None}
        lines = metrics.read_metrics(self.path, say)
        scored = {line["of"] for line in lines if "of" in line} & there
        records = {stage: record for stage in scored if (record := self.read_record(stage)) is not None}
        models = {stage: self.id_of(stage) for stage in records}

        def is_of_now(line: dict[str, Any]) -> bool:
            stage = line.get("of")
            if stage is None:
                return line["stage"] in there
            if stage not in records:
                return False
            if "model" in line:
                return line["model"] == models[stage]
            return line.get("time", 0) >= (records[stage].get("finished") or 0)  # of an earlier version

        return [line for line in lines if is_of_now(line)]
