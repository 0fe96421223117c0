"""What the devices compute of a batch: the surprise of each scored token, and the likeliest token in its place."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxchat.devices.mesh import BATCH_SPEC
from jaxchat.eval.core.batches import Arrays
from jaxchat.model.config import GPTConfig
from jaxchat.model.generation import init_pages, paged_hidden, reads_previous
from jaxchat.model.gpt import Params
from jaxchat.ops.compute import Compute
from jaxchat.ops.cross_entropy import capped_logits, nll_of
from jaxchat.ops.pages import PAGE, Place

AT_ONCE = 512  # positions whose logits are held


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    config: GPTConfig, compute: Compute, params: Params, batch: Arrays
) -> tuple[Float[Array, " S"], Int[Array, " S"]]:
    """For each place of the batch: -log p(target) in nats, and the id with the highest logit, the first among equals.

    Logits and their softmax are fp32. Only those of scored places are computed. With fp32 in `compute`, matrix products
    are fp32 too, where a GPU would round their operands to TF32.

    On a mesh each shard of the data and fsdp axes computes its own rows; all devices get the whole result.
    """

    def run(params: Params, batch: Arrays) -> tuple[Array, Array]:
        tokens, *place = map(jnp.asarray, batch[:4])
        place = Place(*place)
        pages = init_pages(config, len(tokens), compute.dtype)
        before = _before(tokens, place) if reads_previous(config) else None
        hidden, _ = paged_hidden(config, params, tokens, place, pages, compute.dtype, before=before)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        head = params["head"]["kernel"].astype(compute.dtype)
        at_once = min(AT_ONCE, len(batch.places))

        def some(step: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            first = step * at_once
            places, targets = (jax.lax.dynamic_slice_in_dim(x, first, at_once) for x in (batch.places, batch.targets))
            scores = capped_logits(hidden[places], head, config.vocab_size, config.logit_cap)
            new = nll_of(scores, targets)[1], jnp.argmax(scores, axis=-1).astype(jnp.int32)
            nll, best = (
                jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0) for x, y in zip(found, new, strict=True)
            )
            return nll, best

        nothing = jnp.zeros(batch.places.shape, jnp.float32), jnp.zeros(batch.places.shape, jnp.int32)
        return jax.lax.fori_loop(0, (batch.scored[0] + at_once - 1) // at_once, some, nothing)

    exact = jax.default_matmul_precision("highest") if compute.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        if compute.mesh is None:
            return run(params, batch)
        mesh, axes = compute.mesh, set(BATCH_SPEC[0])
        if all(mesh.shape[axis] == 1 for axis in mesh.axis_names if axis not in axes):
            axes = set(mesh.axis_names)  # where nothing else is split, nothing is left to the compiler
        split = jax.shard_map(
            run, mesh=mesh, in_specs=(P(), BATCH_SPEC), out_specs=BATCH_SPEC, axis_names=axes, check_vma=False
        )
        return jax.lax.with_sharding_constraint(split(params, batch), NamedSharding(mesh, P()))


def _before(tokens: Int[Array, "R _"], place: Place) -> Int[Array, " R"]:
    """The token before each row's first, the last of the page before; -1 where there is none."""
    page = jnp.take_along_axis(place.table, place.start[:, None] // PAGE - 1, axis=1, mode="clip")[:, 0]
    return jnp.where(place.start > 0, tokens[page, -1], -1)


def checksums(params: Params) -> list[int]:
    """A number for each parameter, by its bits and their places: the same on any mesh."""
    return [int(number) for number in jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves(params)])]


@jax.jit
def _checksum(array: Array) -> Int[Array, ""]:
    # Whole numbers, whose sum does not depend on the order. With the factors it depends on the places.
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    factors = jnp.arange(array.size, dtype=jnp.uint32).reshape(array.shape) * 2 + 1
    return jnp.sum(bits * factors).astype(jnp.int32)
