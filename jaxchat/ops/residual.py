"""What a model may add to its residual stream and to its values, besides attention and the MLP.

All of it is computed in fp32 and rounded once; XLA makes one pass over memory of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxchat.ops.fp8 import Bounded
from jaxchat.ops.norm import rms_norm

SMEAR_INPUTS = 24  # the channels of the embedded token that its smear gate reads
GATE_INPUTS = 12  # the channels of a block's normed input that its value gates read
LARGEST_GATE = 3.0  # of a value embedding


@jax.named_scope("mix")
def mix(
    x: Float[Array, "B T D"], x0: Float[Array, "B T D"], residual: Float[Array, ""], of_input: Float[Array, ""]
) -> Float[Array, "B T D"]:
    """residual · x + of_input · x0, where x0 is what the first block saw."""
    return (residual * x.astype(jnp.float32) + of_input * x0.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("smear")
def smear(
    x: Float[Array, "B T D"],
    previous: Float[Array, "B T D"],
    gate: Float[Array, " G"],
    scale: Float[Array, ""],
    joined: Bool[Array, "#B T"],
) -> Float[Array, "B T D"]:
    """x + scale · σ(x[:G] · gate) · previous, where the token is `joined` to the one before it, otherwise x.

    `previous` has the embedded token before each one; what it has where none is joined does not matter.
    """
    wide = x.astype(jnp.float32)
    share = scale * jax.nn.sigmoid(wide[..., : len(gate)] @ gate)
    share = jnp.where(joined, share, 0.0)[..., None]
    return (wide + share * previous.astype(jnp.float32)).astype(x.dtype)


def bigram_index(tokens: Int[Array, "B T"], previous: Int[Array, "B T"], count: int) -> Int[Array, "B T"]:
    """For each token and the one before it, -1 where there is none, one of `count` rows.

    A multiplicative hash over 32 bits, with two primes of xxHash.
    """
    mixed = tokens.astype(jnp.uint32) * jnp.uint32(2654435761) + (previous + 1).astype(jnp.uint32) * jnp.uint32(
        2246822519
    )
    return ((mixed ^ (mixed >> 15)) % jnp.uint32(count)).astype(jnp.int32)


@jax.named_scope("value_embedding")
def add_values(
    v: Float[Array, "B T K H"] | Bounded,
    x: Float[Array, "B T D"],
    rows: Float[Array, "B T KH"],
    gate: Float[Array, "G K"],
) -> Float[Array, "B T K H"]:
    """v + 3 σ(rms_norm(x)[:G] @ gate) · rows: a gate between 0 and 3 for each head.

    `x` is the block's input, before its norm; `rows` are the tokens' value embeddings.
    """
    values = v.array if isinstance(v, Bounded) else v  # the sum has another bound; it is measured
    strength = LARGEST_GATE * jax.nn.sigmoid(rms_norm(x)[..., : len(gate)].astype(jnp.float32) @ gate)
    added = strength[..., None] * rows.reshape(values.shape).astype(jnp.float32)
    return (values.astype(jnp.float32) + added).astype(values.dtype)


@jax.named_scope("backout")
def back_out(x: Float[Array, "B T D"], middle: Float[Array, "B T D"], scale: Float[Array, ""]) -> Float[Array, "B T D"]:
    """x - scale · middle, where `middle` is the residual stream in the middle of the blocks."""
    return (x.astype(jnp.float32) - scale * middle.astype(jnp.float32)).astype(x.dtype)
