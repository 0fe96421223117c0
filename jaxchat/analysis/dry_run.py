"""The dry run: what an experiment would take, in parameters, steps, FLOPs, memory, hours and dollars."""

from __future__ import annotations

import dataclasses
import sys
import time

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from jaxchat.config import Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.hub.download import jobs_of
from jaxchat.devices.machine import device_peak_flops, lacks_bf16
from jaxchat.devices.mesh import data_shards, make_mesh
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.model.parameters import count_parameters
from jaxchat.ops.compute import for_training
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.stages.tokenizer import load_users_tokenizer
from jaxchat.stages.training import abstract_batch
from jaxchat.stages.workspace import planned_model
from jaxchat.train.budget import flops_per_token, split_batch, training_length
from jaxchat.train.memory import GIB, CompiledStep, compile_step, plan_step, usable_memory
from jaxchat.verbatim import Style, write


def dry_run(experiment: Experiment) -> None:
    """Prints the plan. The train step is compiled for the devices here, for XLA's memory analysis.

    Raises:
      UserError: the batch or the mesh does not divide; the user's tokenizer is not of the size that is asked for.
    """
    if experiment.tokenizer.path is not None:
        load_users_tokenizer(experiment.tokenizer)
    model = planned_model(experiment)
    mesh = make_mesh(experiment.mesh)
    parallel = data_shards(mesh)
    parameters = count_parameters(model)
    _say(experiment.name, "bold", end="")
    _say(f": d{model.depth}, width {model.width}, {model.num_heads} heads, "
         f"context {model.sequence_len:,}, vocabulary {model.vocab_size:,}")  # fmt: skip
    _say(f"parameters    {parameters.total:,} (embedding {parameters.embedding:,}, blocks "
         f"{parameters.matrices:,}, head {parameters.head:,})")  # fmt: skip
    _say(f"FLOPs a token {flops_per_token(model):.4g} (forward and backward)")
    _print_windows(model)
    _print_data(experiment)
    _print_stages(experiment, model, parallel)
    _print_memory(experiment, model, mesh)


def _say(text: str, style: Style = "", *, end: str = "\n") -> None:
    write(text, sys.stdout, style=style, end=end)


def _print_windows(model: GPTConfig) -> None:
    windows = [window for window in model.windows if window is not None]
    if windows:
        full = flops_per_token(dataclasses.replace(model, window_pattern="L"))
        _say(f"windows       {model.window_pattern}: {len(windows)} of {model.depth} layers see "
             f"{windows[0]:,} tokens back; {1 - flops_per_token(model) / full:.1%} fewer FLOPs than with full "
             "attention in all")  # fmt: skip


def _print_data(experiment: Experiment) -> None:
    requests = parse_requests(experiment.data.download)
    if requests:
        size = sum(job.size for request in requests for job in jobs_of(request))
        _say(f"downloads     {', '.join(experiment.data.download)}: about {size / 1e9:.1f} GB to "
             f"{experiment.data.folder}, minus what is already there")  # fmt: skip


def _print_stages(experiment: Experiment, model: GPTConfig, parallel: int) -> None:
    price = experiment.cost
    peak = device_peak_flops(price.device)
    rate = f"{price.expected_mfu:.0%} MFU" if peak else "peak speed unknown"
    _say(f"expected on   {price.devices} x {price.device}, {rate}, ${price.dollars_per_device_hour:.2f} "
         "a device-hour")  # fmt: skip
    table = Table("stage", *("steps", "tokens", "rows x accum.", "FLOPs", "hours", "cost"), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in ("pretrain", "midtrain", "sft"):
        if stage not in experiment.stages:
            continue
        config = getattr(experiment, stage)
        plan = split_batch(config.batch_tokens, config.device_rows, model.sequence_len, parallel)
        rows = f"{plan.rows} x {plan.accumulation}"
        steps = training_length(config, model) if stage == "pretrain" else config.num_iterations
        if steps is None:
            table.add_row(stage, f"{config.epochs:g} x the data", "", rows, "", "", "")
            continue
        tokens = steps * config.batch_tokens
        flops = tokens * flops_per_token(model)
        taken = price.hours(flops, peak) if peak else None
        dollars = f"${price.dollars(taken):,.2f}" if taken is not None else "unknown"
        table.add_row(
            stage, f"{steps:,}", f"{tokens:,}", rows, f"{flops:.3g}", f"{taken:.2f}" if peak else "unknown", dollars
        )
    Console(soft_wrap=True).print(table)


def _print_memory(experiment: Experiment, model: GPTConfig, mesh) -> None:
    device, began = jax.devices()[0], time.perf_counter()
    with Console().status(f"compiling the pretraining step for {mesh.size} x {device.device_kind}"):
        step = compile_pretraining(experiment, model, mesh, usable_memory())
    memory = step.memory
    _say(f"memory        {memory.total / GIB:.2f} GiB a device: {memory.held / GIB:.2f} parameters, optimizer "
         f"and batch, {memory.used / GIB:.2f} in use by a step")  # fmt: skip
    _say(f"              according to XLA's analysis of the step, compiled for {device.platform} "
         f"({time.perf_counter() - began:.0f} s)")  # fmt: skip
    if step.limit is None:
        _say(f"remat         {step.remat}; the devices here do not say how much memory they have")
    else:
        _say(f"              {step}")
    if not step.fits:
        _say(f"warning: {step.too_large('pretrain', experiment.pretrain.device_rows)}")
    if device.platform == "cpu" and device_peak_flops(experiment.cost.device):
        _say("              a CPU computes bf16 in fp32: expect a GPU's step to use half of that or less")


def compile_pretraining(experiment: Experiment, model: GPTConfig, mesh, limit: int | None) -> CompiledStep:
    """The pretraining step as a run would compile it if a step may take `limit` bytes; nothing is allocated."""
    config = experiment.pretrain
    parallel = data_shards(mesh)
    plan = split_batch(config.batch_tokens, config.device_rows, model.sequence_len, parallel)
    planned = experiment.cost.device  # for which a CPU may stand
    bf16 = experiment.precision in ("auto", "fp8") and device_peak_flops(planned) and not lacks_bf16(planned)
    compute = for_training(experiment, mesh)
    if bf16 and jax.default_backend() == "cpu":
        compute = dataclasses.replace(compute, dtype=jnp.bfloat16)
    optimizer = make_optimizer(
        experiment.optimizer, model, optax.constant_schedule(1.0), mesh=mesh, newton_schulz_dtype=compute.dtype
    )
    state, make_step = plan_step(model, optimizer, abstract_params(model), compute)
    return compile_step(make_step, experiment.remat, limit, state, abstract_batch(mesh, plan, model.sequence_len))
