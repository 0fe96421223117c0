"""The kernel that finds where top-k and top-p cut, against plain JAX and against sorting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxchat.devices.gpu import capability
from jaxchat.ops import triton
from jaxchat.ops.cross_entropy import NEVER
from jaxchat.ops.lowest_within import CHUNK, FEWEST, Mass, _from_bits, _kernel, lowest_within, total_mass
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


def mass_of(logits):
    """Every probability, as its run's highest has it, and the runs' shares."""
    tops = logits.max(-1)
    weights = jnp.where(logits > NEVER / 2, jnp.round(jnp.exp(logits - tops[..., None]) * 2**24), 0).astype(jnp.uint32)
    return Mass(weights, jnp.exp(tops - tops.max(-1, keepdims=True)))


kernel_of, formulas = jax.jit(_kernel), [jax.jit(functools.partial(lowest_within, on_cpu=on)) for on in (True, False)]


def both(runs, mass, needed):
    """What the kernel finds, and what plain JAX does, in its form for a CPU and in that for other devices."""
    assert len(runs) < FEWEST
    found = kernel_of(runs, mass, needed)
    assert (np.asarray(found)[np.asarray(needed) == 0] == 0).all()  # for them, no digit was looked for
    formula, again = (form(runs, mass, needed) for form in formulas)
    np.testing.assert_array_equal(formula, again)
    return _from_bits(found), formula


RUNS = 1, 5, CHUNK - 1, CHUNK, CHUNK + 3, 2 * CHUNK + 1


@pytest.mark.parametrize("runs", RUNS)
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_the_kth_highest_logit(runs, seed, rounded):
    logits = logits_of(seed, 3, runs, 2.0, rounded)
    ks = np.random.default_rng(seed).integers(1, runs * K + 1, 3)
    kernel, formula = both(logits, None, jnp.asarray(ks, jnp.float32))
    highest = -np.sort(-np.asarray(logits).reshape(3, -1), axis=1)
    assert kernel.tolist() == formula.tolist() == [highest[row, k - 1] for row, k in enumerate(ks)]


@pytest.mark.parametrize("runs", RUNS)
@settings(max_examples=3, deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.0, 0.3, 3.0]))
@example(0, 0.0)  # all weights of a run are 2^24: their sum is 2^31
def test_the_logit_from_which_on_so_much_of_the_probability_lies(runs, seed, spread):
    logits = logits_of(seed, 3, runs, spread, False)
    if not spread:
        logits = jnp.zeros_like(logits)
    mass = mass_of(logits)
    whole = total_mass(logits, mass)
    for part in (1e-4, 0.3, 0.999):
        kernel, formula = both(logits, mass, part * whole)
        np.testing.assert_array_equal(kernel, formula)
        exact = np.asarray(mass.weights, np.float64) * np.asarray(mass.shares, np.float64)[..., None]
        inside = np.where(np.asarray(logits) >= np.asarray(kernel)[:, None, None], exact, 0).sum((1, 2))
        beyond = np.where(np.asarray(logits) > np.asarray(kernel)[:, None, None], exact, 0).sum((1, 2))
        np.testing.assert_array_less(part - 1e-5, inside / exact.sum((1, 2)))
        np.testing.assert_array_less(beyond / exact.sum((1, 2)), part + 1e-5)


@pytest.mark.parametrize("runs", [1, CHUNK, CHUNK + 3])
@pytest.mark.parametrize("less", [0, 1, 40])
def test_weights_whose_sums_are_about_as_large_as_they_can_be(runs, less):
    draw = np.random.default_rng(less)
    logits = logits_of(2, 4, runs, 2.0, False)
    # At most `less` below 2^24 for a logit in a hundred, so that sums are 2^31 or little less; and shares near 1.
    missing = np.where(draw.random(logits.shape) < 0.01, draw.integers(0, less + 1, logits.shape), 0)
    shares = np.where(draw.random(logits.shape[:2]) < 0.5, 1, 1 - draw.random(logits.shape[:2]) * 2.0**-20)
    mass = Mass(jnp.asarray(2**24 - missing, jnp.uint32), jnp.asarray(shares, jnp.float32))
    whole = total_mass(logits, mass)
    for needed in (whole, jnp.nextafter(whole, 0), 0.5 * whole, jnp.ones(4), jnp.full(4, 2.0**24)):
        kernel, formula = both(logits, mass, needed)
        np.testing.assert_array_equal(kernel, formula)
        assert (np.isin(kernel, logits)).all()
    smallest, highest = logits.min((1, 2)), logits.max((1, 2))
    np.testing.assert_array_equal(both(logits, mass, whole)[0], smallest)
    np.testing.assert_array_equal(both(logits, mass, jnp.ones(4))[0], highest)


@pytest.mark.parametrize("runs", [1, CHUNK + 3])
@pytest.mark.parametrize("weighed", [False, True])
def test_rows_that_ask_for_nothing_beside_rows_that_do(runs, weighed):
    logits = logits_of(4, 5, runs, 2.0, False)
    mass = mass_of(logits) if weighed else None
    needed = 0.7 * total_mass(logits, mass) if mass else jnp.full(5, 50.0)
    all_ask, _ = both(logits, mass, needed)
    assert np.isfinite(all_ask).all()
    for asks in ([1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0] * 5):
        asking = np.array(asks, bool)
        for found in both(logits, mass, jnp.where(asking, needed, 0)):
            np.testing.assert_array_equal(found, np.where(asking, all_ask, np.nan))


@pytest.mark.parametrize("weighed", [False, True])
def test_it_is_lowered_for_a_gpu(monkeypatch, weighed):
    monkeypatch.setattr(triton, "INTERPRET", False)
    runs, shares = jax.ShapeDtypeStruct((8, 40, K), jnp.float32), jax.ShapeDtypeStruct((8, 40), jnp.float32)
    mass = Mass(jax.ShapeDtypeStruct((8, 40, K), jnp.uint32), shares) if weighed else None
    assert KERNEL in lowered(_kernel, [runs, mass, jax.ShapeDtypeStruct((8,), jnp.float32)])
