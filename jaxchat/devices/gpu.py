"""Facts about this process's GPU."""

from __future__ import annotations

import jax

from jaxchat.devices.problems import BF16


def capability() -> float:
    """The compute capability of this process's GPU, such as 9.0 for Hopper; 0 without an NVIDIA GPU."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if nvidia else 0.0


def multiplies_bf16() -> bool:
    """Whether this process's device multiplies bf16 itself: not a CPU, nor an NVIDIA GPU before Ampere."""
    return jax.default_backend() != "cpu" and not 0 < capability() < BF16


def multiprocessors() -> int:
    """The number of multiprocessors of this process's GPU, or of the one that a program is being lowered for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract else jax.devices()[0].core_count
