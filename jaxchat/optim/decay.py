"""Cautious weight decay: only of the weights that the update makes smaller anyway.

Source: Chen et al., "Cautious Weight Decay" (2025), arXiv:2510.12402.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


class DecayState(NamedTuple):
    """`count` updates done."""

    count: Array


def add_cautious_decay(weight_decay: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Adds to the update U, before learning rate and sign, weight_decay(count) W where U W is not negative.

    For matrices W [fan_in, fan_out], whose decay is scaled as Muon's step is: by sqrt(max(1, fan_out / fan_in)).
    `muon_decay`, if the update is given one, takes the place of the schedule's.
    """

    def init(params):
        del params
        return DecayState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, muon_decay=None, **extra):
        del extra
        assert params is not None
        strength = weight_decay(state.count) if muon_decay is None else muon_decay

        def decay(u, w):
            scale = max(1.0, w.shape[1] / w.shape[0]) ** 0.5
            return u + jnp.where(u * w >= 0, strength * scale * w, 0.0).astype(u.dtype)

        return jax.tree.map(decay, updates, params), DecayState(optax.safe_increment(state.count))  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
