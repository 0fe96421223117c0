"""Muon: momentum, then the nearest semi-orthogonal matrix, for the weight matrices of a network.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/. Unlike `optax.contrib.muon` it orthogonalises all matrices of a shape as one
stack, which a mesh shares out: a few large collectives a step and no work done twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
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

Polynomial = tuple[float, float, float]
NORM_EPS = 1e-7
# With three, rounding to bf16 made one of a thousand small random matrices blow up: a Gram matrix that goes on without
# being computed anew gets negative eigenvalues, and each step makes them larger.
STEPS_AT_ONCE = 2
# Iterations whose first one multiplies small singular values by more than this go one at a time. Those of Polar
# Express, by 8, bring singular values up to 1.9 on the way; two at once made one of a thousand small matrices blow up.
STEEP = 5.0


class MuonState(NamedTuple):
    """`count` updates done; `momentum` like the parameters, in fp32."""

    count: Array
    momentum: Any


class NorMuonState(NamedTuple):
    """As `MuonState`; `variance`, in fp32, has for each matrix [m, n] one of [1, n] or [m, 1]."""

    count: Array
    momentum: Any
    variance: Any


@dataclass(frozen=True)
class Direction:
    """How the momentum [fan_in, fan_out] of a matrix becomes the direction in which it moves.

    Attributes:
      polynomials: (a, b, c) of each iteration of `newton_schulz`.
      safety: the matrix is divided by so many times its Frobenius norm first.
      equalize: gives the columns, which are the outputs, one norm before the iterations: "MuonEq".
      rescale: gives the result the Frobenius norm of a semi-orthogonal matrix, sqrt(min(m, n)): "Muon+".
      variance_decay: of the running mean of the squares of each output, or of each input where there are more of
        these; the result is divided by its root and keeps its Frobenius norm. None: it is not. Source: Li et al.,
        "NorMuon" (2025), arXiv:2510.05491.
      dtype: of the products.
    """

    polynomials: tuple[Polynomial, ...]
    safety: float = 1.0
    equalize: bool = False
    rescale: bool = False
    variance_decay: float | None = None
    dtype: DTypeLike = jnp.bfloat16

    def __call__(
        self, stack: Float[Array, "L m n"], variance: Float[Array, "L _ _"] | None = None
    ) -> tuple[Float[Array, "L m n"], Float[Array, "L _ _"] | None]:
        """The directions in `dtype`, and the new variances."""
        if self.equalize:
            stack = equalize_columns(stack)
        x = newton_schulz(stack, self.polynomials, self.dtype, safety=self.safety)
        if not self.rescale and variance is None:
            return x, None
        axis = variance_axis(stack.shape[1:])
        squares = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axis + 1, keepdims=True)
        length, size = stack.shape[axis + 1], min(stack.shape[1:])
        factor = jnp.ones((stack.shape[0], 1, 1), jnp.float32)
        if self.rescale:
            factor = jnp.sqrt(size) * _inverse_root(length * squares.sum((1, 2), keepdims=True))
        if variance is not None:
            assert self.variance_decay is not None
            squares = factor**2 * squares
            variance = self.variance_decay * variance + (1 - self.variance_decay) * squares
            inverse = _inverse_root(variance)
            # The norms before and after follow from the mean squares: no further pass over the matrices.
            before = squares.sum((1, 2), keepdims=True)
            after = (squares * inverse**2).sum((1, 2), keepdims=True)
            factor = factor * inverse * jnp.sqrt(before) * _inverse_root(after)
        return (x.astype(jnp.float32) * factor).astype(x.dtype), variance


def equalize_columns(stack: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """Gives the columns of each matrix the root mean square of their norms; a column of zeros stays zero."""
    x = stack.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), 1, keepdims=True)
    return (x * jnp.sqrt(jnp.mean(squares, 2, keepdims=True)) * _inverse_root(squares)).astype(stack.dtype)


def variance_axis(shape: tuple[int, ...]) -> int:
    """The axis of a matrix [fan_in, fan_out] over which NorMuon takes the mean of its squares: the shorter one."""
    return 0 if shape[1] >= shape[0] else 1


def _inverse_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / sqrt(x), and 0 where x is."""
    return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def newton_schulz(
    stack: Float[Array, "L m n"],
    polynomials: Sequence[Polynomial],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    safety: float = 1.0,
) -> Float[Array, "L m n"]:
    """Moves the singular values of each matrix towards 1 and keeps its singular vectors.

    One step is X <- a X + b (X X^T) X + c (X X^T)^2 X with its `polynomials`' (a, b, c), and X is divided by `safety`
    times its Frobenius norm before the first. It is computed in `dtype`, the result's too. The quintic of the source
    leaves singular values between about 0.7 and 1.2; a zero matrix stays zero.

    A step is also X <- S X, with S = a I + b G + c G^2 and the Gram matrix G = X X^T; and then G becomes S G S. So
    `STEPS_AT_ONCE` steps go by square matrices alone, all of them polynomials of one G, which are symmetric and
    commute; the wide X is multiplied once, by the product of their S. `STEEP` ones go one at a time.
    """
    steps = len(polynomials)
    tall = stack.shape[1] > stack.shape[2]
    x = stack.astype(dtype)
    gram = gram_of(x, tall)
    # The iteration converges where no singular value is above 1, and none is above the Frobenius norm, whose square is
    # the trace of X X^T. That X is divided by it comes with the first products: no pass over X is spent on it.
    norm = jnp.sqrt(jnp.sum(jnp.diagonal(gram, axis1=1, axis2=2).astype(jnp.float32), 1))[:, None, None]
    scale = 1 / (safety * norm + NORM_EPS)
    gram = (gram * scale**2).astype(dtype)
    diagonal = jnp.arange(gram.shape[1])
    at_once = 1 if polynomials[0][0] > STEEP else STEPS_AT_ONCE
    for first in range(0, steps, at_once):
        if first > 0:
            gram, scale = gram_of(x, tall), 1.0
        last = min(first + at_once, steps) - 1
        for step in range(first, last + 1):
            a, b, c = polynomials[step]
            # Only the diagonal is written again, in its place.
            factor = symmetric_product(gram, gram, c, b).at[:, diagonal, diagonal].add(a, unique_indices=True)
            if step < last:
                gram = symmetric_product(factor, symmetric_product(factor, gram))
            product = symmetric_product(factor, product) if step > first else (scale * factor).astype(dtype)
        x = stack_product(x, product) if tall else stack_product(product, x)
    return x


