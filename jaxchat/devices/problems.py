"""What is wrong with a machine, and the command that fixes it. JAX is not imported: what it says is passed in."""

from __future__ import annotations

import errno
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxchat.devices.host import DEVICES, MIB, Gpu, Nvidia, Packages, cannot_write, existing, free_space

# The first driver for each major version of CUDA, whose minor versions all run on it, and the first generation of GPUs
# that CUDA still compiles for: "CUDA Toolkit Release Notes", tables 2 and 3 of CUDA 12.9 and 13.0.
OLDEST_DRIVER = {12: 525, 13: 580}
OLDEST_GPU = {12: 5.0, 13: 7.5}
BF16 = 8.0  # the compute capability from which GPUs multiply bf16: Ampere
LITTLE_SPACE = 1 << 30
LITTLE_MEMORY = 1 << 30
GIB = 1 << 30
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DRIVERS = "https://www.nvidia.com/drivers"
DRIVER_COMMANDS = {  # by ID or ID_LIKE in /etc/os-release
    "ubuntu": "sudo ubuntu-drivers install && sudo reboot",
    "debian": "sudo apt install nvidia-driver && sudo reboot",
    "arch": "sudo pacman -S nvidia && sudo reboot",
}
OS_RELEASE = Path("/etc/os-release")
CONTAINER = (Path("/.dockerenv"), Path("/run/.containerenv"))


@dataclass(frozen=True)
class Problem:
    """Something that stops a training, or makes it much slower than this machine could be.

    Attributes:
      subject: a word for the column at the left: gpu, precision, disk, memory, hub.
      what: what is wrong, where.
      remedy: what fixes it; a command where there is one.
      mendable: False if only another machine would help.
    """

    subject: str
    what: str
    remedy: str
    mendable: bool = True

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def left_out_on_purpose(environ: Mapping[str, str]) -> Problem | None:
    """The environment variable that keeps JAX from NVIDIA's GPUs."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return Problem("gpu", f"JAX_PLATFORMS={platforms} keeps JAX from the GPU", "unset JAX_PLATFORMS")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return Problem("gpu", f"CUDA_VISIBLE_DEVICES={visible} hides the GPU", "unset CUDA_VISIBLE_DEVICES")
    return None


def unused_gpu(nvidia: Nvidia, packages: Packages, environ: Mapping[str, str], complaint: str = "") -> Problem | None:
    """Why JAX does not use the NVIDIA GPU of this host; None if there is no such GPU.

    Args:
      complaint: what JAX said when it looked for devices.
    """
    if not nvidia.present:
        return None
    if not nvidia.gpus:
        return Problem("gpu", *_no_driver(nvidia.trouble))
    gpu = nvidia.gpus[0]
    if gpu.driver.partition(".")[0].isdecimal() and _driver(gpu) < OLDEST_DRIVER[12]:
        return Problem("gpu", f"the driver of the {gpu.name}, {gpu.driver}, is older than 525, the oldest that JAX can "
                       "use, so the GPU is not used", f"update it: {driver_command()}")  # fmt: skip
    fitting = fitting_cuda(gpu)
    install = install_command(f"jax[cuda{fitting}]=={packages.jax}")
    if not packages.cuda:
        return Problem("gpu", f"JAX is installed for CPUs only, so the {gpu.name} is not used", install)
    major = max(packages.cuda)
    replace = uninstall_command(f"jax-cuda{major}-plugin", f"jax-cuda{major}-pjrt") + " && " + install
    if _driver(gpu) < OLDEST_DRIVER[major]:
        return Problem("gpu", f"the driver of the {gpu.name}, {gpu.driver}, is older than {OLDEST_DRIVER[major]}, "
                       f"which JAX for CUDA {major} needs, so the GPU is not used",
                       f"update it ({driver_command()}), or take JAX for CUDA 12: {replace}")  # fmt: skip
    if gpu.capability is not None and gpu.capability < OLDEST_GPU[major]:
        return Problem("gpu", f"CUDA {major} no longer supports the {gpu.name}", f"take JAX for CUDA 12: {replace}")
    if packages.cuda[major] != packages.jaxlib:
        return Problem("gpu", f"JAX's CUDA plugin is version {packages.cuda[major]} and jaxlib {packages.jaxlib}, so "
                       f"the {gpu.name} is not used", install)  # fmt: skip
    if (taken := taken_memory(nvidia)) is not None:
        return taken
    what = f"JAX cannot use the {gpu.name}" + (f" ({complaint})" if complaint else "")
    if environ.get("LD_LIBRARY_PATH"):
        return Problem("gpu", what, "unset LD_LIBRARY_PATH, where it finds other versions of CUDA's libraries, or "
                       f"install its own again: {install} --force-reinstall")  # fmt: skip
    return Problem("gpu", what, f"install it again: {install} --force-reinstall")


def taken_memory(nvidia: Nvidia, share: float = 0.75) -> Problem | None:
    """The GPU whose memory other programs hold, so that less than `share` of it, which JAX takes, is free."""
    for index, gpu in enumerate(nvidia.gpus):
        if gpu.memory and gpu.used is not None and gpu.memory - gpu.used < share * gpu.memory:
            free = (gpu.memory - gpu.used) / gpu.memory
            what = f"other programs hold {gpu.used / GIB:.1f} of {gpu.memory / GIB:.1f} GiB of GPU {index}"
            lower = f", or leave it to them: export XLA_PYTHON_CLIENT_MEM_FRACTION={0.95 * free:.2f}"
            return Problem("gpu", what, f"end them (nvidia-smi lists them){lower if free > 0.1 else ''}")
    return None


def fitting_cuda(gpu: Gpu) -> int:
    """The newest CUDA that the driver and the GPU can run."""
    old = gpu.capability is not None and gpu.capability < OLDEST_GPU[13]
    return 12 if old or _driver(gpu) < OLDEST_DRIVER[13] else 13


def _driver(gpu: Gpu) -> int:
    """The driver's branch, such as 550 of 550.54.14; a high one if nvidia-smi does not say."""
    branch = gpu.driver.partition(".")[0]
    return int(branch) if branch.isdecimal() else 9999


