import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.model import attention
from jaxchat.model.attention import attend, attention_kernel


def qkv(length, heads=4, kv_heads=2, size=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def plain(q, k, v, window=None):
    """The definition: softmax(q k^T / sqrt(H)) v over the past, or the `window` tokens before each and itself; each key
    head for its group of query heads."""
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
    back = np.arange(length)[:, None] - np.arange(length)
    scores = jnp.where((back >= 0) & (back <= (length if window is None else window)), scores, -jnp.inf)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores), v)


def value_and_gradients(function, arrays, window):
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape)

    @jax.jit
    def both(*arrays):
        value, pull_back = jax.vjp(functools.partial(function, window=window), *arrays)
        return value, *pull_back(weights)

    return both(*arrays)


# 48 and 64 go through in blocks of 16; windows end within a block, at its edge, and beyond the row.
CASES = [(8, None), (8, 3), (8, 6), (8, 7), (40, 20), (48, None), (48, 0), (48, 15), (48, 16), (48, 40), (64, 12)]


@pytest.mark.parametrize("length, window", CASES)
def test_attention_and_its_gradient_follow_the_definition_in_blocks_or_not(length, window, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    arrays = qkv(length)
    ours, definition = (value_and_gradients(function, arrays, window) for function in (attend, plain))
    np.testing.assert_allclose(ours[0], definition[0], atol=2e-6)
    for grad, expected in zip(ours[1:], definition[1:], strict=True):
        np.testing.assert_allclose(grad, expected, atol=5e-6)


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_a_cache_gives_what_the_whole_row_does(window):
    q, k, v = qkv(16)
    empty = ((0, 0), (0, 4), (0, 0), (0, 0))
    k_slots, v_slots = (jnp.pad(x, empty, constant_values=1e3) for x in (k, v))
    positions = jnp.array([[9, 10, 11], [4, 5, 6]])  # each row is elsewhere
    rows = jnp.arange(2)[:, None]
    out = attend(q[rows, positions], k_slots, v_slots, positions=positions, window=window)
    np.testing.assert_allclose(out, plain(q, k, v, window)[rows, positions], atol=2e-6)


def gradient_memory(length, window):
    arrays = qkv(length, heads=2, kv_heads=2, size=8)
    loss = jax.grad(lambda q, k, v: attend(q, k, v, window=window).sum(), argnums=(0, 1, 2))
    return jax.jit(loss).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_a_long_context_never_holds_all_scores():
    length = 2048
    assert gradient_memory(length, None) < 4 * 2 * 2 * length * length  # one copy; without blocks it takes three


def test_a_window_never_holds_the_scores_outside_it():
    short, long = (gradient_memory(length, 256) for length in (1024, 4096))
    assert long < 1.5 * short  # q, k and v grow, the scores do not


def test_the_kernel_of_a_cpu():
    assert {attention_kernel(dtype, 128) for dtype in (jnp.float32, jnp.bfloat16, "bfloat16")} == {"xla"}
