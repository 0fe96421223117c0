"""Checks all conversations and questions that the stages of a run will read, before the first of them starts.

A bad line, a file that is not there, or conversations with nothing to train on would otherwise stop a stage hours into
the run, or train on nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection

from jaxchat.config import Experiment
from jaxchat.data import Trained
from jaxchat.data.chat.targets import Targets, count_targets, fits
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.text.reading import Findings
from jaxchat.errors import MissingData, UserError, check
from jaxchat.eval.core.bundle import find_bundle, load_bundle
from jaxchat.eval.core.prompts import order_of
from jaxchat.runs.progress import format_number
from jaxchat.stages.task_source import NotYet, TaskSource, dataset_of
from jaxchat.stages.text_check import check_text, text_that_is_there
from jaxchat.storage import to_path
from jaxchat.tasks import Task, parse_mixture
from jaxchat.tasks.base import Split
from jaxchat.tasks.conversations import Conversations
from jaxchat.tasks.items import spread
from jaxchat.tasks.unread import unread_files
from jaxchat.tokenizer import BaseTokenizer, load_tokenizer

MIXTURES = {"midtrain": "mixture", "sft": "mixture", "rl": "tasks", "evaluate": "tasks"}  # stage -> the field
SCORED = {"midtrain": "tasks", "sft": "tasks"}  # stage -> the field of what is scored on the way
SAID = 20  # of the bad lines that are left out, this many are said
SLOW = 3.0  # seconds after which the user is told how long the checks took
Say = Callable[[str], None]


def check_data(
    experiment: Experiment,
    source: TaskSource,
    stages: Collection[str],
    *,
    tokenizer: BaseTokenizer | None = None,
    given: Collection[str] = (),
    say: Say = print,
) -> None:
    """Reads all that `stages` will read of conversations and questions.

    What is still to be downloaded or generated is not waited for. Without a tokenizer, only conversations and questions
    that are too long for any tokenizer count as too long.

    Args:
      given: the fields that the user has set, such as `sft.mixture`: the tasks that they name must be there.

    Raises:
      UserError: a bad line, unless `data.on_bad` is "skip"; a file that cannot be read; a task that the user names and
        the data lacks; a stage with nothing to train on; a task without a question that fits into the context.
    """
    began = time.perf_counter()
    preflight = _Preflight(experiment, source, tokenizer, given, say)
    for stage in stages:
        if stage == "pretrain":
            preflight.check_core()
        if stage in MIXTURES:
            preflight.check_stage(stage)
        if stage in SCORED:
            preflight.check_scored(stage)
        if stage == "evaluate":
            preflight.check_bundle()
    if preflight.loaded and experiment.data.folder is not None:
        unread = unread_files(to_path(experiment.data.folder))
        if unread:
            say(f"data      read by no task: {', '.join(unread[:5])}{', ...' if len(unread) > 5 else ''}")
    if (seconds := time.perf_counter() - began) >= SLOW:
        say(f"data      {preflight.items:,} conversations and questions checked in {seconds:.0f} s")


def check_planned_data(experiment: Experiment, given: Collection[str] = (), say: Say = print) -> None:
    """Checks the text, conversations and questions that are there before a run; nothing is downloaded or generated.

    Raises:
      UserError: as `check_data`, `find_text` and `load_tokenizer`.
    """
    data, requests = experiment.data, parse_requests(experiment.data.download)
    downloads = [request.dataset.name for request in requests]
    reads_text = any(experiment.reads_text(stage) for stage in experiment.stages)
    if reads_text and (text := text_that_is_there(experiment, say)) is not None:
        check_text(experiment, text, say)
    tokenizer = None if experiment.tokenizer.path is None else load_tokenizer(experiment.tokenizer.path)
    source = TaskSource(data, None, lambda task: dataset_of(task) in downloads)
    check_data(experiment, source, experiment.stages, tokenizer=tokenizer, given=given, say=say)


def left_out(stage: str, missing: Collection[str]) -> str:
    """The line about tasks that the data lacks, and that only the experiment names."""
    return f"{stage:<9} left out, not in the data folder: {', '.join(missing)}"


def can_be_asked(task: Task, tokenizer: BaseTokenizer | None, sequence_len: int) -> bool:
    """Whether any question of a task fits into the model's context."""
    return task.mode is not None or any(fits(task, tokenizer, sequence_len))


