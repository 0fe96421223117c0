import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.model import attention
from jaxchat.model.attention import attend


def qkv(length, heads=4, kv_heads=2, size=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def plain(q, k, v):
    """The definition: softmax(q k^T / sqrt(H)) v over the past, each key head for its group of query heads."""
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("length", [8, 16, 48])
def test_attention_and_its_gradient_follow_the_definition_in_blocks_or_not(length, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    arrays = qkv(length)
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)
    ours = jax.vjp(attend, *arrays)
    definition = jax.vjp(plain, *arrays)
    np.testing.assert_allclose(ours[0], definition[0], atol=2e-6)
    for grad, expected in zip(ours[1](weights), definition[1](weights), strict=True):
        np.testing.assert_allclose(grad, expected, atol=5e-6)


def test_a_long_context_never_holds_all_scores():
    length = 2048
    arrays = qkv(length, heads=2, kv_heads=2, size=8)
    loss = jax.grad(lambda q, k, v: attend(q, k, v).sum(), argnums=(0, 1, 2))
    memory = jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    assert memory < 4 * 2 * 2 * length * length  # one copy of the scores; without blocks it takes three
