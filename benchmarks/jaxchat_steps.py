"""Measures training steps of jaxchat; `train.py` runs `measure` in a separate process.

The step, the optimizer, the donated state on the mesh and the transfer of batches to the devices are those of
pretraining (`jaxchat/stages/training.py`).
"""

from __future__ import annotations

import dataclasses
import gc
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import say

from jaxchat.cli.launch import prepare_jax
from jaxchat.config import Experiment
from jaxchat.errors import UserError, check

WARM_UP = 3
LEAST = 3  # the fewest steps in a window, however long they take
COMPILED = "/jax/core/compile/backend_compile_duration"  # reported for programs from the cache too
FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the table; `experiment.data.path` is None for random tokens.

    A window has `steps` steps, or fewer if they take longer than `seconds`. With `fit`, rows are halved and
    micro-batches doubled until the step fits into memory. With `cached`, compiled programs are cached as launch.py
    caches them. With `only_first`, measuring ends after the first step.
    """

    experiment: Experiment
    devices: int | None
    rows: int
    accumulation: int
    steps: int
    windows: int
    seconds: float
    fit: bool
    cached: bool = False
    only_first: bool = False


class TooLarge(MemoryError):
    """A compiled step needs more memory than the device has."""


def measure(work: Work, began: float) -> dict[str, Any]:
    """The figures of one model, or `{"error": one line}` if its settings are rejected or it does not fit into memory.

    Args:
      began: `time.time()` when this process was started.
    """
    import jax

    from jaxchat.devices.mesh import set_xla_flags

    set_xla_flags()
    if work.cached:
        prepare_jax()
    while True:
        try:
            with tempfile.TemporaryDirectory() as directory:
                return _measure(work, began, directory)
        except UserError as error:
            return {"error": str(error)}
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            text = " ".join(str(error).split())
            if not isinstance(error, MemoryError) and not re.search("RESOURCE_EXHAUSTED|out of memory", text, re.I):
                raise
        if not work.fit or work.rows % 2:
            return {"error": f"out of memory: {text[:160]}"}
        say(f"{work.rows} rows, out of memory: {text[:160]}; halving them")
        work = dataclasses.replace(work, rows=work.rows // 2, accumulation=2 * work.accumulation)
        gc.collect()  # frees device memory


def _measure(work: Work, began: float, directory: str) -> dict[str, Any]:
    import jax

    from jaxchat.devices.machine import device_peak_flops, machine_info, peak_memory_bytes
    from jaxchat.stages.training import Batches, Training, fresh_params
    from jaxchat.train.budget import count_parameters, flops_per_token

    compilations: list[float] = []
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event == FROM_CACHE else None)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compilations.append(duration) if event == COMPILED else None
    )
    times = {"start": began}
    here = len(jax.devices())
    check(work.devices in (None, here), f"--devices {work.devices}: this machine has {here}; choose at most {here}")
    times["data"] = time.time()
    workspace, tokens = _workspace(work, directory)
    model, source = _model_and_batches(workspace)
    total = 1 + WARM_UP + 2 * work.steps * work.windows  # the most that can be needed
    training = Training(workspace, "pretrain", workspace.experiment.pretrain, model, None, total)
    times["init"] = time.time()
    state, step = training.prepare(lambda: fresh_params(workspace, model))
    batch, _ = source.next_batch(0, state["params"])
    jax.block_until_ready((state, batch))
    times["trace"] = time.time()
    lowered = step.lower(state, batch)
    times["compile"] = time.time()
    memory = lowered.compile().memory_analysis()
    needed = memory and compiled_bytes(memory)
    check_fits(needed, device_memory_bytes())
    times["first_step"] = time.time()
    held = bytes_per_device(state)
    state, metrics = step(state, batch)
    first_loss = float(metrics["loss"])
    times["end"] = time.time()
    names = list(times)
    machine = machine_info()
    figures = {
        **{f"{a}_seconds": times[b] - times[a] for a, b in zip(names, names[1:], strict=False)},
        "first_step_seconds_from_start": times["end"] - began,
        "compilations_until_then": len(compilations),
        "of_them_from_the_cache": len(hits),
        "compiling_seconds_until_then": sum(compilations),
        "rows": work.rows,
        "accumulation": work.accumulation,
        "devices": here,
        "mesh": dict(workspace.mesh.shape),
        "tokens_per_step": tokens,
        "parameters": count_parameters(model).total,
        "flops_per_token": flops_per_token(model),
        "state_bytes_per_device": held,
        "compiled_memory_bytes": needed,
        "machine": machine,
        "first_loss": first_loss,
    }
    if work.only_first:
        return figures

    state, warm, _ = run_steps(step, state, source, WARM_UP)
    count = max(LEAST, min(work.steps, int(work.seconds / statistics.median(warm))))
    kept: list[dict] = []
    if workspace.experiment.data.path is not None:
        source.iterator = _keep(source.iterator, kept)
    before = len(compilations)
    windows: dict[str, list[list[float]]] = {"": [], "ready_": []}
    for _ in range(work.windows):
        state, window, metrics = run_steps(step, state, source, count)
        windows[""].append(window)
        if kept:
            # The same batches again, this time without reading, tokenizing and packing them.
            state, window, metrics = run_steps(step, state, Batches(workspace, (source.plan,), iter(kept)), count)
            windows["ready_"].append(window)
            kept.clear()
    for name, measured in windows.items():
        figures |= _speeds(name, measured, tokens) if measured else {}
    if windows["ready_"]:
        # A ratio of means, since the loader may be late at only a few steps.
        ratio = figures["ready_tokens_per_second_mean"] / figures["tokens_per_second_mean"]
        figures["loader_cost_percent"] = 100 * (ratio - 1)
    peak = device_peak_flops(machine["device_kind"])
    rate = figures["tokens_per_second"] * figures["flops_per_token"] / here
    return {
        **figures,
        "steps": count,
        "windows": work.windows,
        "flops_per_second_per_device": rate,
        "mfu": rate / peak if peak else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "compilations_while_measuring": len(compilations) - before,
        "last_loss": float(metrics["loss"]),
    }


def _workspace(work: Work, directory: str):
    """A workspace for the rows and micro-batches of `work`, and the tokens per step."""
    from jaxchat.devices.mesh import make_mesh
    from jaxchat.stages.workspace import Workspace

    experiment = work.experiment
    mesh = make_mesh(experiment.mesh).shape
    tokens = work.accumulation * work.rows * mesh["data"] * mesh["fsdp"] * experiment.model.sequence_len
    pretrain = dataclasses.replace(experiment.pretrain, batch_tokens=tokens, device_rows=work.rows)
    return Workspace(dataclasses.replace(experiment, pretrain=pretrain), Path(directory) / "run", say=say), tokens


def _model_and_batches(workspace):
    """The model and a source of batches: random ones, or the loader's with a tokenizer trained on the text or given."""
    from jaxchat.data.text.folder import find_text
    from jaxchat.stages import tokenizer as tokenizer_stage
    from jaxchat.stages.pretrain import training_batches
    from jaxchat.stages.training import random_batches
    from jaxchat.stages.workspace import planned_model

    experiment = workspace.experiment
    if experiment.data.path is None:
        model = planned_model(experiment)
        return model, random_batches(workspace, model)
    tokenizer_stage.run(workspace)
    tokenizer = workspace.tokenizer()
    text = find_text(workspace.text_dir, experiment.data.val_shard)
    return workspace.model_config(tokenizer), training_batches(workspace, tokenizer, text)


