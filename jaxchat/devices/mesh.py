"""The devices as a mesh with the axes `data`, `fsdp` and `tensor`, and batches laid out on it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig
from jaxchat.errors import check

AXES = ("data", "fsdp", "tensor")
# How the rows of a batch are split: fsdp is data parallelism too, with sharded parameters.
BATCH_SPEC = P(("data", "fsdp"))
NOWHERE = P()  # how what is not split is laid out, such as a scalar: each device has it


def set_xla_flags(*flags: str) -> None:
    """Sets XLA's flags for training, and `flags`, before JAX is used. The user's own flags come last, and win."""
    # Matrix products from cuBLAS only: trying out Triton's takes longer than all other compilation, and gains nothing.
    ours = ("--xla_gpu_enable_triton_gemm=false", *flags)
    users = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag not in ours]
    os.environ["XLA_FLAGS"] = " ".join([*ours, *users])


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm]
    """The mesh over `devices` (default: all) in the shape that `config` sets.

    Raises:
      UserError: the shape does not use exactly these devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count, model = len(devices), config.fsdp * config.tensor
    divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
    check(
        count % model == 0,
        f"mesh.fsdp {config.fsdp} x mesh.tensor {config.tensor} is {model}, which does not divide the number of "
        f"devices, {count}; choose a product among {divisors}",
    )
    data = count // model
    check(
        config.data in (-1, data),
        f"mesh.data {config.data} x fsdp {config.fsdp} x tensor {config.tensor} is {config.data * model} devices, but "
        f"there are {count}; set mesh.data to {data}, or to -1 for all that the other axes leave",
    )
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_shards(mesh: Mesh) -> int:
    """The number of parts that a batch's rows are split into: the axes `data` and `fsdp` together."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch's rows this process holds, as (index, number of parts): (0, 1) for a single process.

    Processes that differ only in their place along `tensor` hold the same part.

    Raises:
      UserError: the parts of two processes overlap.
    """
    shards = data_shards(mesh)
    places = NamedSharding(mesh, BATCH_SPEC).devices_indices_map((shards,))
    held: dict[int, set[int]] = {}
    for device, (part,) in places.items():
        held.setdefault(device.process_index, set()).update(range(shards)[part])
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    check(
        sum(map(len, parts)) == shards,
        f"mesh.tensor {mesh.shape['tensor']} does not suit the number of devices per process: their parts of a batch "
        "overlap; choose a divisor or a multiple of that number",
    )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def split_rows(mesh: Mesh | None, array: jax.Array) -> jax.Array:
    """`array`, traced, with its rows split like those of a batch, and its other dimensions not split."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, BATCH_SPEC))


def put_batch(mesh: Mesh, rows: np.ndarray, spec: P = BATCH_SPEC) -> jax.Array:
    """The global array with the sharding `spec`, of which `rows` is the part of this process."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)


def put_whole(mesh: Mesh, array: np.ndarray, spec: P = BATCH_SPEC) -> jax.Array:
    """The global array with the sharding `spec`, given as a whole by every process."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda part: array[part])
