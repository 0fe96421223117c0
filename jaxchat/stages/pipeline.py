"""Runs an experiment's stages in order: finished ones are skipped, an unfinished one resumes where it stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxchat.config import Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.devices.mesh import batch_share, data_shards, make_mesh
from jaxchat.errors import UserError, check
from jaxchat.ops.attention import attention_kernel
from jaxchat.ops.compute import for_training
from jaxchat.runs.directory import TRAINED
from jaxchat.stages import evaluate, finetune, pretrain, report, rl, tokenizer
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import check_scorable, parse_mixture
from jaxchat.tokenizer import MIN_VOCAB
from jaxchat.train.budget import split_batch

RUNNERS = {
    "tokenizer": tokenizer.run,
    "pretrain": pretrain.run,
    "midtrain": lambda workspace: finetune.run(workspace, "midtrain"),
    "sft": lambda workspace: finetune.run(workspace, "sft"),
    "rl": rl.run,
    "evaluate": evaluate.run,
    "report": report.run,
}


def check_possible(experiment: Experiment) -> None:
    """Checks before the first stage what would otherwise stop a later one, hours into the run.

    Raises:
      UserError: a batch or mesh does not divide, a task or data set is unknown, a stage to evaluate has no model, or
        the vocabulary size or the seed is out of range.
    """
    check(0 <= experiment.seed < 1 << 31, f"seed is {experiment.seed}; it must be between 0 and {(1 << 31) - 1}")
    vocabulary = experiment.tokenizer.vocab_size
    check(
        vocabulary >= MIN_VOCAB,
        f"tokenizer.vocab-size is {vocabulary}; it must be at least {MIN_VOCAB}: the bytes and the special tokens",
    )
    with _naming("data.download"):
        parse_requests(experiment.data.download)
    mesh = make_mesh(experiment.mesh)
    batch_share(mesh)
    if not set(TRAINED).isdisjoint(experiment.stages):
        for_training(experiment)
    for stage in experiment.stages:
        if stage in ("pretrain", "midtrain", "sft"):
            config = getattr(experiment, stage)
            with _naming(stage):
                split_batch(config.batch_tokens, config.device_rows, experiment.model.sequence_len, data_shards(mesh))
        if stage in ("midtrain", "sft"):
            with _naming(f"{stage}.mixture"):
                parse_mixture(getattr(experiment, stage).mixture)
        if stage in ("rl", "evaluate"):
            with _naming(f"{stage}.tasks"):
                check_scorable(getattr(experiment, stage).tasks)
    for stage in experiment.evaluate.of:
        check(stage in TRAINED, f"evaluate.of names {stage!r}; the stages with a model are {', '.join(TRAINED)}")


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts the setting that a UserError is about before its message."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_stages(workspace: Workspace) -> None:
    """Runs the experiment's stages in the workspace's directory."""
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in workspace.mesh.shape.items())
    kernel = attention_kernel(workspace.compute.dtype, workspace.experiment.model.head_dim)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    workspace.say(
        f"devices   {jax.device_count()} x {device.device_kind}{processes} ({shape}), "
        f"computing in {jnp.dtype(workspace.compute.dtype).name}, attention by {kernel}"
    )
    workspace.say(f"run       {workspace.directory}")
    for stage in workspace.experiment.stages:
        workspace.set_aside_stale(stage)
        if evaluate.complete(workspace) if stage == "evaluate" else stage != "report" and workspace.finished(stage):
            workspace.say(f"{stage:<9} already finished; skipped")
            continue
        began = time.perf_counter()
        if stage not in ("evaluate", "report"):  # they make nothing that others are made of
            workspace.begin(stage)
        RUNNERS[stage](workspace)
        workspace.say(f"{stage:<9} finished in {time.perf_counter() - began:,.0f} s")
