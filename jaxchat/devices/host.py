"""Facts about this host that are found without JAX: NVIDIA's GPUs and driver, JAX's packages, memory, disk."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
NVIDIA = "0x10de"  # the maker's number on the PCI bus
DISPLAY = ("0x0300", "0x0302")  # PCI classes: graphics cards, with a screen and without
DEVICES = Path("/dev")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
WSL = "/usr/lib/wsl/lib/nvidia-smi"  # not always on the PATH there
PATIENCE = 30  # seconds for nvidia-smi, which loads the driver on a host with many GPUs
PROBE_BYTES = 1 << 16
MIB = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as nvidia-smi lists it; None for what it does not say. Memory is in bytes."""

    name: str
    driver: str
    memory: int | None = None
    used: int | None = None
    capability: float | None = None


@dataclass(frozen=True)
class Nvidia:
    """The NVIDIA GPUs of this host.

    Attributes:
      present: whether there is any, with a driver or without.
      gpus: those that the driver knows.
      trouble: why nvidia-smi lists none: its own words, or that it is not installed.
    """

    present: bool
    gpus: tuple[Gpu, ...] = ()
    trouble: str = ""


def may_have_nvidia() -> bool:
    """Whether it is worth asking nvidia-smi: there is a GPU of NVIDIA, or nvidia-smi itself. Takes no time."""
    return _sees_nvidia() or _smi() is not None


def find_nvidia() -> Nvidia:
    """The NVIDIA GPUs of this host, by the PCI bus and nvidia-smi, which may take a second."""
    program = _smi()
    if program is None:
        return Nvidia(_sees_nvidia(), trouble="nvidia-smi is not installed")
    fields = ["name", "driver_version", "memory.total", "memory.used", "compute_cap"]
    code, output = _query(program, fields)
    if code and "compute_cap" in output:  # drivers before 510 do not know it
        code, output = _query(program, fields[:-1])
    gpus = () if code else tuple(gpu for line in output.splitlines() if (gpu := _parse(line)))
    return Nvidia(bool(gpus) or _sees_nvidia(), gpus, "" if gpus else " ".join(output.split()) or "it says nothing")


def _smi() -> str | None:
    return shutil.which("nvidia-smi") or (WSL if os.access(WSL, os.X_OK) else None)


def _sees_nvidia() -> bool:
    if any((DEVICES / name).exists() for name in ("nvidia0", "nvidiactl")):
        return True
    return any(
        _text(device / "vendor") == NVIDIA and _text(device / "class")[:6] in DISPLAY
        for device in (PCI.iterdir() if PCI.is_dir() else ())
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _query(program: str, fields: list[str]) -> tuple[int, str]:
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, f"nvidia-smi does not answer ({type(error).__name__})"
    return done.returncode, done.stdout + done.stderr


def _parse(line: str) -> Gpu | None:
    """A line of nvidia-smi; what a GPU does not have is `[N/A]`, such as the memory of one that shares its host's."""
    values = [value.strip() for value in line.split(",")]
    if len(values) < 4:
        return None
    memory, used = (int(value) * MIB if value.isdecimal() else None for value in values[2:4])
    capability = values[4] if len(values) > 4 else ""
    return Gpu(values[0], values[1], memory, used, float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None)


@dataclass(frozen=True)
class Packages:
    """The installed versions of JAX.

    Attributes:
      jax, jaxlib: their versions.
      cuda: the installed CUDA plugins, as {13: "0.11.1"}: CUDA's major version and the plugin's own version.
    """

    jax: str
    jaxlib: str
    cuda: dict[int, str]


def find_packages() -> Packages:
    """Which JAX is installed, and for which CUDA."""
    plugins = {major: _version(f"jax-cuda{major}-plugin") for major in (12, 13)}
    found = {major: version for major, version in plugins.items() if version}
    return Packages(_version("jax") or "", _version("jaxlib") or "", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def available_memory() -> int | None:
    """Bytes of memory that this process could still take, within the limit of its container; None where unknown."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(MEMINFO), re.MULTILINE)
    free = int(found[1]) << 10 if found else None
    limit, used = _text(CGROUP / "memory.max"), _text(CGROUP / "memory.current")
    if limit.isdecimal() and used.isdecimal():
        cached = re.search(r"^inactive_file (\d+)", _text(CGROUP / "memory.stat"), re.MULTILINE)
        within = int(limit) - int(used) + (int(cached[1]) if cached else 0)
        free = within if free is None else min(free, within)
    return free


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(above for above in (folder, *folder.parents) if above.exists())


def free_space(folder: Path) -> int:
    """Bytes that may still be written to a folder, which need not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def cannot_write(folder: Path) -> OSError | None:
    """What stops a small file from being written to a folder: no space, a quota, no permission. It leaves no file."""
    try:
        with contextlib.closing(_probe(existing(folder))) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _probe(folder: Path):
    return tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (the caller closes it)
