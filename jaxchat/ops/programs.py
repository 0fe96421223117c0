"""Kernels within programs: lowered once, split as a mesh splits arrays, kept between runs with what JAX compiles."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jaxlib
from etils import epath
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxchat.ops.gpu import multiprocessors


def keep_compiled() -> None:
    """Has JAX keep compiled programs for the next start, those of several devices with `partitioned` functions too."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxchat/compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start has a dozen of small programs too
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)


def lowered_once(call: Callable, operands: Sequence[Array], target: str) -> Any:
    """call(*operands), where `call` is a kernel whose lowering, to the custom call `target`, takes long: half a second
    for one by Mosaic.

    A process lowers it once for operands of such shapes, however many layers or devices have it, and another process
    finds it beside the compiled programs that JAX keeps. For arrays that several devices may share, so that each has a
    part of them, it is lowered only if they turn out not to: then once for each program.
    """
    jaxpr = jax.make_jaxpr(call)(*operands)
    made_for = jax.__version__, jaxlib.__version__, multiprocessors(), jaxpr
    key = hashlib.sha256(" ".join(map(str, made_for)).encode()).hexdigest()
    if _shared.get() and jax.device_count() > 1:
        return _LATER.setdefault(key, jax.jit(call))(*operands)
    if key not in _LOWERED:
        _LOWERED[key] = _kept(key) or _lower(key, call, operands, target)
    return _LOWERED[key].call(*operands)


_LOWERED: dict[str, jax.export.Exported] = {}
_LATER: dict[str, Callable] = {}
_shared = contextvars.ContextVar("shared", default=False)  # whether a function to be `partitioned` is traced as a whole


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
            token = _shared.set(True)
            try:
                return call(*arrays)
            finally:
                _shared.reset(token)

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
        settings = str((rule, whole, summed))
        axes = rule.replace(",", " ").split()  # XLA wants the special ones in their order here
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
            # In a program for several devices stands nothing of this function but where it lies in memory, which JAX's
            # key to compiled programs leaves out (`keep_compiled`). The name of a function around it is in the key.
            text = f"{_CODE} {settings} {jax.make_jaxpr(whole_call)(*arrays)}"
            around = functools.partial(wrapped)
            around.__name__ = f"{call.__name__}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            return jax.jit(around)(*arrays)

        return named

    return wrap


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# By what a device's part is computed; of the files as they are now, when they are imported.
_CODE = f"{jax.__version__} {jaxlib.__version__} {_digest(Path(__file__).parent)}"


def _axes(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _of(split: dict[str, tuple[str, ...]], dims: Sequence[str]) -> list[str]:
    return [axis for dim in dims for axis in split.get(dim, ())]
