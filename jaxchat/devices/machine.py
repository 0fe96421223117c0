"""Facts about this machine and its devices: what they are, their peak speed, the memory they have used."""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from typing import Any

import jax

try:
    import resource
except ImportError:  # Windows, outside WSL
    resource = None

# Dense peaks in TFLOP/s, without sparsity, of bf16 with sums in fp32 (of fp32 where there is no bf16). The patterns
# match JAX's `device_kind`; devices with similar names (L40 and L4, GH200 and H200, A10G and A10) must not match.
_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA's data sheets of each GPU; where they give the figure with sparsity alone, half of it.
    (r"\bB200\b", 2250),
    (r"\bH200\b(?! NVL)", 989.5),
    (r"\bH100 PCIe\b", 756),
    (r"\bH100 NVL\b", 835),
    (r"\bH100\b", 989.5),
    (r"\bA100\b", 312),
    (r"\bL40S\b", 362),
    (r"\bL4\b", 121),
    (r"\bA10\b", 125),
    (r"\bA10G\b", 70),  # "NVIDIA A10G" of Amazon Web Services
    (r"\bT4\b", 8.1),  # fp32: Turing has no bf16
    (r"\bGB10\b", 125),  # an eighth of the 1,000 in sparse fp4 that NVIDIA gives for DGX Spark
    # "AMD Instinct MI300X" data sheet.
    (r"\bMI300X\b", 1307.4),
    # Google Cloud's page of each version.
    (r"^TPU v6( lite|e)$", 918),
    (r"^TPU v5( lite|e)$", 197),
    (r"^TPU v5p?$", 459),
    (r"^TPU v4$", 275),
)
# GeForce: 512 FLOPs a clock on a multiprocessor, with sums in fp32 (with sums in fp16 twice as many), at the boost
# clock of NVIDIA's specifications. The white papers of GA102, AD102 and RTX Blackwell give the same for 3090, 4090 and
# 5090. Laptop GPUs of the same names have other clocks, and are not here.
_GEFORCE: dict[str, tuple[int, float]] = {  # multiprocessors, GHz
    "3050": (20, 1.777),
    "3060": (28, 1.777),
    "3060 Ti": (38, 1.665),
    "3070": (46, 1.725),
    "3070 Ti": (48, 1.770),
    "3080": (68, 1.710),
    "3080 Ti": (80, 1.665),
    "3090": (82, 1.695),
    "3090 Ti": (84, 1.860),
    "4060": (24, 2.460),
    "4060 Ti": (34, 2.535),
    "4070": (46, 2.475),
    "4070 SUPER": (56, 2.475),
    "4070 Ti": (60, 2.610),
    "4070 Ti SUPER": (66, 2.610),
    "4080": (76, 2.505),
    "4080 SUPER": (80, 2.550),
    "4090": (128, 2.520),
    "5050": (20, 2.572),
    "5060": (30, 2.497),
    "5060 Ti": (36, 2.572),
    "5070": (48, 2.512),
    "5070 Ti": (70, 2.452),
    "5080": (84, 2.617),
    "5090": (170, 2.407),
}


def device_peak_flops(kind: str) -> float | None:
    """The dense bf16 peak of one device in FLOP/s, by JAX's `device_kind`; None for an unknown device.

    A GPU without bf16, whose models compute in fp32, has its fp32 peak.
    """
    if "MIG" in kind:
        return None
    geforce = re.fullmatch(r"(?:NVIDIA )?(?:GeForce )?RTX (\d{4}(?: Ti)?(?: SUPER)?)", kind)
    if geforce:
        multiprocessors, gigahertz = _GEFORCE.get(geforce[1], (0, 0.0))
        return 512 * multiprocessors * gigahertz * 1e9 or None
    return next((1e12 * peak for pattern, peak in _PEAKS if re.search(pattern, kind)), None)


# Of each device's memory, in units of 2^30 bytes as its maker gives it; only where all of a name have the same.
_MEMORY: tuple[tuple[str, int], ...] = (
    (r"\bB200\b", 180),
    (r"\bH200\b", 141),
    (r"\bH100 NVL\b", 94),
    (r"\bH100\b", 80),
    (r"\bL40S\b", 48),
    (r"\bA100\b.*40GB", 40),
    (r"\bA100\b.*80GB", 80),
    (r"\b(A10|A10G|L4)\b", 24),
    (r"\bT4\b", 16),
    (r"\bMI300X\b", 192),
    (r"^TPU v6( lite|e)$", 32),
    (r"^TPU v5( lite|e)$", 16),
    (r"^TPU v5p?$", 95),
    (r"^TPU v4$", 32),
    (r"\bRTX (3090|3090 Ti|4090)$", 24),
    (r"\bRTX 5090$", 32),
    (r"\bRTX (4070 Ti SUPER|4080|4080 SUPER|5070 Ti|5080)$", 16),
    (r"\bRTX (3080 Ti|4070|4070 SUPER|4070 Ti|5070)$", 12),
    (r"\bRTX (3060 Ti|3070|3070 Ti|4060|5050|5060)$", 8),
)


def device_memory(kind: str) -> int | None:
    """The memory of one device in bytes, by JAX's `device_kind`; None for an unknown device."""
    found = next((size for pattern, size in _MEMORY if re.search(pattern, kind)), None)
    return None if found is None or "MIG" in kind else found << 30


def lacks_bf16(kind: str) -> bool:
    """Whether a device is, by its name, one of NVIDIA's GPUs before Ampere that are still about."""
    return re.search(r"\b(T4|P100|V100|RTX 20\d\d)\b", kind) is not None


class _Complaints(logging.Filter):
    """Keeps what JAX logs while it looks for devices, instead of letting it be printed."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        error = record.exc_info[1] if record.exc_info else None
        cause = " ".join(str(error).split()) if error else ""
        self.lines.append(cause or " ".join(record.getMessage().split()))
        return False


def find_devices() -> tuple[list[jax.Device], list[str]]:  # pyright: ignore[reportInvalidTypeForm]
    """JAX's devices, and what it said while it looked for them: a line each, without tracebacks.

    There are no devices if JAX raises, as it does where the platform that JAX_PLATFORMS names has none.
    """
    complaints, logger = _Complaints(), logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(complaints)
    try:
        return jax.devices(), complaints.lines
    except (RuntimeError, AssertionError) as error:
        return [], [*complaints.lines, *(" ".join(line.split()) for line in str(error).splitlines()[:1])]
    finally:
        logger.removeFilter(complaints)


def machine_info() -> dict[str, Any]:
    """The machine as JSON: this host's cores and memory, the devices of all hosts, versions. No names, no paths."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "hosts": jax.process_count(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def peak_memory_bytes() -> int | None:
    """The most bytes that any device of this host has held; the peak of this process if the backend does not say.

    None where the system does not say either.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peak = max(entry.get("peak_bytes_in_use", 0) for entry in stats)
    if peak:
        return peak
    if resource is None:
        return None
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else 1024 * rss