def _keep(iterator: Iterator[dict], kept: list[dict]) -> Iterator[dict]:
    for batch in iterator:
        kept.append(batch)
        yield batch


def run_steps(step, state, source, count: int, first: int = 0):
    """Runs `count` steps as the training loop does, each dispatched before the metrics of the previous one are read.

    The first of them has the number `first`. Returns the state, the seconds of each step and the last metrics, once the
    device is done.
    """
    import jax

    times, waiting = [], []
    before = time.perf_counter()
    for index in range(count + 1):
        if index < count:
            batch, _ = source.next_batch(first + index, state["params"])
            state, metrics = step(state, batch)
            waiting.append(metrics)
        if len(waiting) > 1 or index == count:
            metrics = jax.device_get(waiting.pop(0))
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return state, times, metrics


def _speeds(prefix: str, windows: list[list[float]], tokens: int) -> dict[str, Any]:
    """Figures of speed from the seconds of each step in each window; `tokens` per step."""
    times = [seconds for window in windows for seconds in window]
    median, mean = statistics.median(times), statistics.fmean(times)
    return {
        f"{prefix}tokens_per_second": tokens / median,
        f"{prefix}tokens_per_second_mean": tokens / mean,
        f"{prefix}step_ms": 1000 * median,
        f"{prefix}window_step_ms": [1000 * statistics.fmean(window) for window in windows],
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def bytes_per_device(tree) -> int:
    """Bytes of the shards of `tree` on the device that holds the most."""
    import jax

    held: Counter = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def compiled_bytes(memory) -> int:
    """Bytes a compiled step needs by XLA's analysis: its inputs, its outputs, and its temporary memory."""
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + memory.temp_size_in_bytes


def device_memory_bytes() -> int | None:
    """Bytes of a device's memory that JAX may use; None where there is no limit."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def check_fits(needed: int | None, limit: int | None) -> None:
    """Raises TooLarge if a step cannot fit; running it would take a while to fail."""
    if needed and limit and needed > limit:
        raise TooLarge(f"a step needs {needed / (1 << 30):.1f} GiB, but {limit / (1 << 30):.1f} GiB are available")
