"""Compares the sizes that are proposed for a text with a small grid around them, each run as long as the others.

    python benchmarks/proposal.py DIR                                # as long as the proposal itself takes
    python benchmarks/proposal.py DIR --seconds 60 --json FILE       # sizes proposed for so many seconds of steps
    python benchmarks/proposal.py DIR --seconds 40 --by flops        # equal FLOPs, for a machine that others use too

The grid changes one size of the proposal at a time: the depth, the vocabulary, the batch. A smaller model reads the
text more often in the same time. Each run is a tokenizer and a pretraining as launch.py does them, whose number of
steps follows from the speed of its first ones. Compiling, evaluations and checkpoints do not count. Bits per byte are
those of the whole validation text, which is comparable across vocabularies.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import say, table

from jaxchat.config import DataConfig, Experiment, Impossible, ModelConfig
from jaxchat.data.text.folder import find_text
from jaxchat.devices.compile_cache import keep_compiled
from jaxchat.devices.mesh import data_shards, make_mesh, set_xla_flags
from jaxchat.errors import UserError
from jaxchat.planning.proposal import Proposal, flops_per_token, propose
from jaxchat.planning.settle import changes_of, replace_fields, training_speed
from jaxchat.planning.text_amount import TextAmount, measure_text
from jaxchat.runs.metrics import read_metrics
from jaxchat.stages import pretrain, tokenizer
from jaxchat.stages.workspace import Workspace

FIRST_STEPS = 12  # of which the speed is measured, the first ones left out
EVALUATIONS = 8
HEADINGS = ["sizes", "steps", "passes", "ms a step", "seconds", "bpb", "best seen", "to the best"]


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 2 for a folder that cannot be used."""
    options = _parser().parse_args(argv)
    set_xla_flags()
    keep_compiled()
    try:
        records = compare(options.folder, options.seconds, by_flops=options.by == "flops", most=options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table(HEADINGS, _rows(records))
    distance = records[0]["bpb"] / min(record["bpb"] for record in records) - 1
    print(f"the proposal is {distance:.2%} above the best of {len(records)}")
    if options.json:
        Path(options.json).write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of text, as for --data")
    add("--seconds", type=float, metavar="S", help="of training steps in each run (default: the proposal's own)")
    add("--by", choices=("time", "flops"), default="time", help="what is equal (default time)")
    add("--runs", type=int, default=100, metavar="N", help="the first N of the grid, the proposal included")
    add("--json", metavar="FILE", help="write all figures to FILE, one JSON object per line")
    return parser


def compare(folder: str, seconds: float | None, *, by_flops: bool, most: int) -> list[dict[str, Any]]:
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
    shards = data_shards(make_mesh(base.mesh))
    speed, on_cpu = training_speed()
    place: dict[str, Any] = {"shards": shards, "on_cpu": on_cpu}
    proposal = propose(amount, None if seconds is None else seconds * speed, **place)
    say(f"{amount.bytes / 1e6:,.1f} MB; proposed {_name(proposal)}")
    with tempfile.TemporaryDirectory() as scratch:
        step = _step_seconds(base, proposal, scratch)
        if seconds is not None:  # once more, with the speed that was measured
            speed = proposal.batch_tokens * _flops(proposal) / step
            again = propose(amount, seconds * speed, **place)
            step = step if again == proposal else _step_seconds(base, again, scratch)
            proposal = again
        else:
            seconds = proposal.steps * step
        flops = seconds / step * proposal.batch_tokens * _flops(proposal)
        records = []
        for one in list(_grid(proposal, amount, place))[:most]:
            try:
                step = _step_seconds(base, one, scratch)
                each = one.batch_tokens * _flops(one) * seconds / flops if by_flops else step
                steps = max(1, round(seconds / each))
                if one is proposal:
                    steps = min(steps, proposal.steps)  # it may end before the time does
                record = _train(base, dataclasses.replace(one, steps=steps), scratch)
            except (UserError, Impossible) as error:
                say(f"{_name(one)}: {error}")
                continue
            records.append({"name": _name(one), "proposed": one is proposal, "step_seconds": step, **record})
            say(f"{_name(one)}: {record['bpb']:.4f}")
        return records


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


def _name(proposal: Proposal) -> str:
    return (
        f"d{proposal.depth}, vocabulary {proposal.vocab_size:,}, context {proposal.sequence_len:,}, batch "
        f"{proposal.batch_tokens:,}"
    )


def _step_seconds(base: Experiment, proposal: Proposal, scratch: str) -> float:
    """The median of the first steps."""
    lines = _run(base, dataclasses.replace(proposal, steps=FIRST_STEPS), scratch, evaluations=0)
    return statistics.median([line["step_seconds"] for line in lines if "step_seconds" in line][FIRST_STEPS // 3 :])


def _train(base: Experiment, proposal: Proposal, scratch: str) -> dict[str, Any]:
    """What a whole training gives."""
    lines = _run(base, proposal, scratch, evaluations=EVALUATIONS)
    scores = [line["bpb"] for line in lines if "bpb" in line]
    times = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return {
        **dataclasses.asdict(proposal),
        **{"passes": proposal.passes, "seconds": statistics.median(times) * proposal.steps},
        **{"bpb": scores[-1], "best_bpb": min(scores), "curve": scores},
    }


def _run(base: Experiment, proposal: Proposal, scratch: str, *, evaluations: int) -> list[dict[str, Any]]:
    """Trains once; returns the lines of its metrics."""
    experiment = replace_fields(base, changes_of(proposal, base))
    every = max(1, proposal.steps // evaluations) if evaluations else 0
    longest = 10_000_000 if evaluations else proposal.batch_tokens
    changes = {"eval_every": every, "eval_tokens": longest, "sample_every": 0, "save_every": 0}
    experiment = replace_fields(experiment, {f"pretrain.{name}": value for name, value in changes.items()})
    with tempfile.TemporaryDirectory(dir=scratch) as folder, contextlib.redirect_stderr(io.StringIO()):
        workspace = Workspace(experiment, Path(folder) / "run", say=lambda line: None)
        tokenizer.run(workspace)
        workspace.begin("pretrain")
        pretrain.run(workspace)
        return read_metrics(workspace.directory.path)


def _rows(records: list[dict[str, Any]]) -> list[list[str]]:
    best = min(record["bpb"] for record in records)
    return [
        [
            record["name"] + (" (proposed)" if record["proposed"] else ""),
            *(f"{record['steps']:,}", f"{record['passes']:.1f}", f"{1000 * record['step_seconds']:.1f}"),
            *(f"{record['seconds']:.0f}", f"{record['bpb']:.4f}", f"{record['best_bpb']:.4f}"),
            f"{record['bpb'] / best - 1:+.2%}",
        ]
        for record in records
    ]


if __name__ == "__main__":
    sys.exit(main())
