"""Trains one recipe of jaxchat and measures what it learns; `quality.py` calls `train` for each of its runs.

It is the pretraining of launch.py: its step, optimizer, batches and validation rows. Nothing is saved or sampled, so
that the devices do nothing but train and evaluate. `--pretrain.lr-fraction` comes with the batches: recipes that differ
in nothing else, like seeds, share one compiled program.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import hashlib
import io
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat_steps import run_steps

from jaxchat.config import Experiment
from jaxchat.planning.settle import replace_fields


def train(experiment: Experiment, at: Sequence[int], scratch: str) -> dict[str, Any]:
    """The seconds of each step, and the bits per byte after each number of steps in `at`, whose last ends the training.

    A training whose loss is no longer a number ends there: its last bits per byte are NaN.

    Args:
      scratch: a folder that keeps the tokenizers for other runs on the same text.

    Raises:
      UserError: the text, or the settings on this machine's devices, cannot be used.
    """
    import jax

    from jaxchat.devices.machine import machine_info, peak_memory_bytes
    from jaxchat.stages import tokenizer
    from jaxchat.stages.workspace import Workspace
    from jaxchat.train.budget import count_parameters

    gc.collect()  # of what the run before has left in the devices' memory
    experiment, kept = _with_tokenizer(experiment, Path(scratch))
    with tempfile.TemporaryDirectory(dir=scratch) as folder, contextlib.redirect_stderr(io.StringIO()):
        workspace = Workspace(experiment, Path(folder) / "run", say=lambda line: None)
        tokenizer.run(workspace)
        if not kept.exists():
            shutil.copytree(workspace.directory.tokenizer, kept)
        model = workspace.model_config(workspace.tokenizer())
        times, scores = _train(workspace, model, at)
    return {
        "times": times,
        "scores": scores,
        "parameters": count_parameters(model).total,
        "peak_memory_bytes": peak_memory_bytes(),
        "device": jax.devices()[0].device_kind,
        "machine": machine_info(),
    }


def _train(workspace, model, at: Sequence[int]) -> tuple[list[float], list[tuple[int, float]]]:
    from jaxchat.eval.bpb import evaluate_bpb
    from jaxchat.stages.pretrain import training_batches, validation_rows
    from jaxchat.stages.training import Training, fresh_params
    from jaxchat.stages.validation import in_batches

    experiment, tokenizer, text = workspace.experiment, workspace.tokenizer(), workspace.text()
    config = dataclasses.replace(experiment.pretrain, lr_fraction=1.0)
    training = Training(workspace, "pretrain", config, model, tokenizer, at[-1])
    batches = training_batches(workspace, tokenizer, text)
    source = _scaled(workspace, batches, experiment.pretrain.lr_fraction)
    validation = validation_rows(workspace, tokenizer, text)
    state, step = training.compiled(lambda: fresh_params(workspace, model), source)
    times: list[float] = []
    scores: list[tuple[int, float]] = []
    for before, after in zip((0, *at), at, strict=False):
        state, seconds, metrics = run_steps(step, state, source, after - before)
        times += seconds
        if not math.isfinite(metrics["loss"]):
            return times, [*scores, (after, math.nan)]
        rows = in_batches(validation, batches.plan.rows)
        bpb = evaluate_bpb(state["params"], model, rows, tokenizer.token_bytes(), compute=workspace.compute)
        scores.append((after, float(bpb)))
    return times, scores


def _scaled(workspace, batches, fraction: float):
    """The batches, with the factor on the learning rates of all steps."""
    from jaxchat.stages.pacing import Paced
    from jaxchat.train.horizon import Horizon

    horizon = Horizon(workspace.experiment.pretrain.schedule, lambda: math.inf)
    horizon.rates = collections.defaultdict(lambda: 1.0)
    return Paced(batches, horizon, workspace, fraction)


def _with_tokenizer(experiment: Experiment, scratch: Path) -> tuple[Experiment, Path]:
    """Where the tokenizer of its text is kept, and the experiment, which takes it from there once it is."""
    what = repr((experiment.tokenizer, experiment.data))
    kept = scratch / f"tokenizer-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    return replace_fields(experiment, {"tokenizer.path": str(kept)}) if kept.exists() else experiment, kept
