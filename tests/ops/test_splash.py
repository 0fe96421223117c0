"""Splash attention: interpreted on a CPU against the plain formula, and lowered for a TPU without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.ops import splash
from jaxchat.ops.attention import KEPT, attend, attention_kernel

LENGTH = 256


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(splash, "BLOCK", 128)


def abstract(rows=2, length=LENGTH, heads=4, kv_heads=2, size=128, dtype=jnp.bfloat16):
    return tuple(jax.ShapeDtypeStruct((rows, length, n, size), dtype) for n in (heads, kv_heads, kv_heads))


def formula(q, k, v, window, documents):
    """softmax(q kᵀ / √H) v over what a token sees; each key head for its group of query heads."""
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    back = np.arange(length)[:, None] - np.arange(length)
    sees = jnp.asarray((back >= 0) & (back <= (length if window is None else window)))[None, None]
    if documents is not None:
        sees = sees & (documents[:, :, None] == documents[:, None, :])[:, None]
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(sees, scores, -jnp.inf)), v)


@pytest.mark.parametrize("several", [False, True], ids=["one device", "four devices"])
def test_the_kernels_and_their_gradients_follow_the_formula(several, interpreted):
    """Grouped heads; windows and borders inside a block and across blocks; rows and heads split over a mesh, or not."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]) if several else None
    window = 100 if several else None
    documents = None if several else jnp.cumsum(jax.random.bernoulli(jax.random.key(1), 0.02, (2, LENGTH)), axis=1)
    *arrays, weights = (jax.random.normal(jax.random.key(i), (2, LENGTH, n, 128)) for i, n in enumerate((4, 2, 2, 4)))
    ours = functools.partial(splash.attend, window=window, documents=documents, mesh=mesh, kept=KEPT)
    theirs = functools.partial(formula, window=window, documents=documents)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, *arrays):
        value, pull_back = jax.vjp(function, *arrays)
        return value, *pull_back(weights)

    for a, b in zip(both(ours, *arrays), both(theirs, *arrays), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_whole_blocks_in_bf16_go_to_the_kernels(interpreted):
    mesh = make_mesh(MeshConfig(), jax.devices()[:4])
    taken_by = jax.jit(functools.partial(attend, mesh=mesh))
    assert attention_kernel(jnp.bfloat16, 128) == "splash" and attention_kernel(jnp.float32, 128) == "xla"
    for arrays, taken in [
        (abstract(rows=4), True),
        (abstract(rows=4, dtype=jnp.float32), False),
        (abstract(rows=4, size=64), False),
        (abstract(rows=4, length=200), False),
        (abstract(rows=2), False),  # for four devices
    ]:
        assert ("pallas_call[" in str(taken_by.trace(*arrays).jaxpr)) == taken


def test_the_backward_pass_does_not_compute_attention_again(interpreted, capsys):
    """The kernel's result and the logarithms of its sums are kept, whatever else is recomputed."""
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    block = jax.checkpoint(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), policy=policy)
    jax.ad_checkpoint.print_saved_residuals(block, *abstract())
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " output of " in line]
    assert sorted(kept) == [f"bf16[2,4,{LENGTH},128]", f"f32[2,4,{LENGTH}]"]


@pytest.mark.parametrize("window, borders", [(None, False), (300, True)])
def test_the_kernels_lower_for_a_tpu(window, borders):
    documents = jnp.zeros((1, 1024), jnp.int32) if borders else None

    def loss(*arrays):
        out = splash.attend(*arrays, window=window, documents=documents, kept=KEPT)
        return out.astype(jnp.float32).sum()

    arrays = abstract(rows=1, length=1024)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 3


def test_a_scale_multiplies_the_scores(interpreted):
    q, k, v = (jax.random.normal(jax.random.key(i), (1, LENGTH, n, 128)) for i, n in enumerate((2, 1, 1)))
    scaled = splash.attend(q, k, v, scale=1.44, kept=KEPT)
    np.testing.assert_allclose(scaled, formula(1.44 * q, k, v, None, None), atol=1e-4)
