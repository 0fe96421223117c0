"""Kernels lowered once for all layers, devices and processes that run them."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jaxlib
from etils import epath
from jaxtyping import Array

from jaxchat.devices.gpu import multiprocessors


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# What kernels are made with: JAX, and all operations as they were when this process imported them.
CODE = f"{jax.__version__} {jaxlib.__version__} {_digest(Path(__file__).parent)}"  # pyright: ignore[reportPrivateImportUsage]


def lowered_once(call: Callable, operands: Sequence[Array], target: str) -> Any:
    """Runs call(*operands), where `call` is a kernel that is slow to lower to the custom call `target`.

    Lowering one Mosaic kernel takes half a second. A process lowers it once for operands of these shapes, however many
    layers or devices run it, and other processes find it beside the compiled programs that JAX keeps. While a
    function is traced for arrays that several devices may share (`shared_arrays`), nothing is lowered ahead: what
    runs in the end is most likely the kernel for one device's part, of another shape.

    A kernel is known by its trace, and by the numbers and words that code within `inline_mgpu` takes from outside:
    these the trace does not show.
    """
    jaxpr = jax.make_jaxpr(call)(*operands)
    made_for = CODE, multiprocessors(), jaxpr, list(_taken(jaxpr.jaxpr))
    key = hashlib.sha256(" ".join(map(str, made_for)).encode()).hexdigest()
    if _shared.get() and jax.device_count() > 1:
        return _deferred.setdefault(key, jax.jit(call))(*operands)
    with _lock:  # threads that compile programs with the same kernel wait for one of them to lower it
        if key not in _lowered:
            _lowered[key] = _read(key) or _lower(key, call, operands, target)
    return _lowered[key].call(*operands)


@contextlib.contextmanager
def shared_arrays() -> Iterator[None]:
    """Marks the tracing of a function on arrays of which each device may hold only a part."""
    token = _shared.set(True)
    try:
        yield
    finally:
        _shared.reset(token)


_lock = threading.Lock()
_lowered: dict[str, jax.export.Exported] = {}
_deferred: dict[str, Callable] = {}
_shared = contextvars.ContextVar("shared", default=False)


def _taken(jaxpr: Any) -> Iterator[Any]:
    """What functions of `inline_mgpu` within a trace take from outside: numbers, words, and the names of functions."""
    for equation in jaxpr.eqns:
        if function := equation.params.get("mgpu_fn"):
            yield from _outside(function)
        for value in jax.tree.leaves(equation.params):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from _taken(inner)


def _outside(function: Callable) -> Iterator[Any]:
    for value in inspect.getclosurevars(function).nonlocals.values():
        if inspect.isfunction(value):
            yield value.__qualname__
            yield from _outside(value)
        elif _plain(value):
            yield value


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, int | float | str)


def _read(key: str) -> jax.export.Exported | None:
    try:
        return jax.export.deserialize(bytearray(_file(key).read_bytes()))
    except Exception:  # missing, truncated, or from another version: in each case it can be made again
        return None


def _lower(key: str, call: Callable, operands: Sequence[Array], target: str) -> jax.export.Exported:
    allowed = [jax.export.DisabledSafetyCheck.custom_call(target)]
    lowered = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=allowed)(*operands)
    with contextlib.suppress(OSError):  # a full disk costs the next start half a second
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(bytes(lowered.serialize()))
        part.replace(file)
    return lowered


def _file(key: str) -> epath.Path:
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if folder is None:
        raise FileNotFoundError
    return epath.Path(folder) / "kernels" / key
