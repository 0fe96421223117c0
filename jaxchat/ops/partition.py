"""Functions whose kernels each device of a mesh runs on its own part of the arrays."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.ops.lowering import CODE, shared_arrays


def partitioned(rule: str, whole: tuple[str, ...] = (), summed: tuple[str, ...] = ()) -> Callable:
    """Makes each device run the decorated function on its part of the arrays, whose axes `rule` names as einsum does.

    An axis is split as it is in the first operand that has it. The axes in `whole` are never split, and neither is an
    axis that only results have. The axes in `summed` are split alike: the function sums over them, and the partial sums
    are then added over the devices.

    JAX offers `shard_map` and `custom_partitioning` for this. `shard_map` would need the mesh and a fixed layout at
    every call; with `custom_partitioning` XLA asks for the layout, so the function follows whatever its operands have.
    """
    operands, results = ([dims.split() for dims in side.split(",")] for side in rule.split("->"))

    def wrap(call):
        @functools.wraps(call)
        def whole_call(*arrays):
            with shared_arrays():
                return call(*arrays)

        def partition(mesh, args, outs):
            split = _split_axes([arg.sharding.spec for arg in args], operands, results, whole, summed)
            into, out_of = (
                tuple(NamedSharding(mesh, P(*(split.get(dim) or None for dim in dims))) for dims in side)
                for side in (operands, results)
            )
            over = split[summed[0]] if summed else ()
            part = (lambda *parts: jax.lax.psum(call(*parts), over)) if over else call
            return mesh, part, out_of if len(out_of) > 1 else out_of[0], into  # pyright: ignore[reportGeneralTypeIssues]

        wrapped = custom_partitioning(whole_call)
        settings = str((rule, whole, summed))
        axes = rule.replace(",", " ").split()  # XLA wants the special axes in the order of the rule
        wrapped.def_partition(
            partition=partition,
            sharding_rule=rule,
            need_replication_factors=tuple(sorted(whole, key=axes.index)),
            reduction_factors=tuple(sorted(summed, key=axes.index)),
        )

        @functools.wraps(call)
        def named(*arrays):
            if jax.device_count() == 1:
                return wrapped(*arrays)
            # A program for several devices contains only the memory address of this function, and `keep_compiled` has
            # JAX leave addresses out of the key to the programs it keeps. So that a changed kernel is not mistaken for
            # the old one, the code's digest goes into the name of a function around the call: names are in the key.
            text = f"{CODE} {settings} {jax.make_jaxpr(whole_call)(*arrays)}"
            around = functools.partial(wrapped)
            around.__name__ = f"{call.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"  # pyright: ignore[reportAttributeAccessIssue]
            return jax.jit(around)(*arrays)

        return named

    return wrap


def _split_axes(
    specs: Sequence[P],
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    whole: tuple[str, ...],
    summed: tuple[str, ...],
) -> dict[str, tuple[str, ...]]:
    """For each axis of the rule, the mesh axes that split it."""
    split: dict[str, tuple[str, ...]] = dict.fromkeys(whole, ())
    for dims, spec in zip(operands, specs, strict=True):
        for dim, axes in zip(dims, (*spec, *[None] * (len(dims) - len(spec))), strict=True):
            if dim in split:
                continue
            # No array may be split twice over one axis of the mesh.
            arrays = [array for array in (*operands, *results) if dim in array]
            taken = {axis for array in arrays for other in array for axis in split.get(other, ())}
            split[dim] = tuple(axis for axis in _as_tuple(axes) if axis not in taken)
            if dim in summed:
                split |= dict.fromkeys(summed, split[dim])
    return split


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
