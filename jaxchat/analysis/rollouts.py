"""A page and a table of what was sampled in reinforcement learning, from the `rollouts.jsonl` of a run.

The file is read line by line, and only what is shown is kept in memory: it may have a million answers. It can be read
while the training writes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath

from jaxchat.errors import UserError, check
from jaxchat.eval import page
from jaxchat.runs.files import Object, misfit
from jaxchat.runs.progress import format_number
from jaxchat.runs.tables import table
from jaxchat.storage import is_remote, readable

FILE = "rollouts.jsonl"
SHOWN_STEPS, SHOWN_ANSWERS = 20, 20 * 256  # of the page, unless the steps are named
SHOWN_QUESTIONS, SHOWN_TIMES = 200, 8  # of the questions that were asked again, and of the times they were asked
_SLOW = 2.0  # seconds of reading after which progress is shown
_SAMPLE = Object({"answer": str, "reward": (float, None), "advantage": (float, None), "tokens": int, "cut": bool})
_LINE = Object({"step": int, "task": str, "question": str, "right": str, "used": bool, "samples": [_SAMPLE]})
Line = dict[str, Any]
Progress = Callable[[int, int], None]


class _Asked(NamedTuple):
    """A question at a step: where its line begins in the file, and its answers' mean reward, NaN if none has one."""

    step: int
    place: int
    reward: float


@dataclass
class Summary:
    """The answers of a step, counted.

    Attributes:
      rewards: their sum.
      without_signal: questions whose answers all earned the same.
      unused: questions whose answers are not trained on.
      cut, unscored: answers without room to end; without a reward.
      tokens: of all answers.
    """

    questions: int = 0
    answers: int = 0
    rewards: float = 0.0
    without_signal: int = 0
    unused: int = 0
    cut: int = 0
    unscored: int = 0
    tokens: int = 0

    @property
    def reward(self) -> float:
        """The mean; NaN if no answer has one."""
        known = self.answers - self.unscored
        return self.rewards / known if known else float("nan")

    def add(self, line: Line) -> None:
        rewards = _rewards(line)
        self.questions += 1
        self.answers += len(line["samples"])
        self.rewards += sum(rewards)
        self.without_signal += len(set(rewards)) < 2
        self.unused += not line["used"]
        self.cut += sum(sample["cut"] for sample in line["samples"])
        self.unscored += len(line["samples"]) - len(rewards)
        self.tokens += sum(sample["tokens"] for sample in line["samples"])


@dataclass
class Index:
    """What a file of rollouts has, and where.

    Attributes:
      steps: the answers of each step, counted.
      asked: by task and question, when it was asked.
      damaged: lines that cannot be read.
    """

    steps: dict[int, Summary] = field(default_factory=lambda: defaultdict(Summary))
    asked: dict[tuple[str, str], list[_Asked]] = field(default_factory=lambda: defaultdict(list))
    damaged: int = 0


@contextlib.contextmanager
def opened(path: epath.Path) -> Iterator[IO[bytes]]:
    """The file of a run's rollouts; in cloud storage, where each place would take a request, all of it in memory.

    Raises:
      UserError: it cannot be read.
    """
    with readable(path):
        file = io.BytesIO(path.read_bytes()) if is_remote(path) else path.open("rb")
    with file:
        yield file


def read_index(file: IO[bytes], progress: Progress = lambda done, total: None) -> Index:
    """Reads all lines once; a last line that is still being written does not count.

    Args:
      progress: is given the bytes that are read and all bytes, if it takes seconds.
    """
    index, place, began = Index(), 0, time.monotonic()
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for text in file:
        begin, place = place, place + len(text)
        if not text.endswith(b"\n"):
            continue
        line = _parse(text)
        if line is None:
            index.damaged += 1
            continue
        index.steps[line["step"]].add(line)
        rewards = _rewards(line)
        mean = sum(rewards) / len(rewards) if rewards else float("nan")
        index.asked[line["task"], line["question"]].append(_Asked(line["step"], begin, mean))
        if time.monotonic() - began > _SLOW:
            progress(place, max(size, place))
    return index


