"""Training steps of jaxchat, measured; `train.py` runs `measure` in a process of its own.

The step, its optimizer, its donated state on the mesh and the way of a batch to the devices are pretraining's own
(`jaxchat/stages/training.py`).
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
LEAST = 3  # steps of a window, however long they take
COMPILED = "/jax/core/compile/backend_compile_duration"  # also when it came from the cache
FROM_CACHE = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Work:
    """One line of the table; `experiment.data.path` is None for random tokens.

    A window is `steps` steps, fewer if they take longer than `seconds`. With `fit`, rows are halved and micro-batches
    doubled until the step fits into memory. With `cached`, compiled programs are kept as launch.py keeps them. With
    `only_first`, all ends with the first step.
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
    """The figures of one model, or `{"error": one line}` if it is refused or does not fit.

    Args:
      began: when this process was started, by `time.time()`.
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
        gc.collect()  # what was on the device


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
    check(work.devices in (None, here), f"--devices {work.devices}: {here} can be used here; choose no more")
    times["data"] = time.time()
    workspace, tokens = _workspace(work, directory)
    model, source = _model_and_batches(workspace)
    total = 1 + WARM_UP + 2 * work.steps * work.windows  # the most there can be
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

    state, warm, _ = _window(step, state, source, WARM_UP)
    count = max(LEAST, min(work.steps, int(work.seconds / statistics.median(warm))))
    kept: list[dict] = []
    if workspace.experiment.data.path is not None:
        source.iterator = _keep(source.iterator, kept)
    before = len(compilations)
    windows: dict[str, list[list[float]]] = {"": [], "ready_": []}
    for _ in range(work.windows):
        state, window, metrics = _window(step, state, source, count)
        windows[""].append(window)
        if kept:
            # The same batches once more, now without reading, tokenizing and packing them.
            state, window, metrics = _window(step, state, Batches(workspace, source.plan, iter(kept)), count)
            windows["ready_"].append(window)
            kept.clear()
    for name, measured in windows.items():
        figures |= _speeds(name, measured, tokens) if measured else {}
    if windows["ready_"]:
        # Of means: the loader may be late at a few steps only.
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
    """A workspace for so many rows and micro-batches, and the tokens of its step."""
    from jaxchat.devices.mesh import make_mesh
    from jaxchat.stages.workspace import Workspace

    experiment = work.experiment
    mesh = make_mesh(experiment.mesh).shape
    tokens = work.accumulation * work.rows * mesh["data"] * mesh["fsdp"] * experiment.model.sequence_len
    pretrain = dataclasses.replace(experiment.pretrain, batch_tokens=tokens, device_rows=work.rows)
    return Workspace(dataclasses.replace(experiment, pretrain=pretrain), Path(directory) / "run", say=say), tokens


def _model_and_batches(workspace):
    """The model, and a source of random batches, or of the loader's with a tokenizer trained on the text or brought."""
    from jaxchat.data.text.shards import find_text
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


def _window(step, state, source, count: int):
    """Runs `count` steps as the training loop does, each dispatched before the metrics of the last one are read.

    Returns the state, the seconds of each step, and the last metrics; the device has been waited for.
    """
    import jax

    times, waiting = [], []
    before = time.perf_counter()
    for index in range(count + 1):
        if index < count:
            batch, _ = source.next_batch(index, state["params"])
            state, metrics = step(state, batch)
            waiting.append(metrics)
        if len(waiting) > 1 or index == count:
            metrics = jax.device_get(waiting.pop(0))
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return state, times, metrics


def _speeds(prefix: str, windows: list[list[float]], tokens: int) -> dict[str, Any]:
    """From the seconds of each step, window by window."""
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
    """What the arrays of `tree` take on the device that holds most of them: their shards, as they lie there."""
    import jax

    held: Counter = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values())


def compiled_bytes(memory) -> int:
    """What a compiled step takes by XLA's analysis: its state and batch, what it returns, and what it needs between."""
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + memory.temp_size_in_bytes


def device_memory_bytes() -> int | None:
    """What JAX may take of a device's memory; None where that is not limited."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def check_fits(needed: int | None, limit: int | None) -> None:
    """Raises TooLarge before a step is run that cannot be: it would take its time to fail."""
    if needed and limit and needed > limit:
        raise TooLarge(f"a step needs {needed / (1 << 30):.1f} GiB of {limit / (1 << 30):.1f} GiB")
