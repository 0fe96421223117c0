"""Facts about this machine and its devices: what they are, their peak speed, the memory they have used."""

from __future__ import annotations

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

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; GeForce with fp32 accumulation. The patterns match JAX's
# `device_kind`; devices with similar names (L40 and L4, GH200 and H200, a laptop's 4090) must not match.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250e12),
    (r"\bH200\b(?! NVL)", 989.5e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100\b", 989.5e12),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
    (r"\bRTX 4090\b(?! (D|Laptop)\b)", 165e12),
    (r"\bRTX 3090\b(?! Ti\b)", 71e12),
    (r"^TPU v6( lite|e)$", 918e12),
    (r"^TPU v5( lite|e)$", 197e12),
    (r"^TPU v5p?$", 459e12),
    (r"^TPU v4$", 275e12),
)


def device_peak_flops(kind: str) -> float | None:
    """The dense bf16 peak of one device in FLOP/s, by JAX's `device_kind`; None for an unknown device."""
    if "MIG" in kind:
        return None
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, kind)), None)


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
