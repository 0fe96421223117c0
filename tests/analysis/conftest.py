"""A model with windows and grouped queries, and the same in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params

TOKENS = np.random.default_rng(0).integers(0, 300, 300).tolist()


@pytest.fixture(scope="session")
def config():
    """Two heads that share one of keys and values; the first layers see 10 tokens back. 300 of 384 ids are real."""
    return GPTConfig(depth=4, sequence_len=40, vocab_size=300, num_kv_heads=1, window_pattern="SSL")


@pytest.fixture(scope="session")
def params(config):
    """Random values in place of the initial zeros, large enough for clear preferences."""
    keys = iter(jax.random.split(jax.random.key(1), 100))

    def fill(leaf):
        return jnp.where(jnp.any(leaf), leaf, jax.random.normal(next(keys), leaf.shape) / len(leaf) ** 0.5)

    return jax.tree.map(fill, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))


@pytest.fixture(scope="session")
def exact(params):
    return in_numpy(params)


def in_numpy(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.fixture(scope="session")
def with_parts(config, params):
    """The model with all optional parts: its configuration, its parameters, and these in NumPy."""
    config = dataclasses.replace(
        config, attention_scale=1.4, residual_scales=True, value_embeddings=True, smear=True, bigrams=True, backout=True
    )
    new = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    moved = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), new)
    return config, {**moved, **params}, in_numpy({**moved, **params})