def _no_driver(trouble: str) -> tuple[str, str]:
    """What is wrong and what fixes it where a GPU is there and nvidia-smi lists none."""
    if "version mismatch" in trouble:
        return "the NVIDIA driver was updated and is not loaded yet, so the GPU is not used", "sudo reboot"
    if any(mark.exists() for mark in CONTAINER) and not (DEVICES / "nvidiactl").exists():
        return "this container does not see the NVIDIA GPU of its host", "start it with: docker run --gpus all"
    if "communicate with the NVIDIA driver" in trouble:
        return ("the NVIDIA driver is installed and not loaded, so the GPU is not used",
                f"sudo modprobe nvidia, and if that fails, install it again: {driver_command()}")  # fmt: skip
    said = "" if "not installed" in trouble else f" (nvidia-smi: {trouble[:120]})"
    return f"this machine has an NVIDIA GPU, and no driver for it{said}", f"install one: {driver_command()}"


def driver_command() -> str:
    """The command that installs NVIDIA's newest driver on this system, or where to find it."""
    try:
        lines = OS_RELEASE.read_text().splitlines()
    except OSError:
        return DRIVERS
    fields = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    names = [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
    return next((DRIVER_COMMANDS[name] for name in names if name in DRIVER_COMMANDS), DRIVERS)


def _python() -> str:
    """How to call this Python: by name if a shell here finds it so, otherwise by its path."""
    ours, found = os.path.abspath(sys.executable), shutil.which("python")
    if found is not None and os.path.abspath(found) == ours:
        return "python"
    near = os.path.relpath(ours)
    return ours if near.startswith("..") else near


def _pip(verb: str, options: str) -> str:
    if importlib.util.find_spec("pip") is None:  # as in an environment that uv has made
        return f"uv pip {verb} --python {_python()}"
    return f"{_python()} -m pip {verb}{options}"


def install_command(package: str) -> str:
    """The command that installs a package for this Python."""
    return f"{_pip('install', '')} '{package}'"


def uninstall_command(*packages: str) -> str:
    """The command that removes packages of this Python."""
    return f"{_pip('uninstall', ' -y')} {' '.join(packages)}"


# --- precision, kernels -----------------------------------------------------------------------------------------------


def without_bf16(kind: str, capability: float, precision: str = "auto") -> Problem | None:
    """An NVIDIA GPU that cannot multiply bf16; None for any other device (capability 0)."""
    if not 0 < capability < BF16:
        return None
    if precision == "bfloat16":
        return Problem("precision", f"the {kind} has no bf16 and emulates it", "leave --precision out: it is fp32 here")
    return Problem(
        "precision", f"the {kind} has no bf16: all is computed in fp32, without kernels, several times slower",
        "for bf16 take a GPU from Ampere on, in a hosted notebook L4 or A100", mendable=False)  # fmt: skip


def without_hopper_kernels(capability: float, jax_version: tuple[int, ...]) -> Problem | None:
    """A Hopper GPU with a JAX that cannot lower the kernels for it, though nothing else is missing."""
    if capability != 9.0 or jax_version >= (0, 11):
        return None
    installed = ".".join(map(str, jax_version))
    what = f"JAX {installed} cannot run the kernels for Hopper, the fastest"
    if sys.version_info < (3, 12):
        anew = "python3.12 -m venv .venv && .venv/bin/pip install '.[cuda]'"
        return Problem("kernels", f"{what}, and JAX 0.11 needs Python 3.12", f"make the environment anew: {anew}")
    return Problem("kernels", what, install_command("jax[cuda13]>=0.11,<0.13"))


# --- memory, disk -----------------------------------------------------------------------------------------------------


def little_memory(available: int | None) -> Problem | None:
    """Less memory than even a small training takes."""
    if available is None or available >= LITTLE_MEMORY:
        return None
    what = f"only {max(0, available) // MIB:,} MiB of memory are available"
    return Problem("memory", what, "end other programs, or give the container more: a training may be killed")


def full_disk(folder: Path, option: str, need: int = LITTLE_SPACE) -> Problem | None:
    """A folder that cannot be written, or has less than `need` bytes free.

    Args:
      option: what else to set so that another folder is used, such as --run-dir.
    """
    try:
        there, free = existing(folder), free_space(folder)
    except OSError as error:
        return Problem("disk", f"{folder} cannot be looked at ({error.strerror})", f"choose another {option}")
    elsewhere = f"choose another disk with {option}"
    failed = cannot_write(there)
    if failed is not None and failed.errno not in NO_SPACE:
        return Problem("disk", f"{there} cannot be written ({failed.strerror})", elsewhere)
    if failed is not None and free >= need:
        return Problem("disk", f"{there} takes no more ({failed.strerror})", f"free some space, or {elsewhere}")
    if failed is not None or free < need:
        what = f"{there} has {_size(free)} free, and needs about {_size(need)}"
        return Problem(
            "disk", what, f"free some space (du -xh {shlex.quote(str(there))} | sort -h | tail), or {elsewhere}"
        )
    return None


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 100e6 else f"{size / 1e6:,.1f} MB"
