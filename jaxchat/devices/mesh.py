"""Devices as a mesh with the axes `data`, `fsdp` and `tensor`, and which array lies how on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig
from jaxchat.errors import check

AXES = ("data", "fsdp", "tensor")
# The rows of a batch: fsdp is data parallelism too, with sharded parameters.
BATCH_SPEC = P(("data", "fsdp"))


def set_xla_flags(*flags: str) -> None:
    """XLA's flags for training, and these; to be called before JAX is used. The user's own stand behind, and win."""
    # Matrix products by cuBLAS alone: trying Triton's too takes longer than all other compilation, and changes nothing.
    ours = ("--xla_gpu_enable_triton_gemm=false", *flags)
    users = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in ours]
    os.environ["XLA_FLAGS"] = " ".join([*ours, *users])


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all by default) in the shape of `config`.

    Raises:
      UserError: the shape does not use exactly the devices there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, model = len(devices), config.fsdp * config.tensor
    divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
    check(
        count % model == 0,
        f"mesh.fsdp {config.fsdp} x mesh.tensor {config.tensor} is {model}, which does not divide the {count} devices "
        f"here; choose a product among {divisors}",
    )
    data = count // model
    check(
        config.data in (-1, data),
        f"mesh.data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} is {config.data * model} devices, and "
        f"{count} are here; set mesh.data to {data}, or to -1 for all that the others leave",
    )
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_shards(mesh: Mesh) -> int:
    """The number of parts that a batch's rows are split into: the axes `data` and `fsdp` together."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process holds, of how many: (0, 1) for a single process.

    Processes between which only `tensor` is split hold the same part.
    """
    shards = data_shards(mesh)
    places = NamedSharding(mesh, BATCH_SPEC).devices_indices_map((shards,))
    held: dict[int, set[int]] = {}
    for device, (part,) in places.items():
        held.setdefault(device.process_index, set()).update(range(shards)[part])
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    check(
        sum(map(len, parts)) == shards,
        f"mesh.tensor {mesh.shape['tensor']} does not fit the devices of a process: their parts of a batch overlap; "
        "choose one that divides their number, or is a multiple of it",
    )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def split_rows(mesh: Mesh | None, array: jax.Array) -> jax.Array:
    """`array`, traced, with its rows laid out as those of a batch are, and nothing else of it split."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, BATCH_SPEC))


def put_batch(mesh: Mesh, rows: np.ndarray, spec: P = BATCH_SPEC) -> jax.Array:
    """The global array laid out by `spec`, of which this process holds the part `rows`."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)


def put_whole(mesh: Mesh, array: np.ndarray, spec: P = BATCH_SPEC) -> jax.Array:
    """The global array laid out by `spec`, which every process has as a whole."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[part])