def check_targets(stage: str, targets: Targets, sequence_len: int, say: Say = print) -> None:
    """Says how many of a stage's conversations have nothing to train on, and why.

    Raises:
      UserError: none has anything.
    """
    why = targets.why_not(sequence_len)
    if targets.trainable == 0:
        remedy = "raise it, or train on other conversations" if targets.too_long else "train on other conversations"
        raise UserError(
            f"{stage}: 0 of {format_number(targets.total, 'conversation')} have anything to train on: "
            f"{why or 'all were left out'}; {remedy} ({stage}.mixture)"
        )
    if why:
        nothing = targets.total - targets.trainable
        say(f"{stage:<9} {nothing:,} of {targets.total:,} conversations have nothing to train on: {why}")


class _Preflight:
    def __init__(
        self,
        experiment: Experiment,
        source: TaskSource,
        tokenizer: BaseTokenizer | None,
        given: Collection[str],
        say: Say,
    ):
        self.experiment, self.source, self.tokenizer, self.given, self.say = experiment, source, tokenizer, given, say
        self.sequence_len = experiment.model.sequence_len
        self.loaded: dict[tuple[str, Split], Task | None] = {}  # None: still to come
        self.counted: dict[tuple[str, Split, int | None, Trained], Targets] = {}
        self.items = 0
        self.bad: set[str] = set()

    def check_stage(self, stage: str) -> None:
        """Checks what a stage names; what is still to come is left for later."""
        field = MIXTURES[stage]
        found, missing = self._find(stage, field, "test" if stage == "evaluate" else "train")
        names = [name for name, _ in parse_mixture(getattr(getattr(self.experiment, stage), field))]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            self.say(f"{stage:<9} {stage}.{field} names {', '.join(twice)} more than once: it counts as often")
        if missing and (found or stage not in ("midtrain", "sft")):
            self.say(left_out(stage, missing))
        if stage not in ("midtrain", "sft"):
            self._check_questions(stage, [(task, limit) for _, limit, task in found if task is not None])
            for name in names if stage == "rl" else ():
                with contextlib.suppress(MissingData):
                    self._load(name, "val")  # asked to measure the progress
            return
        check(bool(found), f"{stage}: the data folder has none of its tasks: {', '.join(missing)}")
        if all(task is not None for _, _, task in found):
            self._check_training(stage, [(name, limit) for name, limit, _ in found])

    def check_core(self) -> None:
        """Checks the tasks of CORE, if pretraining measures it. Data that lacks them is no reason to stop."""
        every, folder = self.experiment.pretrain.core_every, self.experiment.data.folder
        if not every or self.source.downloading("core"):
            return
        found = None if folder is None else find_bundle(folder)
        if found is None:
            remedy = f"{folder} has no eval/eval_bundle; 'jaxchat data get core' downloads it"
            why = "generated data has none of its tasks; name a folder with --data" if folder is None else remedy
            check("pretrain.core_every" not in self.given, f"pretrain.core-every is {every}, but {why}")
            self.say(f"pretrain  CORE is not measured: {why}")
        elif lacking := load_bundle(found).missing:
            self.say(f"pretrain  {found} lacks {', '.join(lacking)}: the mean over the others is not CORE")

    def check_bundle(self) -> None:
        """Checks the tasks of CORE that the evaluate stage asks, where the data has them."""
        folder = self.experiment.data.folder
        if folder is not None and self.experiment.evaluate.core and not self.source.downloading("core"):
            found = find_bundle(folder)
            for task in () if found is None else load_bundle(found).tasks:
                order_of(task, self.experiment.evaluate.core_per_task)

    def check_scored(self, stage: str) -> None:
        """Checks what a stage that trains on other things scores on the way: what cannot be scored is left out."""
        found, missing = self._find(stage, SCORED[stage], "test")
        if missing:
            self.say(f"{stage:<9} not scored, not in the data folder: {', '.join(missing)}")
        tasks = [task for _, _, task in found if task is not None]
        if f"{stage}.{SCORED[stage]}" not in self.given:
            without_room = [task.name for task in tasks if not can_be_asked(task, self.tokenizer, self.sequence_len)]
            if without_room:
                self.say(f"{stage:<9} not scored, no question fits into model.sequence-len {self.sequence_len}: "
                         f"{', '.join(without_room)}")  # fmt: skip
            tasks = [task for task in tasks if task.name not in without_room]
        self._check_questions(stage, [(task, None) for task in tasks])

    def _find(
        self, stage: str, name_of_field: str, split: Split
    ) -> tuple[list[tuple[str, int | None, Task | None]], list[str]]:
        """The tasks that a field names, with the most of their items to take, and those that are missing, with why."""
        field, found, missing = f"{stage}.{name_of_field}", [], []
        for name, limit in parse_mixture(getattr(getattr(self.experiment, stage), name_of_field)):
            try:
                task = self._load(name, split)
            except MissingData as error:
                own = (stage, name) == ("rl", "humaneval")  # the problems of the data set are for testing
                dataset = None if own else dataset_of(name)
                remedy = f"; 'jaxchat data get {dataset}' downloads it" if dataset else ""
                # humaneval is there only if it is asked for
                check(field not in self.given and name != "humaneval", f"{field} names {name}, but {error}{remedy}")
                missing.append(f"{name} ({error})")
                continue
            if task is not None and len(task) < (limit or 0):
                self.say(f"{stage:<9} {name} has {len(task):,} items, not the {limit:,} that {field} asks for")
            found.append((name, limit, task))
        return found, missing

    def _load(self, name: str, split: Split) -> Task | None:
        """A task as a whole, read once; None if it is still to come."""
        if (name, split) not in self.loaded:
            bad = _Bad(self.bad, self.say)
            findings = Findings(self.experiment.data.on_bad, bad)
            train = self.loaded.get((name, "train")) if split == "val" else None
            held_out = train.held_out if isinstance(train, Conversations) else None
            try:
                task = held_out or self.source.load(name, split, None, findings)
            except NotYet:
                task = None
            self.loaded[name, split] = task
            self.items += len(task or ())
            if bad.count:
                self.say(f"data      {name}: {bad.count:,} left out")
        return self.loaded[name, split]

    def _count(self, name: str, split: Split, limit: int | None, trained: Trained = "assistant") -> Targets:
        key = name, split, limit, trained
        if key not in self.counted:
            task = self._load(name, split)
            self.counted[key] = count_targets(spread(task or (), limit), self.tokenizer, self.sequence_len, trained)
        return self.counted[key]

    def _check_training(self, stage: str, entries: list[tuple[str, int | None]]) -> None:
        trained = getattr(self.experiment, stage).targets
        parts = {name: self._count(name, "train", limit, trained) for name, limit in entries}
        targets = sum((self._count(name, "train", limit, trained) for name, limit in entries), Targets())
        check_targets(stage, targets, self.sequence_len, self.say)
        for name in (name for name, part in parts.items() if part.total and not part.trainable):
            self.say(f"{stage:<9} {name} has nothing to train on: {parts[name].why_not(self.sequence_len)}")
        held_out = Targets()
        for name, limit in entries:
            with contextlib.suppress(MissingData):
                held_out += self._count(name, "val", limit)
        named = ", ".join(f"{name} {part.trainable:,}" for name, part in parts.items())
        to_train_on = f"{format_number(targets.trainable, 'conversation')} to train on ({named})"
        self.say(f"{stage:<9} {to_train_on}, {held_out.trainable:,} to validate with")
        if held_out.trainable == 0:
            why = held_out.why_not(self.sequence_len) or "none is held out"
            self.say(f"{stage:<9} has no conversation to validate with ({why}): bpb is not measured")

    def _check_questions(self, stage: str, tasks: list[tuple[Task, int | None]]) -> None:
        """Checks tasks with the most of their questions that are asked; none if all are."""
        for task, limit in tasks:
            check(len(task) > 0, f"{stage}: {task.name} has no questions; leave it out of {stage}.tasks")
            if task.mode is not None:  # its questions are asked at their full length
                continue
            asked = spread(task, limit)
            longer = len(asked) - sum(fits(asked, self.tokenizer, self.sequence_len))
            check(
                longer < len(asked),
                f"{stage}: none of the {longer:,} questions of {task.name} fits into model.sequence-len "
                f"{self.sequence_len}; raise it, or leave {task.name} out of {stage}.tasks",
            )
            if longer:
                effect = "are not asked" if stage == "rl" else "score 0"
                self.say(f"{stage:<9} {longer:,} of {len(asked):,} questions of {task.name} do not fit into "
                         f"model.sequence-len {self.sequence_len}, and {effect}")  # fmt: skip


class _Bad:
    """Says the first of the lines about what is left out, each once, though a file may be read for several splits."""

    def __init__(self, known: set[str], say: Say):
        self.known, self.say, self.count = known, say, 0

    def __call__(self, line: str) -> None:
        if line in self.known:
            return
        self.known.add(line)
        self.count += 1
        if self.count <= SAID:
            self.say(f"data      {line}" + ("; any more are only counted" if self.count == SAID else ""))
