"""An experiment's stages, one after another: finished ones are skipped, an unfinished one goes on where it stopped."""

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
from jaxchat.train.budget import batch_plan

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
    """Finds before the first stage what would stop a later one, hours into the run.

    Raises:
      UserError: a batch or mesh that does not divide, an unknown task, a stage without a model to evaluate, a
        vocabulary or seed out of range, an unknown data set.
    """
    check(0 <= experiment.seed < 1 << 31, f"seed is {experiment.seed}; it must lie between 0 and {(1 << 31) - 1}")
    vocabulary = experiment.tokenizer.vocab_size
    check(
        vocabulary >= MIN_VOCAB,
        f"tokenizer.vocab-size is {vocabulary}; it must be at least {MIN_VOCAB}: the bytes and the special tokens",
    )
    with _told("data.download"):
        parse_requests(experiment.data.download)
    mesh = make_mesh(experiment.mesh)
    batch_share(mesh)
    if not set(TRAINED).isdisjoint(experiment.stages):
        for_training(experiment)
    for stage in experiment.stages:
        if stage in ("pretrain", "midtrain", "sft"):
            config = getattr(experiment, stage)
            with _told(stage):
                batch_plan(config.batch_tokens, config.device_rows, experiment.model.sequence_len, data_shards(mesh))
        if stage in ("midtrain", "sft"):
            with _told(f"{stage}.mixture"):
                parse_mixture(getattr(experiment, stage).mixture)
        if stage in ("rl", "evaluate"):
            with _told(f"{stage}.tasks"):
                check_scorable(getattr(experiment, stage).tasks)
    for stage in experiment.evaluate.of:
        check(stage in TRAINED, f"evaluate.of names {stage!r}; the stages with a model are {', '.join(TRAINED)}")


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Says which setting a UserError is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_stages(workspace: Workspace) -> None:
    """Runs the experiment's stages in the workspace's directory."""
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in workspace.mesh.shape.items())
    kernel = attention_kernel(workspace.dtype, workspace.experiment.model.head_dim)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    workspace.say(
        f"devices   {jax.device_count()} x {device.device_kind}{processes} ({shape}), "
        f"computing in {jnp.dtype(workspace.dtype).name}, attention by {kernel}"
    )
    workspace.say(f"run       {workspace.directory}")
    for stage in workspace.experiment.stages:
        if stage != "report" and workspace.finished(stage):
            workspace.say(f"{stage:<9} finished before; skipped")
            continue
        began = time.perf_counter()
        RUNNERS[stage](workspace)
        workspace.say(f"{stage:<9} finished in {time.perf_counter() - began:,.0f} s")
