"""Compares the sizes that are proposed for a text with a small grid around them, each run as long as the others.

    python benchmarks/proposal.py DIR --json FILE                    # as long as the proposal itself takes
    python benchmarks/proposal.py DIR --seconds 60                   # sizes proposed for so many seconds of steps
    python benchmarks/proposal.py DIR --by flops                     # equal FLOPs, for a machine that others use too
    python benchmarks/proposal.py DIR --flops 3e16 --only 0 2 4      # a part of the grid, the rest on another device

The grid changes one size of the proposal at a time: the depth, the vocabulary, the batch. Number 0 is the proposal
itself. A smaller model reads the text more often in the same time. Each run is a pretraining as launch.py does it,
whose number of steps follows from the speed of its first ones. Compiling, evaluations and checkpoints do not count.
Bits per byte are those of the whole validation text, which is comparable across vocabularies. `to the best` is the
distance to the best last score, `to its best` that to the best one seen in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from timing import say, table

from jaxchat.config import DataConfig, Experiment, Impossible, ModelConfig
from jaxchat.data.text.folder import find_text
from jaxchat.devices.compile_cache import keep_compiled
from jaxchat.devices.mesh import data_shards, make_mesh, set_xla_flags
from jaxchat.errors import UserError, check
from jaxchat.planning.proposal import Proposal, flops_per_token, propose
from jaxchat.planning.settle import changes_of, replace_fields, training_speed
from jaxchat.planning.text_amount import TextAmount, measure_text
from jaxchat.runs.metrics import read_metrics
from jaxchat.runs.time_budget import TimeBudget
from jaxchat.stages import pretrain, tokenizer
from jaxchat.stages.workspace import Workspace

FIRST_STEPS = 24  # of which the speed is measured, the first ones left out
EVALUATIONS = 8
HEADINGS = ["number", "sizes", "steps", "passes", "ms a step", "seconds", "bpb", "to the best", "to its best"]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 for a folder that cannot be used."""
    options = _parser().parse_args(argv)
    set_xla_flags()
    keep_compiled()
    records = []
    try:
        with contextlib.ExitStack() as files:
            file = files.enter_context(open(options.json, "w")) if options.json else None
            for record in compare(options.folder, options):
                records.append(record)
                result = f"{record['bpb']:.4f} after {record['all_seconds']:.0f} s in all"
                say(f"{record['number']}: {record['name']}: {result}")
                if file:
                    print(json.dumps(record), file=file, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table(HEADINGS, _rows(records))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of text, as for --data")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, metavar="S",
        help="of training steps in each run (default: the proposal's own)")  # fmt: skip
    length.add_argument("--flops", type=float, metavar="N",
        help="FLOPs of the proposal's run, which then does not depend on the speed that is measured")  # fmt: skip
    add("--by", choices=("time", "flops"), default="time", help="what is equal (default time)")
    add("--only", type=int, nargs="+", metavar="N", help="numbers of the grid, in the order to run them (default all)")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per line, as each run ends")
    return parser


