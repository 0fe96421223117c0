"""The time that a run may take, and the part of it that each stage gets. Nothing here knows of devices or steps.

A stage gets its part of what is left when it begins: what earlier ones have saved or overspent is passed on to all that
follow. RUN/budget.json keeps what is spent, so that a run that was stopped has the rest when it goes on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from jaxchat.errors import UserError, check
from jaxchat.runs.files import Object, read_json, write_json
from jaxchat.runs.progress import format_duration

NAME = "budget.json"
# How the time is shared beyond what each stage needs: most of what a model knows it learns in pretraining.
PARTS = {"tokenizer": 2, "pretrain": 54, "midtrain": 14, "sft": 12, "rl": 10, "evaluate": 8, "report": 0}
# Seconds that a stage needs to do anything: to compile its programs, to evaluate once, to save.
LEAST = {"tokenizer": 2, "pretrain": 20, "midtrain": 15, "sft": 15, "rl": 35, "evaluate": 15, "report": 6}
_SCHEMA = Object(
    {
        "budget": str,
        "seconds": float,
        "spent": float,
        "finished": bool,
        "stages": Object(others=Object({"share": float, "seconds": float})),
    },
    optional={"questions": int},
)


@dataclass
class TimeBudget:
    """The seconds that a run may take in all.

    Attributes:
      text: as the user wrote it.
      stages: those that are still to be done, in order.
      fixed: training stages whose length the user has set: they take as long as that takes.
      began: when this process began, by the clock `now`.
      before: seconds that earlier processes have spent.
      record: of each stage that has ended the seconds that it had (`share`) and has taken (`seconds`).
      questions: of each task, as many as the evaluation has found time for; None before.
      tokens_per_second: that the devices train on together, once that is measured.
      longest: seconds that a stage takes at most, where that is known: what it cannot use is for the others.
    """

    text: str
    seconds: float
    stages: Sequence[str]
    began: float
    fixed: frozenset[str] = frozenset()
    now: Callable[[], float] = time.monotonic
    before: float = 0.0
    record: dict[str, dict[str, float]] = field(default_factory=dict)
    questions: int | None = None
    finished: bool = False
    tokens_per_second: float | None = None
    longest: dict[str, float] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _shares: dict[str, float] = field(default_factory=dict)
    _written: float = -math.inf

    @property
    def spent(self) -> float:
        return self.before + self.now() - self.began

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def share(self, stage: str) -> float:
        """The seconds of what is left that `stage` may take if it begins now."""
        following = self.stages[self.stages.index(stage) :] if stage in self.stages else [stage]
        return self._split(following)[stage]

    def _split(self, stages: Sequence[str]) -> dict[str, float]:
        """What is left as seconds of each of `stages`."""
        left, open_stages, shares = max(0.0, self.left), list(stages), {}
        while True:
            least, parts = sum(LEAST[s] for s in open_stages), sum(PARTS[s] for s in open_stages)
            scale = left / least if left < least or not parts else 1.0
            rest = (left - scale * least) / max(parts, 1)
            shares |= {stage: scale * LEAST[stage] + rest * PARTS[stage] for stage in open_stages}
            full = [stage for stage in open_stages if shares[stage] > self.longest.get(stage, math.inf)]
            if not full or not any(PARTS[stage] for stage in open_stages if stage not in full):
                return shares
            shares |= {stage: self.longest[stage] for stage in full}
            left -= sum(self.longest[stage] for stage in full)
            open_stages = [stage for stage in open_stages if stage not in full]

    def begin(self, stage: str) -> None:
        """Gives `stage` its share, from now on; for one that goes on, that share is of what is left."""
        self._shares[stage], self._began[stage] = self.share(stage), self.now()

    def left_of(self, stage: str) -> float:
        """The seconds that are left of the share of a stage that has begun; negative when it is overspent."""
        return self._began[stage] + self._shares[stage] - self.now()

    def end(self, stage: str) -> None:
        """Records what `stage` has taken, that of earlier processes included."""
        earlier = self.record.get(stage, {"seconds": 0.0})["seconds"]
        self.record[stage] = {
            "share": earlier + self._shares[stage],
            "seconds": earlier + self.now() - self._began.pop(stage),
        }

    def planned(self, stage: str) -> float:
        """The seconds that `stage` will have if those before it take theirs."""
        return self._split(self.stages)[stage]

    def plan(self) -> str:
        """How what is left is shared, in words: `pretrain 8m 12s, midtrain 2m 10s, ...`."""
        return ", ".join(f"{stage} {format_duration(share)}" for stage, share in self._split(self.stages).items())

    def check_enough(self) -> None:
        """Raises a UserError if the time that is left is too short for the stages to do anything."""
        least = sum(LEAST[stage] for stage in self.stages)
        needs = format_duration(least)
        if self.before and self.left < least:
            raise UserError(
                f"--budget is {self.text}, of which {format_duration(self.before)} are spent; what is left of the run "
                f"needs at least {needs}: give --budget={_minutes(self.before + least)}, or go on without a budget"
            )
        pays = f", which pays for {format_duration(self.seconds)}" if "usd" in self.text or "$" in self.text else ""
        check(
            self.left >= least,
            f"--budget is {self.text}{pays}: too short for {', '.join(self.stages)}; give at least "
            f"{_minutes(least)}, or fewer --stages",
        )

    # --- the record -----------------------------------------------------------------------------------------------

    def write(self, folder: epath.Path, every: float = 0.0) -> None:
        """Writes RUN/budget.json, unless that was done within `every` seconds; what has not ended counts so far."""
        if self.now() - self._written < every:
            return
        self._written = self.now()
        record = dict(self.record)
        for stage, began in self._began.items():
            earlier = record.get(stage, {"seconds": 0.0})["seconds"]
            record[stage] = {"share": earlier + self._shares[stage], "seconds": earlier + self.now() - began}
        value = {
            "budget": self.text,
            "seconds": self.seconds,
            "spent": self.spent,
            "finished": self.finished,
            "stages": record,
        }
        write_json(folder / NAME, value | ({} if self.questions is None else {"questions": self.questions}))


def read_record(folder: epath.Path) -> dict[str, Any] | None:
    """What RUN/budget.json holds; None if the run never had a budget.

    Raises:
      UserError: it is damaged.
    """
    return read_json(folder / NAME, _SCHEMA, "delete it: the run then has its whole budget again")


def resumed(budget: TimeBudget, record: dict[str, Any] | None) -> TimeBudget:
    """`budget` less what the record of an unfinished run has spent; the questions of a finished one stay the same."""
    if record is None:
        return budget
    questions = record.get("questions")
    if record["finished"]:
        return dataclasses.replace(budget, questions=questions)
    stages = {stage: dict(entry) for stage, entry in record["stages"].items()}
    return dataclasses.replace(budget, before=record["spent"], record=stages, questions=questions)


def _minutes(seconds: float) -> str:
    return f"{-int(-seconds // 60)}m"


def describe(record: dict[str, Any]) -> str:
    """What became of a budget, in words, from its record: of each stage what it took, and of what."""
    entries = {stage: entry for stage, entry in record["stages"].items() if stage != "report"}
    parts = ", ".join(
        f"{stage} {format_duration(entry['seconds'])} of {format_duration(entry['share'])}"
        for stage, entry in entries.items()
    )
    return (
        f"{format_duration(record['spent'])} of {format_duration(record['seconds'])} ({record['budget']}) were taken "
        f"before this report: {parts}"
    )
