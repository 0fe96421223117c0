"""Looks at this machine before a training does: what it has, what it lacks, and what fixes that."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import is_offline_mode
from jax.typing import DTypeLike

from jaxchat.config import TRAINED, Experiment
from jaxchat.data.hub.catalogue import parse_requests
from jaxchat.data.hub.download import is_whole, jobs_of, own_text
from jaxchat.data.hub.reach import Question
from jaxchat.data.manifest import Manifest
from jaxchat.devices.gpu import capability, multiplies_bf16
from jaxchat.devices.host import Nvidia, available_memory, find_nvidia, find_packages, free_space, may_have_nvidia
from jaxchat.devices.machine import device_peak_flops, find_devices, machine_info
from jaxchat.devices.problems import (
    GIB,
    Problem,
    full_disk,
    install_command,
    left_out_on_purpose,
    little_memory,
    taken_memory,
    unused_gpu,
    without_bf16,
    without_hopper_kernels,
)
from jaxchat.devices.speed import SHARE, measure_products
from jaxchat.errors import UserError
from jaxchat.model.parameters import count_parameters
from jaxchat.ops import fp8, hopper
from jaxchat.ops.attention import attend, attention_kernel
from jaxchat.ops.dispatch import Level, highest_level
from jaxchat.ops.mlp import relu_squared
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.progress import format_roughly
from jaxchat.stages.workspace import planned_model
from jaxchat.storage import first_line, is_remote, to_run_directory
from jaxchat.train.budget import pretraining_flops_per_token, training_tokens

START_PATIENCE = 3.0  # seconds for the hub at the start of a run
SLOW = 24 * 3600.0  # seconds of pretraining that are worth a word


# --- at the start of a run --------------------------------------------------------------------------------------------


def problems_at_start(experiment: Experiment, directory: str) -> list[Problem]:
    """What will stop or slow this run on this machine; takes no time where nothing is wrong.

    Raises:
      UserError: JAX finds no devices at all, because JAX_PLATFORMS asks for others than there are.
    """
    # The hub answers while JAX looks for devices. That it is not to be asked, the download itself says.
    hub = Question(START_PATIENCE) if _must_download(experiment) and not is_offline_mode() else None
    found = _device_problems(experiment.precision, briefly=True)
    found.append(little_memory(available_memory()))
    if not is_remote(directory):
        found.append(full_disk(Path(directory), "--run-dir", space_needed(experiment, directory)))
    if hub is not None:
        found.append(hub.answer().problem)
    return [problem for problem in found if problem is not None]


def space_needed(experiment: Experiment, directory: str) -> int:
    """Bytes of the checkpoints that this run has still to write to its directory, roughly, with one being replaced."""
    count = count_parameters(planned_model(experiment))
    # fp32; Muon has one moment for each parameter of a matrix, AdamW two for each other one.
    checkpoint = 8 * count.matrices + 12 * (count.total - count.matrices)
    run = RunDirectory(to_run_directory(directory))
    stages = sum(stage in experiment.stages and not run.made(stage) for stage in TRAINED)
    return checkpoint * (experiment.checkpoints.keep * stages + 1)


def _must_download(experiment: Experiment) -> bool:
    folder = str(experiment.data.folder)
    if is_remote(folder):
        return False
    manifest, own = Manifest.read(Path(folder)), bool(own_text(Path(folder)))
    wanted = [request for request in parse_requests(experiment.data.download) if not (own and request.is_text)]
    return not all(is_whole(job, manifest) for request in wanted for job in jobs_of(request))


def _device_problems(precision: str, *, briefly: bool, nvidia: Nvidia | None = None) -> list[Problem | None]:
    """What is wrong with the devices and with how JAX sees them.

    Args:
      briefly: say nothing of what the user has chosen by an environment variable.
      nvidia: what nvidia-smi said, if it was asked.
    """
    devices, complaints = find_devices()
    on_purpose = left_out_on_purpose(os.environ)
    if devices and devices[0].platform != "cpu":
        kind, ours = devices[0].device_kind, capability()
        hopper_missing = None if precision == "float32" else without_hopper_kernels(ours, jax.__version_info__)
        return [without_bf16(kind, ours, precision), hopper_missing]
    if on_purpose is not None and devices:
        there = not briefly and (nvidia or find_nvidia()).present
        return [on_purpose if there else None]
    complaint = complaints[0][:200] if complaints else ""  # the first says most
    if may_have_nvidia():
        problem = unused_gpu(nvidia or find_nvidia(), find_packages(), os.environ, complaint)
        if problem is not None:
            if not devices:
                raise UserError(str(problem))
            return [problem]
    if not devices:
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        why = f" ({complaint})" if complaint else ""
        raise UserError(f"JAX_PLATFORMS={asked} asks for devices that are not here{why}; unset JAX_PLATFORMS")
    if "TPU" in complaint:
        install = install_command(f"jax[tpu]=={jax.__version__}")
        return [Problem("tpu", "this machine has a TPU, and JAX is installed without what it needs for it", install)]
    if complaint and "cuda" not in complaint.lower():  # which there is nothing for
        guide = "see https://docs.jax.dev/en/latest/installation.html"
        return [Problem("devices", f"JAX cannot use a device ({complaint})", guide)]
    return []


# --- jaxchat doctor ---------------------------------------------------------------------------------------------------


def examine(experiments: dict[str, Experiment], run_dir: str, data_dir: str, say: Callable[[str, str], None]) -> list:
    """Looks at all there is, says each fact as `say(subject, text)`, and returns the problems.

    Args:
      experiments: those for which it says how long pretraining would take, by name.
    """
    hub = Question()
    nvidia = find_nvidia() if may_have_nvidia() else Nvidia(False)
    found: list[Problem | None] = [taken_memory(nvidia)]  # asked first: JAX itself takes most of the memory
    devices = _device_problems("auto", briefly=False, nvidia=nvidia)
    found += [problem for problem in devices if not (problem and found[0] and problem == found[0])]
    for subject, text in _describe_devices(nvidia):
        say(subject, text)
    dtype = jnp.bfloat16 if multiplies_bf16() else jnp.float32
    found += _kernels(dtype, say)
    speed = measure_products(dtype)
    peak = device_peak_flops(jax.devices()[0].device_kind)
    beside = f", {speed / peak:.0%} of the peak" if peak else ""
    say("speed", f"matrix products at {_per_second(speed)}{beside} on each device")
    found += _host(run_dir, data_dir, say)
    answer = hub.answer()
    found.append(answer.problem)
    if answer.problem is None:
        say("hub", f"{answer.endpoint} answers after {answer.seconds:.1f} s")
    times = dict(_pretraining(experiments, speed, peak))
    say("time", "pretraining takes, very roughly: " + ", ".join(f"{n} {format_roughly(s)}" for n, s in times.items()))
    slow = [name for name, seconds in times.items() if seconds > SLOW]
    if slow:
        smaller = next((name for name, seconds in reversed(times.items()) if seconds <= SLOW), None)
        instead = f"--experiment={smaller} suits this machine" if smaller else "--model.depth makes a model smaller"
        say("slow", f"{', '.join(slow)}: more than a day each; {instead}")
    return [problem for problem in found if problem is not None]


def _describe_devices(nvidia: Nvidia) -> Iterator[tuple[str, str]]:
    device, info = jax.devices()[0], machine_info()
    if device.platform == "cpu":
        yield "devices", f"no GPU or TPU that JAX can use; {info['cores']} CPU cores ({platform.machine()})"
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / GIB:.1f} GiB of memory for JAX" if limit else ""
        ours = f", compute capability {capability()}" if capability() else ""
        yield "devices", f"{info['device_count']} x {device.device_kind}{ours}{memory}"
    packages = find_packages()
    cuda = "".join(f", CUDA {major}" for major in packages.cuda)
    yield "versions", f"JAX {packages.jax}{cuda}, Python {info['python']}"
    if nvidia.gpus:
        gpu = nvidia.gpus[0]
        used = (
            f", {gpu.used / GIB:.1f} of {gpu.memory / GIB:.1f} GiB in use"
            if gpu.memory and gpu.used is not None
            else ""
        )
        yield "driver", f"{gpu.driver} ({len(nvidia.gpus)} x {gpu.name}{used} before JAX took its part)"
    peak = device_peak_flops(device.device_kind)
    most = f", at most {_per_second(peak)} on each device" if peak else ""
    unknown = "" if peak or device.platform == "cpu" else "; its peak is not known, so that no MFU is shown"
    yield "precision", f"{'bf16' if multiplies_bf16() else 'fp32'}{most}{unknown}"


def _kernels(dtype: DTypeLike, say: Callable[[str, str], None]) -> list[Problem]:
    """Says which kernels run here and which not, after trying them; those that fail are problems."""
    if jax.default_backend() == "cpu":
        say("kernels", "none: all formulas by XLA, as kernels are for NVIDIA GPUs from Ampere on, and TPUs")
        return []
    level, ours = highest_level(dtype), capability()
    attention = attention_kernel(dtype, 128)
    names = {"cudnn": "cuDNN's attention", "splash": "splash attention", "xla": "attention by XLA"}
    runs = [names[attention], *(["Triton's"] if level >= Level.TRITON else [])]
    runs += ["Hopper's"] if level >= Level.HOPPER else []
    runs += ["fp8 (with --precision=fp8)"] if fp8.supported() else []
    lacks = [] if level >= Level.TRITON else ["Triton's (NVIDIA GPUs from Ampere on)"]
    if level < Level.HOPPER:
        lacks.append("Hopper's (JAX 0.11 or later)" if ours == 9.0 else "Hopper's (H100, H200)")
    lacks += [] if fp8.supported() else ["fp8 (NVIDIA GPUs from Hopper on)"]
    say("kernels", f"{', '.join(runs)}; not {', '.join(lacks)}" if lacks else ", ".join(runs))
    return [
        Problem(
            "kernels", f"{name} fails on this device ({why[:200]})", "train with --precision=float32, without kernels"
        )
        for name, trial in (_trials(dtype) if level >= Level.TRITON or attention != "xla" else ())
        if (why := _failure(trial)) is not None
    ]


def _trials(dtype: DTypeLike) -> Iterator[tuple[str, Callable[[], tuple[jax.Array, jax.Array]]]]:
    """Small calls of kernels, each with its result and that of the plain formula."""
    x = jax.random.normal(jax.random.key(0), (1, 512, 512), dtype)
    heads = x.reshape(1, 512, 4, 128)
    exact = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    yield "relu_squared", lambda: (jax.jit(relu_squared)(x), jax.jit(relu_squared.formula)(x))
    yield "attention", lambda: (jax.jit(attend)(heads, heads, heads), jax.jit(exact)(heads, heads, heads))
    if highest_level(dtype) >= Level.HOPPER:
        multiply = jax.jit(lambda a, b: hopper.product([(a, b)]))
        yield "the product for Hopper", lambda: (multiply(x, x[0]), jax.jit(jnp.matmul)(x, x[0]))


def _failure(trial: Callable[[], tuple[jax.Array, jax.Array]]) -> str | None:
    try:
        ours, plain = (np.asarray(array, np.float32) for array in trial())
    except Exception as error:  # of XLA, of a compiler behind it, or of the driver
        return first_line(error)
    near = np.linalg.norm(ours - plain) <= 0.02 * np.linalg.norm(plain)  # bf16 rounds to 0.4 %
    return None if near else "its result is wrong"


def _per_second(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.0f} GFLOP/s"


def _host(run_dir: str, data_dir: str, say: Callable[[str, str], None]) -> list[Problem | None]:
    available, total = available_memory(), machine_info()["memory_bytes"]
    if total:
        free = "" if available is None else f", {available / GIB:.1f} available"
        say("memory", f"{total / GIB:.1f} GiB{free}")
    found: list[Problem | None] = [little_memory(available)]
    folders = {"--run-dir": run_dir, "--data": data_dir}
    local = {option: Path(folder) for option, folder in folders.items() if not is_remote(folder)}
    compiled = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if compiled and not is_remote(compiled):
        local["JAX_COMPILATION_CACHE_DIR"] = Path(compiled)
    problems = {option: full_disk(folder, option) for option, folder in local.items()}
    fine = [
        f"{free_space(local[option]) / 1e9:,.1f} GB for {local[option]}" for option in local if not problems[option]
    ]
    if fine:
        say("disk", f"free: {', '.join(fine)}")
    return [*found, *problems.values()]


def _pretraining(experiments: dict[str, Experiment], speed: float, peak: float | None) -> Iterator[tuple[str, float]]:
    """Seconds of pretraining by name, from the shortest to the longest."""
    seconds = {}
    for name, experiment in experiments.items():
        if "pretrain" not in experiment.stages or experiment.sizes == "auto":
            continue
        model = planned_model(experiment)
        config = experiment.pretrain
        flops = training_tokens(config, model) * pretraining_flops_per_token(config, model)
        reached = min(speed, experiment.cost.expected_mfu * peak) if peak else SHARE * speed
        seconds[name] = flops / (reached * jax.device_count())
    yield from sorted(seconds.items(), key=lambda entry: entry[1])