def scale_by_muon(
    momentum: optax.Schedule, direction: Direction, *, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Muon's update before learning rate and sign, for trees of matrices [fan_in, fan_out].

    With mu = momentum(count): buffer <- mu buffer + (1 - mu) g, then Nesterov's (1 - mu) g + mu buffer becomes a
    `direction` and is scaled by sqrt(max(1, fan_out / fan_in)), which keeps the size of a layer's change of output
    whatever its shape. Over a `mesh` of several devices each of them orthogonalises its share of the matrices.
    `muon_momentum`, if the update is given one, takes the place of the schedule's.
    """
    dtype = direction.dtype

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        count = jnp.zeros((), jnp.int32)
        if direction.variance_decay is None:
            return MuonState(count, zeros)
        sums = jax.tree.map(lambda p: jnp.sum(p, variance_axis(p.shape), keepdims=True), zeros)
        return NorMuonState(count, zeros, sums)

    def update(updates, state, params=None, *, muon_momentum=None, **extra):
        del params, extra
        mu = momentum(state.count) if muon_momentum is None else muon_momentum
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        buffer = jax.tree.map(lambda m, g: mu * m + (1 - mu) * g, state.momentum, grads)
        nesterov = jax.tree.map(lambda m, g: (mu * m + (1 - mu) * g).astype(dtype), buffer, grads)
        # Both come out of one pass: else XLA computes the second again where the matrices are stacked.
        nesterov = jax.lax.optimization_barrier(nesterov)
        over = mesh if mesh is not None and mesh.size > 1 else None
        variance = state.variance if isinstance(state, NorMuonState) else None
        directions, variance = _directions(nesterov, variance, direction, over)
        updates = jax.tree.map(lambda d: d.astype(jnp.float32) * max(1.0, d.shape[1] / d.shape[0]) ** 0.5, directions)
        count: Any = optax.safe_increment(state.count)
        new = MuonState(count, buffer) if variance is None else NorMuonState(count, buffer, variance)
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _directions(matrices, variances, direction, mesh):
    """Stacks the matrices of a shape, calls `direction` on the stack, and takes the results apart again.

    Over a `mesh` the matrices of a stack are also partitioned alike, and every device, whatever its axis, takes an
    equal part of each stack. `variances` is None, or a tree like that of the matrices.
    """
    leaves, treedef = jax.tree.flatten(matrices)
    rows = jax.tree.leaves(variances)
    specs = [None] * len(leaves)
    if mesh is not None:
        # Without the axes that split nothing, so that matrices of a shape share a stack: fewer kernels to compile.
        specs = [
            PartitionSpec(*(axis if axis and mesh.shape[axis] > 1 else None for axis in sharding.spec))
            for sharding in jax.tree.leaves(shardings(mesh, matrices))
        ]
    groups = defaultdict(list)
    for index, leaf in enumerate(leaves):
        groups[leaf.shape, specs[index]].append(index)
    found, new_rows = [None] * len(leaves), [None] * len(rows)
    for (_, spec), members in groups.items():
        stack = stack_matrices([leaves[index] for index in members])
        variance = jnp.stack([rows[index] for index in members]) if rows else None
        if mesh is None:
            stack, variance = direction(stack, variance)
        else:
            stack, variance = _over_mesh(direction, stack, variance, mesh, spec)
        for row, index in enumerate(members):
            found[index] = stack[row]
            if variance is not None:
                new_rows[index] = variance[row]
    return jax.tree.unflatten(treedef, found), jax.tree.unflatten(treedef, new_rows) if rows else None


def _over_mesh(direction, stack, variance, mesh, spec):
    """`direction` on a stack whose matrices lie by `spec`: each device takes an equal part of it."""

    def place(x, layout):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout))

    count = stack.shape[0]
    layouts = _layouts(mesh, spec)
    stack = jnp.pad(stack, ((0, -count % mesh.size), (0, 0), (0, 0)))
    for layout in layouts:
        stack = place(stack, layout)
    if variance is not None:  # small, so it is gathered whole, there and back
        shape = variance.shape[1:]
        own = PartitionSpec(None, *(axis if size > 1 else None for axis, size in zip(spec, shape, strict=True)))
        variance = jnp.pad(variance, ((0, -count % mesh.size), (0, 0), (0, 0)))
        for layout in (own, PartitionSpec(), layouts[-1]):
            variance = place(variance, layout)
    stack, variance = jax.shard_map(direction, mesh=mesh, in_specs=layouts[-1], out_specs=layouts[-1])(stack, variance)
    for layout in reversed(layouts):
        stack = place(stack, layout)
    if variance is not None:
        variance = place(place(variance, PartitionSpec()), own)[:count]
    return stack[:count], variance


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
