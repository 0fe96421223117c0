"""The dry run: what an experiment would take, in parameters, steps, FLOPs, memory, hours and dollars."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxchat.analysis.planned_devices import planned_chips, quick_compilation
from jaxchat.config import Experiment, PretrainConfig
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.hub.download import jobs_of
from jaxchat.devices.machine import device_memory, device_peak_flops, lacks_bf16
from jaxchat.devices.mesh import data_shards, make_mesh
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.model.parameters import count_parameters
from jaxchat.ops.compute import check_fp8_shape, for_training
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.planning.expected_quality import load_law, quality_lines
from jaxchat.runs.progress import format_number
from jaxchat.stages.settings import naming
from jaxchat.stages.tokenizer import load_users_tokenizer
from jaxchat.stages.workspace import planned_model
from jaxchat.train.budget import (
    flops_per_token,
    plans_of_stage,
    pretraining_flops_per_token,
    training_length,
    training_tokens,
)
from jaxchat.train.choice import Choice, by_preference
from jaxchat.train.memory import (
    GIB,
    LEVELS,
    SPARE,
    CompiledStep,
    PlannedStep,
    Shown,
    compile_step,
    levels,
    plan_step,
    usable_memory,
)
from jaxchat.train.phases import Phases, sizes
from jaxchat.train.step import abstract_batch
from jaxchat.verbatim import Style, write

SUPERVISED = ("pretrain", "midtrain", "sft")
PREALLOCATED = 0.75  # of a GPU's memory, which JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
DEFAULT_MEMORY = 24 * GIB  # of an accelerator whose memory is not known


def analysed(experiment: Experiment) -> Experiment:
    """The experiment with what the devices here can compute in the place of fp8, where CPUs stand for its own.

    Raises:
      UserError: as `check_fp8_shape`.
    """
    if experiment.precision != "fp8" or not _stands_for(experiment, make_mesh(experiment.mesh)):
        return experiment
    check_fp8_shape(experiment)
    _say("note          a CPU has no fp8: the step is analysed in bf16")
    return dataclasses.replace(experiment, precision="bfloat16")


def dry_run(experiment: Experiment) -> None:
    """Prints the plan. The first stage's train step is compiled for the devices here, for XLA's memory analysis.

    Raises:
      UserError: the batch or the mesh does not divide; the user's tokenizer is not of the size that is asked for.
    """
    if experiment.tokenizer.path is not None:
        load_users_tokenizer(experiment.tokenizer)
    model = planned_model(experiment)
    chips, missing = planned_chips(experiment.cost)
    mesh = make_mesh(experiment.mesh, None if chips is None else chips.devices)
    parallel = data_shards(mesh)
    parameters = count_parameters(model)
    _say(experiment.name, "bold", end="")
    _say(f": d{model.depth}, width {model.width}, {format_number(model.num_heads, 'head')}, "
         f"context {model.sequence_len:,}, vocabulary {model.vocab_size:,}")  # fmt: skip
    tables = f", other tables {parameters.value_embedding:,}" if parameters.value_embedding else ""
    _say(f"parameters    {parameters.total:,} (embedding {parameters.embedding:,}, blocks "
         f"{parameters.matrices:,}, head {parameters.head:,}{tables})")  # fmt: skip
    _say(f"FLOPs a token {flops_per_token(model):.4g} (forward and backward)")
    _print_windows(model)
    if "pretrain" in experiment.stages:
        _print_phases(experiment.pretrain, model)
    _print_quality(experiment, model)
    _print_data(experiment)
    if missing is not None:
        _say(f"note          {missing}; a CPU's stands for it")
    stage = next((stage for stage in SUPERVISED if stage in experiment.stages), None)
    if stage is None:
        return
    began = time.perf_counter()
    with naming(stage), _progress(f"compiling a {stage} step for {mesh.size} x {_kind(mesh)}") as shown:
        if chips is None:
            limit = usable_memory(of_host=getattr(experiment, stage).device_rows == "auto")
            step = compile_stage(experiment, stage, model, mesh, limit, shown)
        else:
            with quick_compilation():
                step = compile_stage(experiment, stage, model, mesh, int((1 - SPARE) * chips.memory), shown)
    _print_stages(experiment, model, parallel, step)
    _print_memory(experiment, stage, model, mesh, step, time.perf_counter() - began)


@contextlib.contextmanager
def _progress(text: str) -> Iterator[Shown]:
    """Shows on a terminal what is being compiled, and for how long; yields what tells which choice it is."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)

        def shown(choice: Choice) -> contextlib.AbstractContextManager:
            progress.update(task, description=f"{text}, {choice}")
            return contextlib.nullcontext()

        yield shown


