"""Runs an experiment's stages in order: finished ones are skipped, an unfinished one resumes where it stopped."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxchat.config import Experiment
from jaxchat.devices.mesh import batch_share, data_shards, make_mesh
from jaxchat.ops.attention import attention_kernel
from jaxchat.ops.compute import for_training
from jaxchat.runs.directory import TRAINED
from jaxchat.runs.init_from import STAGE as INIT_STAGE
from jaxchat.runs.init_from import StartingModel
from jaxchat.runs.progress import format_duration
from jaxchat.stages import evaluate, finetune, pretrain, report, rl, tokenizer
from jaxchat.stages.init_from import place_start
from jaxchat.stages.settings import check_settings, describe_programs, naming
from jaxchat.stages.workspace import Workspace, planned_model
from jaxchat.train.budget import check_length, plans_of_stage
from jaxchat.train.memory import OutOfMemory

LESS = 0.9  # of the memory that a step was to take and did not get, what the next may take
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
      UserError: as `check_settings`; a batch or mesh does not divide; pretraining would have no step, or too many.
    """
    check_settings(experiment)
    mesh = make_mesh(experiment.mesh)
    batch_share(mesh)
    if not set(TRAINED).isdisjoint(experiment.stages):
        for_training(experiment)
    for stage in ("pretrain", "midtrain", "sft"):
        if stage in experiment.stages:
            config = getattr(experiment, stage)
            with naming(stage):
                plans_of_stage(config, experiment.model.sequence_len, data_shards(mesh))
    if "pretrain" in experiment.stages:
        check_length(experiment.pretrain, planned_model(experiment))


def run_stages(workspace: Workspace, given: Collection[str] = (), start: StartingModel | None = None) -> None:
    """Runs the experiment's stages in the workspace's directory, after checking all data that they will read.

    Args:
      given: the fields of the experiment that the user has set: the tasks that they name must be there.
      start: the model of another run to start from; None for one from nothing.
    """
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in workspace.mesh.shape.items())
    kernel = attention_kernel(workspace.compute.dtype, workspace.experiment.model.head_dim, workspace.mesh)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    workspace.say(
        f"devices   {jax.device_count()} x {device.device_kind}{processes} ({shape}), "
        f"computing in {jnp.dtype(workspace.compute.dtype).name}, attention by {kernel}"
    )
    workspace.say(f"run       {workspace.directory}")
    if programs := describe_programs(workspace.experiment):
        workspace.say(f"programs  {programs}")
    workspace.check_data(_to_check(workspace, given), given)
    workspace.set_aside_redone()
    if start is not None and not workspace.finished(INIT_STAGE):
        place_start(workspace, start)
        workspace.check_data(_to_check(workspace, given), given)  # exactly now, as after the tokenizer stage
    if (budget := workspace.budget) is not None and budget.stages:
        budget.longest |= {"evaluate": evaluate.longest(workspace)} | finetune.longest(workspace)
        workspace.say(f"budget    {format_duration(budget.left)} left of {budget.text}: {budget.plan()}")
    try:
        _run_in_order(workspace, given)
    finally:
        workspace.keep_time(0)
    if budget is not None:
        budget.finished = True
        workspace.keep_time(0)
        workspace.say(f"budget    {format_duration(budget.spent)} of {format_duration(budget.seconds)} taken")


def _run_in_order(workspace: Workspace, given: Collection[str]) -> None:
    for stage in workspace.experiment.stages:
        workspace.set_aside_stale(stage)
        if evaluate.complete(workspace) if stage == "evaluate" else stage != "report" and workspace.finished(stage):
            workspace.say(f"{stage:<9} already finished; skipped")
            continue
        began, budget = time.perf_counter(), workspace.budget
        if stage not in ("evaluate", "report"):  # they make nothing that others are made of
            workspace.begin(stage)
        if budget is not None:
            budget.begin(stage)
            workspace.keep_time(0)
        _run_stage(workspace, stage)
        if budget is not None:
            budget.end(stage)
        if stage == "tokenizer":
            workspace.check_data(_to_check(workspace, given), given)  # exactly now: tokens can be counted
        left = "" if budget is None else f"; {format_duration(max(0.0, budget.left))} left of {budget.text}"
        workspace.say(f"{stage:<9} finished in {time.perf_counter() - began:,.0f} s{left}")


def _run_stage(workspace: Workspace, stage: str) -> None:
    """Runs a stage, again with a smaller step where the one that was chosen has no room in its memory after all."""
    try:
        RUNNERS[stage](workspace)
        return
    except OutOfMemory as error:
        config = getattr(workspace.experiment, stage)
        if jax.process_count() > 1 or config.device_rows != "auto":  # the others would wait for this process
            raise
        workspace.say(f"{stage:<9} {error}; now with less")
        workspace.most_bytes = int(LESS * error.total)
    gc.collect()  # of what the stage has left in memory
    _run_stage(workspace, stage)


def _to_check(workspace: Workspace, given: Collection[str]) -> list[str]:
    """The stages that are not finished; evaluation also if the user names its tasks, which can be others each time."""
    named = {"evaluate"} if not {"evaluate.tasks", "evaluate.humaneval"}.isdisjoint(given) else set()
    return [stage for stage in workspace.experiment.stages if stage in named or not workspace.finished(stage)]
