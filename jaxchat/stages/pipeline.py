"""An experiment's stages, one after another: finished ones are skipped, an unfinished one goes on where it stopped."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

from jaxchat.report import write_report
from jaxchat.stages import evaluate, finetune, pretrain, rl, tokenizer
from jaxchat.stages.run import Run

RUNNERS = {
    "tokenizer": tokenizer.run,
    "pretrain": pretrain.run,
    "midtrain": lambda run: finetune.run(run, "midtrain"),
    "sft": lambda run: finetune.run(run, "sft"),
    "rl": rl.run,
    "evaluate": evaluate.run,
    "report": lambda run: write_report(run.directory),
}


def run_stages(run: Run) -> None:
    """Runs the experiment's stages in `run`'s directory."""
    device = jax.devices()[0]
    shape = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    run.say(
        f"devices   {jax.device_count()} x {device.device_kind} ({shape}), computing in {jnp.dtype(run.dtype).name}"
    )
    run.say(f"run       {run.directory}")
    for stage in run.experiment.stages:
        if stage != "report" and run.finished(stage):
            run.say(f"{stage:<9} finished before; skipped")
            continue
        began = time.perf_counter()
        RUNNERS[stage](run)
        run.say(f"{stage:<9} finished in {time.perf_counter() - began:,.0f} s")
