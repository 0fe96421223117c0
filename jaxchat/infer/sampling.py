"""From logits to token ids: temperature, top-k, greedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxchat.ops.cross_entropy import NEVER


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: float | np.floating | Array,
    top_k: int | None = None,
) -> Int[Array, " B"]:
    """Draws one id per row from softmax(logits / temperature) over the `top_k` highest logits (None: over all).

    `keys` has one key per row, so that a row's draw does not depend on the other rows. If the temperature is the Python
    number 0, the highest logit wins (the lowest id among equals). As an array it must be above 0 or round to it, and
    other values do not compile again. The smallest temperatures draw among the highest logits only, the largest draw
    all ids alike, infinity included. Ids whose logit is -1e30, the padding of the vocabulary, are never drawn.
    """
    if isinstance(temperature, int | float) and temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if top_k is None or top_k >= logits.shape[-1]:
        return _draw(logits, keys, temperature).astype(jnp.int32)
    highest, ids = jax.lax.top_k(logits, top_k)
    choice = _draw(highest, keys, temperature)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _draw(
    logits: Float[Array, "B K"], keys: Key[Array, " B"], temperature: float | np.floating | Array
) -> Int[Array, " B"]:
    # What is below the smallest normal number counts as 0 on many devices, and 0 / 0 is no logit. Measured from the
    # highest, a quotient that overflows is -inf, an id that cannot be drawn, and never inf.
    temperature = jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits > NEVER / 2, scaled, -jnp.inf))