def chosen_steps(index: Index, named: Sequence[int] | None) -> list[int]:
    """The steps to be shown: those named, or some from the first to the last, evenly spread.

    Raises:
      UserError: nothing was sampled at a step that is named.
    """
    steps = sorted(index.steps)
    if named is not None:
        for step in named:
            near = min(steps, key=lambda one: abs(one - step))
            check(step in index.steps, f"--steps: nothing was sampled at step {step:,}; the nearest step is {near:,}")
        return sorted(set(named))
    most = max(summary.answers for summary in index.steps.values())
    number = min(len(steps), max(2, min(SHOWN_STEPS, SHOWN_ANSWERS // most)))
    return [steps[i] for i in np.linspace(0, len(steps) - 1, number).round().astype(int)]


def summary_table(index: Index, steps: Sequence[int]) -> str:
    """A row for each of the steps."""
    header = ["step", "questions", "answers", "reward", "no signal", "not used", "cut", "no reward", "tokens"]
    rows = []
    for step in steps:
        one = index.steps[step]
        shares = (one.without_signal / one.questions, one.unused / one.questions, one.cut / one.answers,
                  one.unscored / one.answers)  # fmt: skip
        rows.append([
            f"{step:,}",
            f"{one.questions:,}",
            f"{one.answers:,}",
            _shown(one.reward),
            *(f"{share:.0%}" if share else "" for share in shares),
            f"{one.tokens / one.answers:,.1f}",
        ])  # fmt: skip
    return table(header, rows)


def rollouts_page(run: str, file: IO[bytes], index: Index, steps: Sequence[int]) -> str:
    """The page: what became of the questions that were asked more than once, and the answers of the steps.

    Args:
      run: the run directory as the user names it.
      file: that `index` is of.

    Raises:
      UserError: the file is another one by now.
    """
    first, last = min(index.steps), max(index.steps)
    about = f"{format_number(sum(one.answers for one in index.steps.values()), 'answer')}, steps {first:,} to {last:,}"

    def line_at(place: int) -> Line:
        file.seek(place)
        line = _parse(file.readline())
        if line is None:
            raise UserError(f"the rollouts of {run} have changed while they were read, by a resume; try again")
        return line

    return page.page(f"Rollouts of {run}", about, [*_changes(index, line_at), *_steps(index, line_at, steps)])


def _steps(index: Index, line_at: Callable[[int], Line], steps: Sequence[int]) -> Iterator[page.Group]:
    """The steps, the last one first."""
    places = defaultdict(list)
    for asked in index.asked.values():
        for one in asked:
            places[one.step].append(one.place)
    for step in reversed(steps):
        summary = index.steps[step]
        items = [page.rollout_item(line_at(place)) for place in sorted(places[step])]
        about = f"mean reward {_shown(summary.reward)} of {format_number(summary.answers, 'answer')} to these questions"
        order = ("Best first", "Worst first")
        yield page.group(f"step {step:,}", _shown(summary.reward), about, items, FILE, order)


def _changes(index: Index, line_at: Callable[[int], Line]) -> Iterator[page.Group]:
    """The questions whose mean reward has changed most since they were first asked, with answers then and later."""
    again = []
    for asked in index.asked.values():
        scored = [one for one in asked if not np.isnan(one.reward)]
        if len({one.step for one in scored}) > 1:
            again.append((scored[-1].reward - scored[0].reward, scored))
    if not again:
        return
    again.sort(key=lambda pair: -abs(pair[0]))
    items = []
    for change, scored in again[:SHOWN_QUESTIONS]:
        shown = np.linspace(0, len(scored) - 1, min(SHOWN_TIMES, len(scored))).round().astype(int)
        items.append(page.change_item(change, len(scored), [line_at(scored[i].place) for i in shown]))
    about = f"{format_number(len(again), 'question')} asked more than once; each with the best and the worst answer"
    mean = sum(change for change, _ in again) / len(again)
    yield page.group(
        "questions asked again", f"{mean:+.3g}", about, items, FILE, ("Risen most first", "Fallen most first")
    )


def _parse(text: bytes) -> Line | None:
    """A line of the file; None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if misfit(line, _LINE) is None and line["samples"] else None


def _rewards(line: Line) -> list[float]:
    return [sample["reward"] for sample in line["samples"] if sample["reward"] is not None]


def _shown(reward: float) -> str:
    return "none" if np.isnan(reward) else f"{reward:.3g}"