def _kind(mesh: Mesh) -> str:
    return mesh.devices.flat[0].device_kind


def _say(text: str, style: Style = "", *, end: str = "\n") -> None:
    write(text, sys.stdout, style=style, end=end)


def _print_windows(model: GPTConfig) -> None:
    windows = [window for window in model.windows if window is not None]
    if windows:
        full = flops_per_token(dataclasses.replace(model, window_pattern="L"))
        _say(f"windows       {model.window_pattern}: {len(windows)} of {model.depth} layers see "
             f"{windows[0]:,} tokens back; {1 - flops_per_token(model) / full:.1%} fewer FLOPs than with full "
             "attention in all")  # fmt: skip


def _print_phases(config: PretrainConfig, model: GPTConfig) -> None:
    phases = Phases(config, training_length(config, model))
    if config.phases.count > 1:
        begins = ", ".join(f"{step:,}" for step in phases.begins)
        _say(f"phases        {config.phases.count}, from step {begins}")
    if config.phases.windows:
        shares = ", ".join(f"{share:.0%}" for share in (*config.phases.windows, 1))
        less = 1 - pretraining_flops_per_token(config, model) / flops_per_token(model)
        _say(f"              windows of {shares} of their size: {less:.1%} fewer FLOPs than with whole ones")
    if phases.grows:
        tokens = ", ".join(f"{size:,}" for size in sizes(config))
        _say(f"              steps of {tokens} tokens")
    if config.phases.ahead:
        _say(f"tokens ahead  {len(config.phases.ahead)} beside the next one, in the first {phases.steps_ahead:,} steps")


def _print_quality(experiment: Experiment, model: GPTConfig) -> None:
    if "pretrain" not in experiment.stages:
        return
    tokens = training_tokens(experiment.pretrain, model)
    flops = tokens * pretraining_flops_per_token(experiment.pretrain, model)
    for number, line in enumerate(quality_lines(experiment, tokens, flops, load_law())):
        _say(f"{'' if number else 'quality':<14}{line}")


def _print_data(experiment: Experiment) -> None:
    requests = parse_requests(experiment.data.download)
    if requests:
        size = sum(job.size for request in requests for job in jobs_of(request))
        _say(f"downloads     {', '.join(experiment.data.download)}: about {size / 1e9:.1f} GB to "
             f"{experiment.data.folder}, minus what is already there")  # fmt: skip


