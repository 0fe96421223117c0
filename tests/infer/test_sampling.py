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
