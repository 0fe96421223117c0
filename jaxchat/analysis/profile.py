"""Runs a few training steps under the profiler to show where a step's time goes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import jax

from jaxchat.analysis.trace import Breakdown, Program, break_down, read_trace
from jaxchat.config import Experiment
from jaxchat.errors import UserError, check
from jaxchat.stages.training import Training, fresh_params, random_batches
from jaxchat.stages.workspace import Workspace, planned_model

WARM_UP = 3
LONGEST = 10
NAME_LENGTH = 60  # of a kernel; a library's can be a whole C++ type


def profile(experiment: Experiment, *, steps: int, directory: Path) -> None:
    """Pretrains on random tokens for `steps` steps, keeps their trace in `directory`, and prints where the time went.

    Raises:
      UserError: the experiment's batch or mesh does not match the devices; the trace shows no kernels.
    """
    check(steps >= 1, f"--steps is {steps}; it must be at least 1")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be created ({error.strerror}); choose another --trace") from None
    data = dataclasses.replace(
        experiment.data, path=None, download=(), generate=True
    )  # never read: the tokens are random
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(dataclasses.replace(experiment, data=data), Path(folder) / "run")
        model = planned_model(experiment)
        # Random tokens need no tokenizer.
        training = Training(workspace, "pretrain", experiment.pretrain, model, None, WARM_UP + steps)  # pyright: ignore[reportArgumentType]
        source = random_batches(workspace, model)
        state, step = training.compiled(lambda: fresh_params(workspace, model), source)
        batch, _ = source.next_batch(0, state["params"])
        compiled = step.compile(batch).compiled

        def train(state, count: int):
            for _ in range(count):
                state, metrics = compiled(state, source.next_batch(0, state["params"])[0])
            jax.block_until_ready((state, metrics))
            return state

        state = train(state, WARM_UP)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(str(directory), profiler_options=options):
            train(state, steps)
    file = max(Path(directory).glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    program = Program.parse(compiled.as_text() or "")
    devices = read_trace(file, program)
    check(bool(devices), f"{file} shows no kernels of the step: the profiler does not support this device")
    device = jax.devices()[0].device_kind
    print(f"{experiment.name}: {steps} steps of {batch['inputs'].size:,} tokens on {jax.device_count()} x {device}\n")
    print(table(break_down(devices, program), program, len(devices) * steps))
    print(f"\ntrace: {file.parent}\nopen its .trace.json.gz at https://ui.perfetto.dev, "
          f"or: pip install xprof, xprof --logdir {directory}")  # fmt: skip


def table(breakdown: Breakdown, program: Program, steps: int) -> str:
    """Two Markdown tables, one of the parts and one of the longest kernels; the times add up `steps` steps."""

    def figures(time: float, count: int | None = None) -> str:
        kernels = "" if count is None else f"{count / steps:,.0f}"
        return f"{time / steps / 1e6:.3f} | {time / breakdown.span:.1%} | {kernels} |"

    count = sum(total.count for total in breakdown.parts.values())
    lines = ["| part of a step | ms | share | kernels |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {part} | {figures(total.time, total.count)}" for part, total in breakdown.parts.items()]
    if breakdown.overlap > 0.001 * breakdown.span:
        lines.append(f"| overlap with other kernels | {figures(-breakdown.overlap)}")
    lines += [f"| idle | {figures(breakdown.idle)}", f"| **a step** | {figures(breakdown.span, count)}"]
    lines += ["", "| kernel | part | ms | share | runs | HLO instruction, its place in the code |"]
    lines += ["| --- | --- | ---: | ---: | ---: | --- |"]
    longest = sorted(breakdown.kernels.items(), key=lambda item: -item[1].time)[:LONGEST]
    for (name, part), total in longest:
        op = total.ops.most_common(1)[0][0]
        path = next((f", {found.path}" for found in program.find(op, name) if found.path), "")
        more = f" and {len(total.ops) - 1} more" if len(total.ops) > 1 else ""
        name = name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH]}…"
        lines.append(f"| `{name}` | {part} | {figures(total.time, total.count)} {op}{more}{path} |")
    return "\n".join(lines)
