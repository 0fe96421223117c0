"""Muon: momentum, then the nearest semi-orthogonal matrix, for the weight matrices of a network.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. Unlike `optax.contrib.muon` it orthogonalises all matrices of a shape as one
stack, which a mesh shares out: a few large collectives a step and no work done twice.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxchat.model.parameters import shardings
from jaxchat.ops.stack import gram as gram_of
from jaxchat.ops.stack import stack as stack_matrices
from jaxchat.ops.stack import stack_product, symmetric_product

NORM_EPS = 1e-7
# With three, rounding to bf16 made one of a thousand small random matrices blow up: a Gram matrix that goes on without
# being computed anew gets negative eigenvalues, and each step makes them larger.
STEPS_AT_ONCE = 2


class MuonState(NamedTuple):
    """`count` updates done; `momentum` like the parameters, in fp32."""

    count: Array
    momentum: Any


def newton_schulz(
    stack: Float[Array, "L m n"],
    steps: int,
    coefficients: tuple[float, float, float],
    dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "L m n"]:
    """Moves the singular values of each matrix towards 1 and keeps its singular vectors.

    One step is X <- a X + b (X X^T) X + c (X X^T)^2 X with `coefficients` (a, b, c). It is computed in `dtype`, the
    result's too. The quintic of the source leaves singular values between about 0.7 and 1.2; a zero matrix stays zero.

    A step is also X <- S X, with S = a I + b G + c G^2 and the Gram matrix G = X X^T; and then G becomes S G S. So
    `STEPS_AT_ONCE` steps go by square matrices alone, all of them polynomials of one G, which are symmetric and
    commute; the wide X is multiplied once, by the product of their S.
    """
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = stack.astype(dtype)
    gram = gram_of(x, tall)
    # The iteration converges where no singular value is above 1, and none is above the Frobenius norm, whose square is
    # the trace of X X^T. That X is divided by it comes with the first products: no pass over X is spent on it.
    norm = jnp.sqrt(jnp.sum(jnp.diagonal(gram, axis1=1, axis2=2).astype(jnp.float32), 1))[:, None, None]
    scale = 1 / (norm + NORM_EPS)
    gram = (gram * scale**2).astype(dtype)
    diagonal = jnp.arange(gram.shape[1])
    for first in range(0, steps, STEPS_AT_ONCE):
        if first > 0:
            gram, scale = gram_of(x, tall), 1.0
        last = min(first + STEPS_AT_ONCE, steps) - 1
        for step in range(first, last + 1):
            # Only the diagonal is written again, in its place.
            factor = symmetric_product(gram, gram, c, b).at[:, diagonal, diagonal].add(a, unique_indices=True)
            if step < last:
                gram = symmetric_product(factor, symmetric_product(factor, gram))
            product = symmetric_product(factor, product) if step > first else (scale * factor).astype(dtype)
        x = stack_product(x, product) if tall else stack_product(product, x)
    return x


def scale_by_muon(
    momentum: optax.Schedule,
    *,
    steps: int,
    coefficients: tuple[float, float, float],
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
) -> optax.GradientTransformation:
    """Muon's update before learning rate and sign, for trees of matrices [fan_in, fan_out].

    With mu = momentum(count): buffer <- mu buffer + (1 - mu) g, then Nesterov's (1 - mu) g + mu buffer is
    orthogonalised in `dtype` and scaled by sqrt(max(1, fan_out / fan_in)), which keeps the size of a layer's change of
    output whatever its shape. Over a `mesh` of several devices each of them orthogonalises its share of the matrices.
    """
    orthogonalize = partial(newton_schulz, steps=steps, coefficients=coefficients, dtype=dtype)

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        return MuonState(jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None):
        del params
        mu = momentum(state.count)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        buffer = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: (mu * m + (1 - mu) * g).astype(dtype), buffer, grads)
        # Both come out of one pass: else XLA computes the second again where the matrices are stacked.
        nesterov = jax.lax.optimization_barrier(nesterov)
        if mesh is not None and mesh.size > 1:
            directions = _orthogonalize_over_mesh(nesterov, orthogonalize, mesh)
        else:
            directions = _orthogonalize_stacks(nesterov, orthogonalize)
        updates = jax.tree.map(lambda d: d.astype(jnp.float32) * max(1.0, d.shape[1] / d.shape[0]) ** 0.5, directions)
        return updates, MuonState(optax.safe_increment(state.count), buffer)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init, update)


def _orthogonalize_stacks(matrices, orthogonalize, specs=None):
    """Stacks the leaves of a shape, calls `orthogonalize(stack)`, and takes the result apart again.

    With `specs`, a PartitionSpec a leaf, the leaves of a stack are also partitioned alike, and the call is
    `orthogonalize(stack, spec)`.
    """
    leaves, treedef = jax.tree.flatten(matrices)
    groups = defaultdict(list)
    for index, leaf in enumerate(leaves):
        groups[leaf.shape, specs[index] if specs else None].append(index)
    results = [None] * len(leaves)
    for (_, spec), members in groups.items():
        stack = stack_matrices([leaves[index] for index in members])
        stack = orthogonalize(stack) if spec is None else orthogonalize(stack, spec)
        for row, index in enumerate(members):
            results[index] = stack[row]
    return jax.tree.unflatten(treedef, results)


def _orthogonalize_over_mesh(matrices, orthogonalize, mesh):
    """As `_orthogonalize_stacks`; every device of the mesh, whatever its axis, takes an equal part of each stack."""

    def orthogonalize_stack(stack, spec):
        count = stack.shape[0]
        stack = jnp.pad(stack, ((0, -count % mesh.size), (0, 0), (0, 0)))
        layouts = _layouts(mesh, spec)
        for layout in layouts:
            stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, layout))
        stack = jax.shard_map(orthogonalize, mesh=mesh, in_specs=layouts[-1], out_specs=layouts[-1])(stack)
        for layout in reversed(layouts):
            stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, layout))
        return stack[:count]

    # Without the axes that split nothing, so that matrices of a shape share a stack: fewer kernels to compile.
    specs = [
        PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in sharding.spec))
        for sharding in jax.tree.leaves(shardings(mesh, matrices))
    ]
    return _orthogonalize_stacks(matrices, orthogonalize_stack, specs)


def _layouts(mesh, spec):
    """From a stack of matrices that lie by `spec` to a stack whose matrices are whole, shared out over all devices.

    One mesh axis moves at a time, an all-to-all for the stack. Left to itself, XLA gathers each matrix on its own, and
    where two axes move at once it replicates the stack.
    """
    moved, left = [], list(spec)
    layouts = [PartitionSpec(None, *left)]
    for dimension, axis in enumerate(spec):
        if axis is not None:
            moved.append(axis)
            left[dimension] = None
            layouts.append(PartitionSpec(tuple(moved), *left))
    rest = [axis for axis in mesh.axis_names if axis not in moved]
    return [*layouts, PartitionSpec((*moved, *rest))]
