"""A candidate for `between_attentions`: the kernel in use, with counters of a step, and with a look at the next layer.

Counters of the kernel's semaphores come from JAX, which clears them before each launch, by a small kernel. Here they
are an operand that all launches of a step share, as a mailbox is: they count on, and who waits for a count waits for
that of all layers before it too. The kernel writes to what XLA takes for an operand, so the counters must be made in
the step itself (`new_counters`), from something that differs from step to step.

While the last products wait for each other, and during the attention that follows, the memory has little to do. So
whoever loads weights then asks for the first of the next layer's too, for the level-2 cache (`AHEAD`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from jaxchat.devices.gpu import multiprocessors
from jaxchat.ops import few_rows

COUNTERS = 512  # at least as many as the kernel has semaphores
AHEAD = 0  # bytes of the next layer's weights that are asked for
AFTER = 1  # the product that is waited for before: nothing that this layer needs may come later for it

Counters = Int32[Array, " COUNTERS"]


def new_counters(positions: Int[Array, " R"]) -> Counters:
    """The counters of a step; `positions` are those of its tokens, which are never negative."""
    return jnp.broadcast_to(jnp.minimum(positions[0], 0), COUNTERS)


def between_attentions(
    x: Float[Array, "R D"],
    mixed: Float[Array, "R A"],
    o: Float[Array, "A D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    joint: Float[Array, "D J"],
    counters: Counters,
    layer: int,
    ahead: Sequence[Array] = (),
) -> tuple[Float[Array, "R D"], Float[Array, "R J"]]:
    """What the operation in use computes.

    Args:
      layer: counts from 0 the launches with these counters.
      ahead: the next layer's weights, in the order in which they are needed.
    """
    ahead = [weight for weight, count in zip(ahead, _slots(ahead), strict=True) if count]
    return _traced(x, mixed, o, up, down, joint, counters, jnp.full(1, layer + 1, jnp.int32), ahead)


@jax.jit  # traced once for all layers
def _traced(x, mixed, o, up, down, joint, counters, times, ahead):
    last = few_rows._Product.of(joint, "joint", source=4, normed=True)
    with _changed(counters, times, ahead):
        chain = [*few_rows._block_products(x, mixed, o, up, down), last]
        return tuple(few_rows._chain([x, mixed], [o, up, down, joint], chain)[2:])


def _slots(ahead: Sequence[Array]) -> list[int]:
    """How many parts of each weight, each as large as a slot of the kernel's ring, are asked for ahead."""
    left, counts = AHEAD // (2 * few_rows.DEPTH * few_rows.WIDE), []
    for weight in ahead:
        counts.append(min(left, math.prod(weight.shape) // (few_rows.DEPTH * few_rows.WIDE)))
        left -= counts[-1]
    return counts


@contextlib.contextmanager
def _changed(counters: Counters, times: Int32[Array, "1"], ahead: Sequence[Array]) -> Iterator[None]:
    """Within it, `few_rows` makes kernels that count in `counters`, wait for `times` as much, and look `ahead`."""
    refs: list[Any] = []  # of the three, while a kernel is traced
    kernel, lowered, extra = plgpu.kernel, few_rows.lowered_once, (counters, times, *ahead)

    def kernel_with_more(run, *, out_type, **settings):
        def run_with_more(*all_refs):
            end = len(all_refs) - len(out_type)
            begin = end - len(extra)
            refs[:] = all_refs[begin:end]
            run(*all_refs[:begin], *all_refs[end:])

        return kernel(run_with_more, out_type=out_type, **settings)

    def signal(ref, **_):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def add(context, ref):
            utils.warpgroup_barrier()  # all threads have written
            utils.SemaphoreRef(utils.memref_ptr(ref)).signal(1, memory_scope="gpu")

        add(ref)  # pyright: ignore[reportCallIssue] (the context comes from JAX)

    def wait(ref, value, **_):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
        def until(context, ref, times_ref):
            zero = utils.c(0, utils.ir.IndexType.get())  # pyright: ignore[reportPrivateImportUsage]
            times = utils.memref.load(times_ref, [zero])  # pyright: ignore[reportPrivateImportUsage]
            target = utils.arith.muli(  # pyright: ignore[reportPrivateImportUsage]
                times, utils.c(value, times.type)
            )
            utils.SemaphoreRef(utils.memref_ptr(ref)).wait(target, decrement=False, memory_scope="gpu")

        until(ref, refs[1])  # pyright: ignore[reportCallIssue] (the context comes from JAX)

    class LooksAhead(few_rows._Block):
        def work(self, weights) -> None:
            super().work(weights)

            @pl.when(lax.axis_index("group") == few_rows.WEIGHTS)
            def _():
                self.wait_for(AFTER)
                for weight, count in zip(refs[2:], _slots(ahead), strict=True):
                    self.ask_for(weight, count)

        def ask_for(self, weight, count: int) -> None:
            block, blocks, wide = lax.axis_index("blocks"), multiprocessors(), weight.shape[1] // few_rows.WIDE

            @pl.loop(0, lax.div(count - block + blocks - 1, blocks))
            def _(k):
                slot = block + k * blocks
                inner = pl.ds(lax.div(slot, wide) * few_rows.DEPTH, few_rows.DEPTH)
                plgpu.async_prefetch(weight.at[inner, pl.ds(lax.rem(slot, wide) * few_rows.WIDE, few_rows.WIDE)])

    with (
        mock.patch.object(plgpu, "kernel", kernel_with_more),
        mock.patch.object(plgpu, "semaphore_signal", signal),
        mock.patch.object(plgpu, "semaphore_wait", wait),
        mock.patch.object(pl, "get_global", lambda kind: refs[0]),
        mock.patch.object(few_rows, "lowered_once", lambda call, given, to: lowered(call, [*given, *extra], to)),
        mock.patch.object(few_rows, "_Block", LooksAhead if ahead else few_rows._Block),
    ):
        yield
