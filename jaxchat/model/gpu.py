"""What the kernels for NVIDIA GPUs share: where they run, how those by Triton are started and reach memory, how a mesh
splits them all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import jaxlib
from etils import epath
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxchat.config import check

NORM_EPS = 1e-6  # of RMSNorm, in the kernels and in the formulas
INTERPRET = False  # tests run the kernels on the CPU


def capability() -> float:
    """The compute capability of this process's GPU, such as 9.0 for Hopper; 0 where it is none of NVIDIA's."""
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if nvidia else 0.0


def multiprocessors() -> int:
    """How many this process's GPU has, or the one that a program is lowered for."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.num_cores if abstract else jax.devices()[0].core_count


def fused(dtype: DTypeLike) -> bool:
    """Whether the kernels compute arrays of `dtype` in this process: an NVIDIA GPU (Ampere or later) and bf16."""
    return INTERPRET or (capability() >= 8.0 and jnp.dtype(dtype) == jnp.bfloat16)


def launch(
    kernel: Callable,
    grid: tuple[int, ...],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    warps: int,
    aliases: Mapping[int, int] | None = None,
) -> Callable:
    """The kernel over a grid of programs; operands and results are flat. `aliases`: an operand's number to that of
    the result in its place.

    Raises:
      UserError: a result has more elements than the kernels' 32-bit indices reach.
    """
    elements = max(math.prod(array.shape) for array in out)
    check(elements < 1 << 31, f"{elements:,} elements are too many for a kernel; lower the stage's device-rows")
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out,
        input_output_aliases=dict(aliases or {}),
        interpret=INTERPRET,
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    )


def lowered_once(call: Callable, operands: Sequence[Array], target: str) -> Any:
    """call(*operands), where `call` is a kernel whose lowering, to the custom call `target`, takes long: half a second
    for one by Mosaic.

    A process lowers it once for operands of such shapes, however many layers or devices have it, and another process
    finds it beside the compiled programs that JAX keeps. For arrays that several devices share, of which each will have
    a part, it is not lowered.
    """
    if _SHARED and jax.device_count() > 1:
        return call(*operands)
    jaxpr = jax.make_jaxpr(call)(*operands)
    made_for = jax.__version__, jaxlib.__version__, multiprocessors(), jaxpr
    key = hashlib.sha256(" ".join(map(str, made_for)).encode()).hexdigest()
    if key not in _LOWERED:
        _LOWERED[key] = _kept(key) or _lower(key, call, operands, target)
    return _LOWERED[key].call(*operands)


_LOWERED: dict[str, jax.export.Exported] = {}
_SHARED: list[Callable] = []  # the functions that are being traced for whole arrays, to be `partitioned`


def _kept(key: str) -> jax.export.Exported | None:
    try:
        return jax.export.deserialize(bytearray(_file(key).read_bytes()))
    except Exception:  # not there, cut off, or of another version: whatever it is, it can be made again
        return None


def _lower(key: str, call: Callable, operands: Sequence[Array], target: str) -> jax.export.Exported:
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    lowered = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=allowed)(*operands)
    with contextlib.suppress(OSError):  # a full disk costs the next start half a second
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(lowered.serialize())
        part.replace(file)
    return lowered


def _file(key: str) -> epath.Path:
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        raise FileNotFoundError
    return epath.Path(folder) / "kernels" / key


def load(ref, index, mask=None) -> Array:
    """Elements in fp32, 0 where the mask is false."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else 0.0).astype(jnp.float32)


def store(ref, index, value, mask=None) -> None:
    """Elements in the dtype of `ref`, where the mask is true."""
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def fitting(count: int, most: int) -> int:
    """The largest power of 2, at most `most`, that divides `count`."""
    return min(1 << most.bit_length() - 1, count & -count)


def partitioned(rule: str, whole: tuple[str, ...] = (), summed: tuple[str, ...] = ()) -> Callable:
    """Makes each device run the decorated function on its part of the arrays, which `rule` describes as einsum would.

    An axis is split as it is in the first operand that has it, unless it is one of `whole`, which the function needs in
    one piece; one that results alone have is not split. Over the axes of `summed`, which are split alike, the function
    adds up, and then over devices too.
    """
    operands, results = ([dims.split() for dims in side.split(",")] for side in rule.split("->"))

    def wrap(call):
        @functools.wraps(call)
        def whole_call(*arrays):
            _SHARED.append(call)
            try:
                return call(*arrays)
            finally:
                _SHARED.pop()

        def partition(mesh, args, outs):
            split = dict.fromkeys(whole, ())
            for dims, arg in zip(operands, args, strict=True):
                spec = arg.sharding.spec
                for dim, axes in zip(dims, (*spec, *[None] * (len(dims) - len(spec))), strict=True):
                    if dim not in split:
                        # An array is not split twice over one axis of the mesh.
                        beside = {axis for array in (*operands, *results) if dim in array for axis in _of(split, array)}
                        split[dim] = tuple(axis for axis in _axes(axes) if axis not in beside)
                        split |= dict.fromkeys(summed, split[dim]) if dim in summed else {}
            into, out_of = (
                tuple(NamedSharding(mesh, P(*(split.get(dim) or None for dim in dims))) for dims in side)
                for side in (operands, results)
            )
            over = split[summed[0]] if summed else ()
            part = (lambda *parts: jax.lax.psum(call(*parts), over)) if over else call
            return mesh, part, out_of if len(out_of) > 1 else out_of[0], into

        wrapped = custom_partitioning(whole_call)
        axes = rule.replace(",", " ").split()  # XLA wants the special ones in their order here
        wrapped.def_partition(
            partition=partition,
            sharding_rule=rule,
            need_replication_factors=tuple(sorted(whole, key=axes.index)),
            reduction_factors=tuple(sorted(summed, key=axes.index)),
        )
        return wrapped

    return wrap


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _of(split: dict[str, tuple[str, ...]], dims: Sequence[str]) -> list[str]:
    return [axis for dim in dims for axis in split.get(dim, ())]
