"""Facts about this process's GPU."""

from __future__ import annotations

import jax


def capability() -> float:
    """The compute capability of this process's GPU, such as 9.0 for Hopper; 0 without an NVIDIA GPU."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if nvidia else 0.0


def multiprocessors() -> int:
    """The number of multiprocessors of this process's GPU, or of the one that a program is being lowered for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract else jax.devices()[0].core_count
