"""Measures what reinforcement learning teaches, and how sure that is.

    python benchmarks/rl.py proof runs/proof
    python benchmarks/rl.py objectives runs/objectives --run runs/d12 --tasks word_problems_2 --seconds 60

proof: the quickstart with several seeds of SFT and RL, from one model after midtraining. SFT is short and shows none of
the longer sums, so that many of them are wrong after it, and RL asks them most. The same held-out questions of all
tasks are asked before and after RL, greedily, more of them than the quickstart has. A change counts question by
question: with b questions that are answered right only after RL, and c only before it, z = (b - c) / sqrt(b + c)
(McNemar 1947).

objectives: RL from one model with one objective or advantage after the other, each for as long, and what the model
answers to the questions for validation before and after. The time is that of sampling and training, without the start,
the evaluations and the first batch, which compiles programs: as with a budget, the number of batches follows from how
long they take, and rates fall with the time.

The first argument is a folder for the runs; what is finished there is not done again.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from timing import run, table

from jaxchat.cli.experiments import load_experiment
from jaxchat.cli.options import configure
from jaxchat.config import Experiment
from jaxchat.data.synthetic import QUESTION_MAKERS
from jaxchat.data.synthetic.world import build_world
from jaxchat.devices.compile_cache import keep_compiled
from jaxchat.devices.mesh import set_xla_flags
from jaxchat.errors import UserError
from jaxchat.eval.changes import change_of
from jaxchat.runs.init_from import StartingModel, find_start, with_model_of
from jaxchat.runs.metrics import read_metrics
from jaxchat.runs.time_budget import TimeBudget
from jaxchat.stages import rl
from jaxchat.stages.init_from import place_start
from jaxchat.stages.workspace import Workspace

Scores = tuple[list[float], list[float]]  # of the same questions, before and after
LAUNCH = Path(__file__).parent.parent / "launch.py"
HARD = "long_sums"
LONG_SUM = re.compile(r"\b\d{4} [-+] \d{4}\b")
OTHERS = ("sums", "letters", "facts")
LEAST_RISE, LEAST_Z, MOST_CHANGE = 20.0, 5.0, 2.0  # percentage points, of the hard task and of each other one
PASS_K = 8  # answers to each question for validation, besides the greedy one
OBJECTIVES: dict[str, list[str]] = {
    "reinforce, centred": [],
    "reinforce, leave one out": ["--rl.advantage=leave_one_out"],
    "reinforce, standardised": ["--rl.advantage=standardised"],
    "reinforce, maximum likelihood": ["--rl.advantage=maximum_likelihood"],
    "best of n": ["--rl.method=best_of_n"],
    "clipped, 4 updates": ["--rl.method=clipped", "--rl.updates-per-batch=4"],
    "cispo, 4 updates": ["--rl.method=cispo", "--rl.updates-per-batch=4"],
    "gspo, 4 updates": ["--rl.method=gspo", "--rl.average=answers", "--rl.updates-per-batch=4"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 1 if the proof fails, 2 if a run does."""
    options = _parser().parse_args(argv)
    try:
        found = {"proof": prove, "objectives": compare}[options.work](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _write(options, found)
    return 0 if found.get("proven", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="work", required=True)
    proof = commands.add_parser("proof", help="several seeds of the quickstart", allow_abbrev=False)
    objectives = commands.add_parser("objectives", help="objectives and advantages at equal time", allow_abbrev=False)
    for add in (proof.add_argument, objectives.add_argument):
        add("directory", type=Path, metavar="DIR", help="folder for the runs")
        add("--json", metavar="FILE", help="write all figures to FILE")
    add = proof.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of SFT and RL (default 0 1 2)")
    add("--sft-steps", type=int, default=30, help="(default 30)")
    add("--rl-steps", type=int, default=16, help="(default 16)")
    add("--questions", type=int, default=400, help="held-out ones of each task, as far as there are (default 400)")
    add = objectives.add_argument
    add("--run", required=True, metavar="DIR", help="the run whose last model RL begins with")
    add("--experiment", default="d12", help="whose settings hold otherwise (default d12)")
    add("--data", metavar="DIR", help="the data folder, where the tasks need one")
    add("--tasks", nargs="+", required=True, help="that ask and reward")
    add("--seconds", type=int, default=60, help="of sampling and training in each run (default 60)")
    add("--questions", type=int, default=400, help="for validation, at most (default 400)")
    add("--max-new-tokens", type=int, help="of an answer (default: the experiment's)")
    add("--only", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), metavar="NAME", help="which objectives")
    return parser


