"""Measures how much saving a checkpoint slows down training.

    python benchmarks/checkpoints.py --experiment=d12
    python benchmarks/checkpoints.py --experiment=quickstart --windows=5 --directory=/mnt/disk

Runs windows of steps on random tokens, alternately without a save and with one after the first step, as in the training
loop: the state is copied on the devices before the next step consumes it, and threads move the copy to the host and
write it while training continues. The cost of a save is the extra time of a window that has one; a window lasts longer
than the writing. The longest step of a window shows how late a step's metrics arrive: by then the next step is on the
device. All figures are medians over the windows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from timing import say

from jaxchat.checkpoint import Checkpoints
from jaxchat.cli.launch import prepare_jax
from jaxchat.cli.options import configure
from jaxchat.cli.parser import option_strings
from jaxchat.devices.machine import machine_info
from jaxchat.errors import UserError, check
from jaxchat.stages.training import Training, fresh_params, random_batches
from jaxchat.stages.workspace import Workspace, planned_model
from jaxchat.train.step import State

WARM_UP = 3
SHARE = 0.05  # the share of training time that saves may take


class Window(NamedTuple):
    """Seconds of all steps, of the longest step, of the save's calls, and until the save is written."""

    seconds: float
    longest: float
    called: float
    written: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--experiment", default="d12", help="whose pretraining to measure; its fields can follow (default d12)"
    )
    parser.add_argument("--windows", type=int, default=5, metavar="N", help="windows of each kind (default 5)")
    parser.add_argument(
        "--directory", help="where the checkpoints are written (default: the system's temporary folder)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    options, overrides = parser.parse_known_args()
    try:
        experiment = configure(options.experiment, overrides, None, option_strings(parser))
        prepare_jax()
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            figures = measure(experiment, Path(folder), options.windows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))
    return 0


def measure(experiment, folder: Path, windows: int) -> dict:
    """Milliseconds of a step and of a save's calls, and the time a save adds to training."""
    check(experiment.pretrain.save_every > 0, "--pretrain.save-every must be at least 1: the cost is a share of it")
    data = dataclasses.replace(experiment.data, path=None, generate=True)  # never written: the tokens are random
    workspace = Workspace(dataclasses.replace(experiment, data=data), folder / "run", say=say)
    model = planned_model(experiment)
    training = Training(workspace, "pretrain", experiment.pretrain, model, None, 1_000_000)
    source = random_batches(workspace, model)
    state, step = training.compiled(lambda: fresh_params(workspace, model), source)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def window(state, count: int, number: int | None) -> tuple[State, Window]:
        """Runs `count` steps, with a save after the first one if `number` is given."""
        ends, called = [time.perf_counter()], 0.0

        def call(work: Callable, *args: Any, **settings: Any) -> Any:
            nonlocal called
            before = time.perf_counter()
            result = work(*args, **settings)
            called += time.perf_counter() - before
            return result

        before = copy = None
        for index in range(count):
            batch, _ = source.next_batch(index, state["params"])
            state, metrics = step(state, batch)
            if index == 0 and number is not None:
                copy = call(checkpoints.copy, state)
                if copy is None:
                    jax.device_get(metrics)
                    call(checkpoints.save, number, state, data=source.plan.__dict__, meta={})
            if before is not None:
                jax.device_get(before)
                ends.append(time.perf_counter())
                if copy is not None:
                    call(checkpoints.save, number, copy, data=source.plan.__dict__, meta={}, is_copy=True)
                    copy = None
            before = metrics
        jax.device_get(before)
        ends.append(time.perf_counter())
        checkpoints.wait()
        longest = max(end - begin for begin, end in itertools.pairwise(ends))
        return state, Window(ends[-1] - ends[0], longest, called, time.perf_counter() - ends[0])

    plain, saving = [], []
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        state, _ = window(state, WARM_UP, None)
        state, warm = window(state, WARM_UP, None)
        state, first = window(state, WARM_UP, 1)  # mostly without steps beside it
        # Enough steps that the writing ends within them, even if they make it take half as long again.
        count = max(5, round(2 * first.written / (warm.seconds / WARM_UP)))
        for number in range(windows):
            for kind, saved in ((plain, None), (saving, number + 2)):
                state, one = window(state, count, saved)
                kind.append(one)
            say(f"{count} steps: {plain[-1].seconds:.2f} s, with a save {one.seconds:.2f}, its calls {one.called:.3f}")

    def median(windows: list[Window], part: str) -> float:
        return 1000 * statistics.median(getattr(one, part) for one in windows)

    ms = median(plain, "seconds") / count
    cost = median(saving, "seconds") - median(plain, "seconds")
    return {
        "experiment": experiment.name,
        "state_bytes": size,
        "step_ms": ms,
        "steps_of_a_window": count,
        "call_ms": median(saving, "called"),
        "call_share": median(saving, "called") / ms,
        "longest_step_ms": median(plain, "longest"),
        "longest_step_with_save_ms": median(saving, "longest"),
        "cost_ms": cost,
        "cost_ms_by_window": [1000 * (b.seconds - a.seconds) for a, b in zip(plain, saving, strict=True)],
        "save_every": experiment.pretrain.save_every,
        "share": cost / (experiment.pretrain.save_every * ms),
        "least_save_every": max(1, -int(-cost // (SHARE * ms))),
        "machine": machine_info(),
    }


def table(figures: dict) -> str:
    lines = [
        ("size of the state", f"{figures['state_bytes'] / 2**30:.2f} GiB"),
        ("one step", f"{figures['step_ms']:.1f} ms"),
        ("longest step of a window", f"{figures['longest_step_ms']:.1f} ms"),
        ("longest step of a window with a save", f"{figures['longest_step_with_save_ms']:.1f} ms"),
        ("a save: its calls on the host, while the device is busy", f"{figures['call_ms']:.1f} ms"),
        ("the same, as a share of a step", f"{figures['call_share']:.1%}"),
        (f"a save: time added to {figures['steps_of_a_window']} steps", f"{figures['cost_ms']:.0f} ms"),
        (f"the same, as a share of {figures['save_every']:,} steps (save-every)", f"{figures['share']:.2%}"),
        (f"saves take {SHARE:.0%} of the time if made every", f"{figures['least_save_every']:,} steps"),
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines)
    return f"| {figures['experiment']} | {figures['machine']['device_kind']} |\n| --- | ---: |\n{rows}"


if __name__ == "__main__":
    sys.exit(main())
