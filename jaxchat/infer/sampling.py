"""From logits to token ids: temperature, top-k, greedy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], temperature: float | Array, top_k: int | None = None
) -> Int[Array, " B"]:
    """Draws one id per row from softmax(logits / temperature) over the `top_k` highest logits (None: over all).

    `keys` has one key per row, so that a row's draw does not depend on the other rows. If the temperature is the Python
    number 0, the highest logit wins (the lowest id among equals). As an array it must be above 0, and other values do
    not compile again. Ids whose logit is -1e30, the padding of the vocabulary, are never drawn.
    """
    if isinstance(temperature, int | float) and temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    if top_k is None or top_k >= logits.shape[-1]:
        return draw(keys, logits / temperature).astype(jnp.int32)
    highest, ids = jax.lax.top_k(logits, top_k)
    choice = draw(keys, highest / temperature)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