def _write(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    if options.json:
        settings = {**vars(options), "date": date.today().isoformat()}
        Path(options.json).write_text(json.dumps({**settings, **found}, indent=1, default=str))


def _launch(name: str, *arguments: object) -> None:
    """Runs `launch.py`, which goes on where it was stopped."""
    run(name, [sys.executable, str(LAUNCH), *map(str, arguments)], dict(os.environ), None, show=True)


# --- proof ------------------------------------------------------------------------------------------------------------


def prove(options: argparse.Namespace) -> dict[str, Any]:
    """The changes of each task by seed, those of all seeds together, and whether they are as large as asked."""
    base, data = options.directory / "base", options.directory / "data"
    _launch("base", "--experiment=quickstart", f"--run-dir={base}", "--stages=tokenizer,pretrain,midtrain")
    if not data.exists():
        write_questions(base / "data", data, options.questions)
    answered: dict[int, dict[str, Scores]] = {}
    for seed in options.seeds:
        directory = options.directory / f"seed-{seed}"
        _launch(
            f"seed {seed}", "--experiment=quickstart", f"--init-from={base}", f"--run-dir={directory}",
            f"--data={data}", f"--seed={seed}", "--stages=sft,rl,evaluate", f"--sft.num-iterations={options.sft_steps}",
            f"--rl.num-iterations={options.rl_steps}", "--rl.eval-every=0", "--rl.eval-questions=50",
            "--rl.tasks", HARD, "sums:300", "letters:100", "facts",
            "--evaluate.of=sft,rl", f"--evaluate.limit={options.questions}",
        )  # fmt: skip
        answered[seed] = {task: scores(directory, task) for task in (HARD, *OTHERS)}
    groups = {**{str(seed): [found] for seed, found in answered.items()}, "all": list(answered.values())}
    found = {
        name: {task: change_of_all([one[task] for one in group]) for task in (HARD, *OTHERS)}
        for name, group in groups.items()
    }
    proven = all(map(holds, found.values()))
    head = ["seed", "task", "questions", "before", "after", "points", "wrong to right", "right to wrong", "z"]
    rows = [
        [name, task, one["count"], f"{one['before']:.1%}", f"{one['after']:.1%}", f"{_points(one):+.1f}",
         one["gained"], one["lost"], f"{one['z']:+.1f}"]
        for name, changes in found.items()
        for task, one in changes.items()
    ]  # fmt: skip
    table(head, rows)
    print(f"\n{HARD} rises by at least {LEAST_RISE:g} points with z above {LEAST_Z:g}, and every other task changes by "
          f"at most {MOST_CHANGE:g} points, with each seed: {'yes' if proven else 'no'}")  # fmt: skip
    return {"seeds": found, "proven": proven}


def write_questions(generated: Path, folder: Path, count: int) -> None:
    """A data folder of the generated conversations, without longer sums, and up to `count` test questions a task."""
    seed = load_experiment("quickstart").seed
    shutil.copytree(generated, folder, ignore=shutil.ignore_patterns("pretrain", "complete"))
    chats = folder / "chat" / "train.jsonl"
    lines = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    chats.write_text("".join(line for line in lines if not LONG_SUM.search(line)), encoding="utf-8")
    for name, make in QUESTION_MAKERS.items():
        items = make(build_world(seed), random.Random(f"{name} test {seed}"), "test", count)
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (folder / "eval" / name / "test.jsonl").write_text(lines, encoding="utf-8")


def scores(directory: Path, task: str) -> Scores:
    """The scores of each question before and after RL."""
    found = []
    for stage in ("sft", "rl"):
        with (directory / "evaluate" / stage / f"{task}.jsonl").open(encoding="utf-8") as lines:
            found.append([json.loads(line)["score"] for line in lines])
    return found[0], found[1]


def change_of_all(answered: Sequence[Scores]) -> dict[str, float]:
    """`change_of` the questions of several seeds together."""
    before, after = ([score for one in answered for score in one[side]] for side in (0, 1))
    return change_of(before, after)


def holds(found: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the hard task rises as far and as surely as asked, and the others stay where they were."""
    hard = found[HARD]
    stays = all(abs(_points(found[task])) <= MOST_CHANGE for task in OTHERS)
    return stays and _points(hard) >= LEAST_RISE and hard["z"] > LEAST_Z


def _points(change: Mapping[str, float]) -> float:
    """In percent, without the rounding of the shares."""
    return round(100 * (change["after"] - change["before"]), 6)


# --- objectives at equal time -----------------------------------------------------------------------------------------


class BatchTime(TimeBudget):
    """A budget for the batches of RL alone, and not for the first of them, which compiles programs.

    Its clock stands still until that one is asked for: what is evaluated before costs nothing.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        super().__init__(f"{seconds:g}s", seconds, ["rl"], began=0.0, now=lambda: self._since(0))
        self._clock = clock
        self._asked: list[float] = []  # when each batch was

    def batch(self) -> None:
        """Called as a batch is asked for."""
        self._asked.append(self._clock())

    def _since(self, number: int) -> float:
        return self._clock() - self._asked[number] if number < len(self._asked) else 0.0

    def left_of(self, stage: str) -> float:
        return self.seconds - self._since(1)


class _Timed(Workspace):
    """A workspace with a budget for batches."""

    def __init__(self, experiment: Experiment, directory: Path, seconds: float):
        self._time, self._updates = BatchTime(seconds), 0
        super().__init__(experiment, directory, say=functools.partial(print, flush=True), budget=self._time)

    def keep_time(self, every: float = 0.0) -> None:
        """Called as each update begins."""
        if self._updates % self.experiment.rl.updates_per_batch == 0:
            self._time.batch()
        self._updates += 1


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """What each objective made of the same model in the same time, by name."""
    set_xla_flags()
    keep_compiled()
    start, found = find_start(options.run), {}
    for name in options.only:
        directory = options.directory / name.replace(", ", "-").replace(" ", "_")
        if not (directory / "done.json").exists():
            shutil.rmtree(directory, ignore_errors=True)  # what was stopped has not had its time in one piece
            seconds = _reinforce(options, name, start, directory)
            (directory / "done.json").write_text(json.dumps(seconds))
        seconds = json.loads((directory / "done.json").read_text())
        found[name] = {**result(_lines(directory)), "seconds": seconds}
        _write(options, {"objectives": found})  # what follows takes minutes, and may be stopped
    best = f"pass@{PASS_K}"
    head = ["", "batches", "updates", "seconds", "pass@1, before", "after", "95 %", "z", "greedy"]
    head += [f"{best}, before", "after"]
    rows = [
        [name, one["batches"], one["updates"], f"{one['seconds']:.1f}", _percent(one["before"]["pass_1"]),
         _percent(one["after"]["pass_1"]),
         f"{100 * one['after']['pass_1_low']:.1f} to {100 * one['after']['pass_1_high']:.1f}",
         f"{one['after']['pass_1_z']:+.1f}", _percent(one["after"]["greedy"]),
         *(_percent(one[when][f"pass_{PASS_K}"]) for when in ("before", "after"))]
        for name, one in found.items()
    ]  # fmt: skip
    print(f"\n{options.run}, {', '.join(options.tasks)}; up to {options.questions} questions for validation")
    table(head, rows)
    return {"objectives": found}


def _reinforce(options: argparse.Namespace, name: str, start: StartingModel, directory: Path) -> float:
    """RL for `options.seconds`, in `directory`; returns the seconds of all batches but the first."""
    gc.collect()  # of what the objective before has left in memory
    print(f"\n{name}", flush=True)
    settings = [
        "--data.download=", "--stages=rl", "--rl.tasks", *options.tasks, f"--rl.eval-questions={options.questions}",
        f"--rl.pass-k={PASS_K}", "--rl.eval-every=0", "--rl.save-every=0", "--rl.sample-every=0", *OBJECTIVES[name],
        *([] if options.max_new_tokens is None else [f"--rl.max-new-tokens={options.max_new_tokens}"]),
    ]  # fmt: skip
    experiment = with_model_of(configure(options.experiment, settings, options.data, []), start, [])
    workspace = _Timed(experiment, directory, options.seconds)
    place_start(workspace, start)
    workspace.begin("rl")
    rl.run(workspace)
    steps = _steps(_lines(directory))
    counted = next((n for n, step in enumerate(steps) if n and "reward" in step), len(steps))
    return sum(step["step_seconds"] for step in steps[counted:])


def result(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the metrics of a stage say: its evaluations before and after, and how many batches and updates it had."""
    evaluations, steps = [dict(line) for line in lines if "pass_1" in line], _steps(lines)
    return {
        "batches": sum("reward" in line for line in steps),
        "updates": len(steps),
        "before": evaluations[0],
        "after": evaluations[-1],
    }


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(directory) if line["stage"] == "rl"]


def _steps(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if "step_seconds" in line]


def _percent(share: float) -> str:
    return f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(main())