def compare(folder: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trains the proposal and the grid; a record for each, the proposal's first.

    Raises:
      UserError: text that cannot be used.
    """
    base = Experiment(
        name="proposal",
        sizes="auto",
        stages=("tokenizer", "pretrain"),
        data=DataConfig(path=os.path.abspath(folder), shuffle=True),
    )
    text = find_text(folder)
    amount = measure_text(text.train, say=say)
    place: dict[str, Any] = {"shards": data_shards(make_mesh(base.mesh)), "on_cpu": jax.default_backend() == "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        flops = options.flops if options.seconds is None else options.seconds * training_speed()[0]
        proposal = propose(amount, flops, **place)
        if options.seconds is not None:  # once more, with the speed that its steps have
            speed = proposal.batch_tokens * _flops(proposal) / _step_seconds(base, proposal, scratch)
            proposal = propose(amount, options.seconds * speed, **place)
        say(f"{amount.bytes / 1e6:,.1f} MB; proposed {_name(proposal)}, {proposal.steps:,} steps")
        step = _step_flops if options.by == "flops" else lambda one: _step_seconds(base, one, scratch)
        length = proposal.steps * step(proposal)
        grid = list(_grid(proposal, amount, place))
        for number in options.only or range(len(grid)):
            check(0 <= number < len(grid), f"--only has {number}; the grid has the numbers 0 to {len(grid) - 1}")
            one, began = grid[number], time.perf_counter()
            try:
                steps = proposal.steps if one is proposal else max(1, round(length / step(one)))
                record = _train(base, dataclasses.replace(one, steps=steps), scratch)
            except (UserError, Impossible) as error:  # too large for the memory, for example
                say(f"{number}: {_name(one)}: {error}")
                continue
            yield {"number": number, "name": _name(one), **record, "all_seconds": time.perf_counter() - began}


def _grid(proposal: Proposal, amount: TextAmount, place: dict[str, Any]) -> Iterator[Proposal]:
    """The proposal, and others that differ from it in one size."""
    yield proposal
    depth, stride = proposal.depth, 1 if proposal.depth < 8 else 2
    sizes = {"vocab_size": proposal.vocab_size, "sequence_len": proposal.sequence_len}
    fixed = {**sizes, "batch_tokens": proposal.batch_tokens}
    for other in (depth - stride, depth + stride, depth + 2 * stride, depth - 2 * stride):
        with contextlib.suppress(Impossible):
            if other >= 1:
                ModelConfig(depth=other)
                yield propose(amount, fixed={**fixed, "depth": other}, **place)
    for other in (proposal.vocab_size // 2, 2 * proposal.vocab_size):
        if other in amount.bytes_per_token:
            yield propose(amount, fixed={**fixed, "depth": depth, "vocab_size": other}, **place)
    for other in (proposal.batch_tokens // 2, 2 * proposal.batch_tokens):
        if other >= proposal.sequence_len * place["shards"]:
            yield propose(amount, fixed={**sizes, "depth": depth, "batch_tokens": other}, **place)


def _flops(proposal: Proposal) -> int:
    return flops_per_token(proposal.depth, proposal.vocab_size, proposal.sequence_len)


def _step_flops(proposal: Proposal) -> int:
    return proposal.batch_tokens * _flops(proposal)


def _name(proposal: Proposal) -> str:
    return (
        f"d{proposal.depth}, vocabulary {proposal.vocab_size:,}, context {proposal.sequence_len:,}, batch "
        f"{proposal.batch_tokens:,}"
    )


def _step_seconds(base: Experiment, proposal: Proposal, scratch: str) -> float:
    """The median of the first steps."""
    lines = _run(base, dataclasses.replace(proposal, steps=FIRST_STEPS), scratch, evaluations=0)
    return statistics.median(_times(lines)[FIRST_STEPS // 3 :])


def _train(base: Experiment, proposal: Proposal, scratch: str) -> dict[str, Any]:
    """What a whole training gives."""
    lines = _run(base, proposal, scratch, evaluations=EVALUATIONS)
    scores, step = [line["bpb"] for line in lines if "bpb" in line], statistics.median(_times(lines))
    return {
        **dataclasses.asdict(proposal),
        **{"flops": proposal.steps * _step_flops(proposal), "passes": proposal.passes},
        **{"step_seconds": step, "seconds": step * proposal.steps},
        **{"bpb": scores[-1], "best_bpb": min(scores), "curve": scores},
    }


def _times(lines: list[dict[str, Any]]) -> list[float]:
    return [line["step_seconds"] for line in lines if "step_seconds" in line]


class _InSteps(Workspace):
    """A workspace whose budget counts steps in place of seconds.

    With a budget, rates come with the batches, and the number of steps is no part of the compiled program: the one that
    measures the speed is the one that trains.
    """

    def __init__(self, experiment: Experiment, directory: Path, steps: int):
        self.begun = 0  # steps
        budget = TimeBudget("", steps + 0.5, ["pretrain"], began=0, now=lambda: self.begun)  # shares are rounded
        super().__init__(experiment, directory, say=lambda line: None, budget=budget)

    def keep_time(self, every: float = 0.0) -> None:
        """Called as each step begins."""
        self.begun += 1


def _run(base: Experiment, proposal: Proposal, scratch: str, *, evaluations: int) -> list[dict[str, Any]]:
    """Trains once; returns the lines of its metrics."""
    gc.collect()  # of what the run before has left in memory
    experiment = replace_fields(base, changes_of(proposal, base))
    kept = Path(scratch) / f"tokenizer {proposal.vocab_size}"
    changes = {
        "pretrain.eval_every": max(1, proposal.steps // evaluations) if evaluations else 0,
        "pretrain.eval_tokens": 10_000_000 if evaluations else proposal.batch_tokens,
        "pretrain.sample_every": 0,
        "pretrain.save_every": 0,
        **({"tokenizer.path": str(kept)} if kept.exists() else {}),
    }
    experiment = replace_fields(experiment, changes)
    with tempfile.TemporaryDirectory(dir=scratch) as folder, contextlib.redirect_stderr(io.StringIO()):
        workspace = _InSteps(experiment, Path(folder) / "run", proposal.steps)
        tokenizer.run(workspace)
        if not kept.exists():
            shutil.copytree(workspace.directory.tokenizer, kept)
        workspace.begin("pretrain")
        assert workspace.budget, "it counts the steps"
        workspace.budget.begin("pretrain")
        pretrain.run(workspace)
        return read_metrics(workspace.directory.path)


def _rows(records: list[dict[str, Any]]) -> list[list[str]]:
    best = min((record["bpb"] for record in records), default=0.0)
    return [
        [
            *(str(record["number"]), record["name"] + ("" if record["number"] else " (proposed)")),
            *(f"{record['steps']:,}", f"{record['passes']:.1f}", f"{1000 * record['step_seconds']:.1f}"),
            *(f"{record['seconds']:.0f}", f"{record['bpb']:.4f}", f"{record['bpb'] / best - 1:+.2%}"),
            f"{record['bpb'] / record['best_bpb'] - 1:+.2%}",
        ]
        for record in records
    ]


if __name__ == "__main__":
    sys.exit(main())
