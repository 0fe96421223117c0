"""The kernel that finds where top-k and top-p cut, against plain JAX and against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.devices.gpu import capability
from jaxchat.ops import triton
from jaxchat.ops.cross_entropy import NEVER
from jaxchat.ops.lowest_within import CHUNK, Mass, _from_bits, _kernel, lowest_within, total_mass
from tests.ops.test_lowering import KERNEL, lowered

K = 128


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", capability() == 0)


def logits_of(seed, rows, runs, spread, rounded):
    draw = np.random.default_rng(seed)
    logits = (spread * draw.normal(size=(rows, runs, K))).astype(np.float32)
    logits[draw.random(logits.shape) < 0.1] = NEVER
    logits[0, 0, :4] = [0.0, -0.0, 1e-45, -1e-45]
    return jnp.asarray(np.round(logits) if rounded else logits)


def both(runs, mass, needed):
    return _from_bits(_kernel(runs, mass, needed)), lowest_within(runs, mass, needed, on_cpu=True)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, CHUNK, CHUNK + 3]), st.booleans())
def test_the_kth_highest_logit(seed, runs, rounded):
    logits = logits_of(seed, 3, runs, 2.0, rounded)
    ks = np.random.default_rng(seed).integers(1, runs * K + 1, 3)
    kernel, formula = both(logits, None, jnp.asarray(ks, jnp.float32))
    highest = -np.sort(-np.asarray(logits).reshape(3, -1), axis=1)
    assert kernel.tolist() == formula.tolist() == [highest[row, k - 1] for row, k in enumerate(ks)]


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1, CHUNK - 1, CHUNK + 3]), st.sampled_from([0.0, 0.3, 3.0]))
@example(0, 1, 0.0)  # all weights of a run are 2^24: their sum is 2^31
def test_the_logit_from_which_on_so_much_of_the_probability_lies(seed, runs, spread):
    logits = logits_of(seed, 3, runs, spread, False)
    if not spread:
        logits = jnp.zeros_like(logits)
    tops = logits.max(-1)
    weights = jnp.where(logits > NEVER / 2, jnp.round(jnp.exp(logits - tops[..., None]) * 2**24), 0).astype(jnp.uint32)
    mass = Mass(weights, jnp.exp(tops - tops.max(-1, keepdims=True)))
    whole = total_mass(logits, mass)
    for part in (1e-4, 0.3, 0.999):
        kernel, formula = both(logits, mass, part * whole)
        np.testing.assert_array_equal(kernel, formula)
        exact = np.asarray(weights, np.float64) * np.asarray(mass.shares, np.float64)[..., None]
        inside = np.where(np.asarray(logits) >= np.asarray(kernel)[:, None, None], exact, 0).sum((1, 2))
        beyond = np.where(np.asarray(logits) > np.asarray(kernel)[:, None, None], exact, 0).sum((1, 2))
        np.testing.assert_array_less(part - 1e-5, inside / exact.sum((1, 2)))
        np.testing.assert_array_less(beyond / exact.sum((1, 2)), part + 1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_lowered_for_a_gpu(monkeypatch, weighed):
    monkeypatch.setattr(triton, "INTERPRET", False)
    runs, shares = jax.ShapeDtypeStruct((8, 40, K), jnp.float32), jax.ShapeDtypeStruct((8, 40), jnp.float32)
    mass = Mass(jax.ShapeDtypeStruct((8, 40, K), jnp.uint32), shares) if weighed else None
    assert KERNEL in lowered(_kernel, [runs, mass, jax.ShapeDtypeStruct((8,), jnp.float32)])
