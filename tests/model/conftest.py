import jax
import jax.numpy as jnp
import pytest

from jaxchat.model.gpt import init_params


@pytest.fixture
def random_params():
    """Parameters with random values in place of initial zeros, so that every part of the model affects the output."""

    def make(config, seed=0):
        params = init_params(config, jax.random.key(seed))
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        filled = [
            jnp.where(jnp.any(leaf), leaf, 0.5 * jax.random.normal(key, leaf.shape) / len(jnp.atleast_1d(leaf)) ** 0.5)
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(structure, filled)

    return make
