"""Sampling against the probabilities it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.infer.sampling import sample

LOGITS = np.array([1.0, 3.0, -2.0, 2.0, 0.0, -1e30, -1e30], np.float32)
DRAWS = 20_000


def frequencies(temperature, top_k):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    ids = sample(jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS))), keys, temperature, top_k)
    assert ids.dtype == jnp.int32
    return np.bincount(np.asarray(ids), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 50])
def test_frequencies_are_the_softmax_over_the_top_k(temperature, top_k):
    order = np.argsort(-LOGITS)
    kept = np.full_like(LOGITS, -np.inf)
    kept[order[:top_k]] = LOGITS[order[:top_k]]
    expected = np.exp((kept - kept.max()) / temperature)
    expected /= expected.sum()
    # Five standard deviations of a frequency over this many draws.
    tolerance = 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-12
    assert (np.abs(frequencies(temperature, top_k) - expected) <= tolerance).all()


def test_padding_is_never_drawn_however_hot():
    assert frequencies(1e6, None)[5:].sum() == 0
    assert frequencies(1e6, 7)[5:].sum() == 0


def test_temperature_zero_is_the_highest_logit_and_the_lowest_id_among_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [5.0, -1.0, 4.0]])
    keys = jax.random.split(jax.random.key(3), 2)
    assert sample(logits, keys, 0.0).tolist() == [1, 0]
    assert sample(logits, keys, 0, top_k=2).tolist() == [1, 0]


def test_a_row_does_not_depend_on_its_companions():
    keys = jax.random.split(jax.random.key(1), 64)
    logits = jax.random.normal(jax.random.key(2), (64, 100))
    together = sample(logits, keys, 1.0, top_k=20)
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], 1.0, top_k=20)[0]) for i in range(4)]
    assert together[:4].tolist() == alone
    assert len(set(together.tolist())) > 10


def numpy_draws(logits, keys, temperature, top_k):
    """Gumbel-max in float64 with the same noise: the highest of logit / temperature + noise among the top k."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    kept = np.take_along_axis(logits, order, axis=-1)
    if top_k is None or top_k >= logits.shape[-1]:
        order, kept = np.broadcast_to(np.arange(logits.shape[-1]), logits.shape), logits
    noise = np.asarray(jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys), np.float64)
    scores = np.where(kept > -1e29, (kept - kept.max(-1, keepdims=True)) / temperature + noise, -np.inf)
    return np.take_along_axis(order, scores.argmax(-1)[:, None], axis=-1)[:, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-30, 1e-6, 0.5, 1.0, 1e3, 1e30, 3e38, 1e300])
@pytest.mark.parametrize("top_k", [None, 1, 3, 95, 100, 1000])
def test_every_temperature_agrees_with_numpy(temperature, top_k):
    keys = jax.random.split(jax.random.key(4), 200)
    logits = 15 * jnp.tanh(jax.random.normal(jax.random.key(5), (200, 100)))
    logits = logits.at[:, 90:].set(-1e30)
    for given in (temperature, np.float32(min(temperature, 3.4e38))):  # a Python number, and as the engine gives it
        drawn = np.asarray(sample(logits, keys, given, top_k))
        assert drawn.max() < 90
        np.testing.assert_array_equal(drawn, numpy_draws(logits, keys, max(temperature, 1.2e-38), top_k))
        if temperature <= 1e-30:
            np.testing.assert_array_equal(drawn, np.asarray(logits).argmax(-1))


@pytest.mark.parametrize("top_k", [None, 7, 50])
def test_the_hottest_draws_the_real_ids_alike(top_k):
    for temperature in (1e30, np.float32(3e38), np.float32(np.inf)):
        drawn = frequencies(temperature, top_k)
        assert drawn[5:].sum() == 0
        assert np.abs(drawn[:5] - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / DRAWS)


def test_other_temperatures_do_not_compile_again():
    compiled = jax.jit(sample, static_argnums=3)
    logits, keys = jnp.broadcast_to(LOGITS, (4, 7)), jax.random.split(jax.random.key(0), 4)
    for temperature in (1e-45, 1e-40, 1.0, 3e38):
        compiled(logits, keys, np.float32(temperature), 3)
    assert compiled._cache_size() == 1