def _print_stages(experiment: Experiment, model: GPTConfig, parallel: int, step: CompiledStep) -> None:
    price = experiment.cost
    peak = device_peak_flops(price.device)
    rate = f"{price.expected_mfu:.0%} MFU" if peak else "peak speed unknown"
    _say(f"expected on   {price.devices} x {price.device}, {rate}, ${price.dollars_per_device_hour:.2f} "
         "a device-hour")  # fmt: skip
    table = Table("stage", *("steps", "tokens", "rows x accum.", "FLOPs", "hours", "cost"), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in SUPERVISED:
        if stage not in experiment.stages:
            continue
        config = getattr(experiment, stage)
        with naming(stage):
            plans = plans_of_stage(config, model.sequence_len, parallel)
        # Rows take the same in all these stages, where they have the same length.
        plan = next((plan for plan in plans if plan.device_rows <= step.choice.device_rows), plans[0])
        rows = f"{plan.rows} x {plan.accumulation}"
        pretrains = isinstance(config, PretrainConfig)
        steps = training_length(config, model) if pretrains else config.num_iterations
        if steps is None:
            table.add_row(stage, f"{config.epochs:g} x the data", "", rows, "", "", "")
            continue
        tokens = training_tokens(config, model) if pretrains else steps * config.batch_tokens
        flops = tokens * (pretraining_flops_per_token(config, model) if pretrains else flops_per_token(model))
        taken = price.hours(flops, peak) if peak else None
        dollars = f"${price.dollars(taken):,.2f}" if taken is not None else "unknown"
        table.add_row(
            stage, f"{steps:,}", f"{tokens:,}", rows, f"{flops:.3g}", f"{taken:.2f}" if peak else "unknown", dollars
        )
    Console(soft_wrap=True).print(table)


def _print_memory(
    experiment: Experiment, stage: str, model: GPTConfig, mesh: Mesh, step: CompiledStep, seconds: float
) -> None:
    memory = step.memory
    _say(f"memory        {memory.total / GIB:.2f} GiB a device: {memory.held / GIB:.2f} parameters, optimizer "
         f"and batch, {memory.used / GIB:.2f} in use by a step")  # fmt: skip
    _say(f"              according to XLA's analysis of the step, compiled for {_kind(mesh)} ({seconds:.0f} s)")
    if mesh.shape["fsdp"] > 1 and mesh.devices.flat[0].platform == "tpu":
        _say("              by a quick compilation; with mesh.fsdp the run's own may need a quarter more")
    if _stands_for(experiment, mesh):
        _say("              a CPU computes bf16 in fp32: expect a GPU's step to use half of that or less")
        limit = _planned_limit(experiment)
        expected = _plan(experiment, model, mesh).expected(model.sequence_len)(step.choice)
        verdict = "" if expected <= limit else ", which is too little; lower model.depth or model.sequence-len"
        _say(f"expected      {step.choice}: about {expected / GIB:.1f} of {limit / GIB:.1f} GiB of each "
             f"{experiment.cost.device}{verdict}")  # fmt: skip
        return
    if step.limit is None:
        _say(f"remat         {step.remat}; the devices here do not say how much memory they have")
    else:
        _say(f"              {step}")
    if not step.fits:
        _say(f"warning: {step.too_large(stage)}")


def _stands_for(experiment: Experiment, mesh: Mesh) -> bool:
    """Whether CPUs of the mesh stand for accelerators that the experiment is planned for."""
    return mesh.devices.flat[0].platform == "cpu" and device_peak_flops(experiment.cost.device) is not None


def compile_stage(
    experiment: Experiment,
    stage: str,
    model: GPTConfig,
    mesh: Mesh,
    limit: int | None,
    shown: Shown = lambda choice: contextlib.nullcontext(),
) -> CompiledStep:
    """The step of a supervised stage as a run would compile it if it may take `limit` bytes; nothing is allocated.

    On CPUs that stand for accelerators, with the rows that these may be expected to have room for.
    """
    config = getattr(experiment, stage)
    plans = plans_of_stage(config, model.sequence_len, data_shards(mesh))
    shape = {plan.device_rows: (plan.accumulation, plan.rows, model.sequence_len) for plan in plans}
    planned, length = _plan(experiment, model, mesh), model.sequence_len
    choices = by_preference(shape, length, levels(experiment.remat, mesh))
    if _stands_for(experiment, mesh):
        all_levels = LEVELS if experiment.remat == "auto" else (experiment.remat,)
        choices, expected = by_preference(shape, length, all_levels), planned.expected(length)
        at_most = _planned_limit(experiment)
        choices, limit = [next((choice for choice in choices if expected(choice) <= at_most), choices[-1])], None
    return compile_step(planned, choices, limit, lambda rows: abstract_batch(mesh, shape[rows]), shown=shown)


def _plan(experiment: Experiment, model: GPTConfig, mesh: Mesh) -> PlannedStep:
    compute, planned = for_training(experiment, mesh), experiment.cost.device
    accelerated = jax.default_backend() == "cpu" and device_peak_flops(planned) is not None and not lacks_bf16(planned)
    if accelerated and experiment.precision in ("auto", "fp8"):
        compute = dataclasses.replace(compute, dtype=jnp.bfloat16)
    optimizer = make_optimizer(
        experiment.optimizer, model, optax.constant_schedule(1.0), mesh=mesh, newton_schulz_dtype=compute.dtype
    )
    return plan_step(model, optimizer, abstract_params(model), compute)


def _planned_limit(experiment: Experiment) -> float:
    """Bytes that a step may take on a device that the experiment is planned for."""
    return (1 - SPARE) * PREALLOCATED * (device_memory(experiment.cost.device) or DEFAULT_MEMORY)
