import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params
from jaxchat.ops import attention
from jaxchat.ops.attention import attend, attention_kernel


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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_the_kernel_of_a_cpu():
    assert {attention_kernel(dtype, 128) for dtype in (jnp.float32, jnp.bfloat16, "bfloat16")} == {"xla"}


@pytest.mark.parametrize("length", [24, 512])  # in one piece, and in blocks of queries
@pytest.mark.parametrize("window", [None, 9])
def test_a_token_sees_its_own_document_only(length, window):
    """A row of two documents is as two rows of one, for the outputs and their gradients."""
    cut = length // 3
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (2, length, 2, 8)) for key in keys)
    documents = jnp.where(jnp.arange(length) < cut, 1, 2)[None].repeat(2, 0)

    def together(q, k, v):
        return attend(q, k, v, window=window, documents=documents)

    def apart(q, k, v):
        halves = [attend(q[:, part], k[:, part], v[:, part], window=window) for part in (slice(cut), slice(cut, None))]
        return jnp.concatenate(halves, axis=1)

    np.testing.assert_allclose(together(q, k, v), apart(q, k, v), atol=2e-6)
    grads = [jax.grad(lambda *x, f=f: (f(*x) * weights).sum(), argnums=(0, 1, 2))(q, k, v) for f in (together, apart)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(attention_kernel(jnp.bfloat16, 64) == "xla", reason="needs a GPU with cuDNN")
@pytest.mark.parametrize("borders", [False, True], ids=["whole", "borders"])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129])
def test_cudnn_follows_the_formula(window, borders):
    arrays = qkv(512, size=64)
    starts = jax.random.bernoulli(jax.random.key(1), 0.02, (2, 512)) if borders else None
    documents = None if starts is None else starts.cumsum(axis=1)

    def function(*arrays, window):
        return attend(*arrays, window=window, documents=documents).astype(jnp.float32)

    exact, kernel = (
        value_and_gradients(function, [x.astype(dtype) for x in arrays], window) for dtype in ("float32", "bfloat16")
    )
    for a, b in zip(kernel, exact, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02 * float(jnp.abs(b).max()))


def test_a_model_with_a_border_token_treats_documents_as_if_each_had_a_row():
    config = GPTConfig(depth=2, sequence_len=16, vocab_size=32, border_token=0)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), params)
    first, second = jnp.array([[0, 5, 6, 7, 8]]), jnp.array([[0, 9, 4, 3]])
    together = hidden_states(config, params, jnp.concatenate([first, second], axis=1))
    for part, tokens in ((slice(5), first), (slice(5, None), second)):
        # RoPE depends on distances only, so a document's place in its row does not matter.
        np.testing.assert_allclose(together[:, part], hidden_states(config, params, tokens), atol=2e-5)
    plain = dataclasses.replace(config, border_token=None)
    across = hidden_states(plain, params, jnp.concatenate([first, second], axis=1))
    assert not np.allclose(across[:, 5:], together[:, 5:], atol=1e-3)


@pytest.mark.parametrize("length", [8, 48], ids=["whole", "in blocks"])
def test_a_scale_multiplies_the_scores(length, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    q, k, v = qkv(length)
    np.testing.assert_allclose(attend(q, k, v, window=6, scale=1.44), plain(1.44 * q, k, v, 6), atol=1e-5)
