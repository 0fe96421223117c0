import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.analysis import prediction
from jaxchat.analysis.prediction import after_settings, entropy, next_logits, predictions
from jaxchat.infer.request import Sampling
from jaxchat.infer.sampling import draw
from jaxchat.infer.settings import settings_of
from jaxchat.model import reference
from tests.analysis.conftest import TOKENS


def softmax(scores):
    likely = np.exp(scores - scores.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)


@pytest.mark.parametrize("length", [2, 16, 17, 40])
def test_tokens_are_predicted_as_numpy_says(config, params, exact, length):
    tokens = TOKENS[:length]
    found = predictions(config, params, tokens, k=7, dtype=jnp.float32)()
    expected = softmax(reference.logits(config, exact, np.array(tokens)))[:-1]
    own = expected[np.arange(length - 1), tokens[1:]]
    np.testing.assert_allclose(found.probability, own, rtol=1e-3)
    np.testing.assert_array_equal(found.rank, 1 + (expected > own[:, None]).sum(1))
    np.testing.assert_array_equal(found.ids, np.argsort(-expected, axis=1)[:, :7])
    np.testing.assert_allclose(found.probabilities, -np.sort(-expected, axis=1)[:, :7], rtol=1e-3)
    np.testing.assert_allclose(found.entropy, -(expected * np.log2(expected)).sum(1), rtol=1e-3)


def test_a_token_alone_is_not_predicted(config, params):
    assert all(len(array) == 0 for array in predictions(config, params, [5], k=7, dtype=jnp.float32)())


def test_no_more_alternatives_than_ids_and_never_padding(config, params):
    found = predictions(config, params, TOKENS[:3], k=1000, dtype=jnp.float32)()
    assert np.sort(found.ids, axis=1).tolist() == [list(range(300))] * 2
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)


def test_positions_are_computed_in_blocks_as_at_once(config, params, monkeypatch):
    whole = predictions(config, params, TOKENS[:30], k=3, dtype=jnp.float32)()
    prediction._predictions.clear_cache()
    monkeypatch.setattr(prediction, "POSITIONS", 8)
    blocks = predictions(config, params, TOKENS[:30], k=3, dtype=jnp.float32)()
    prediction._predictions.clear_cache()
    for one, other in zip(whole, blocks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_the_next_token_as_numpy_says(config, params, exact):
    scores = next_logits(config, params, TOKENS[:21], jnp.float32)()
    assert scores.shape == (300,)
    np.testing.assert_allclose(scores, reference.logits(config, exact, np.array(TOKENS[:21]))[-1], atol=1e-4)


def test_what_is_compiled_ahead_is_not_compiled_again(config, params):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    prediction._next_logits.clear_cache()
    computation = next_logits(config, params, TOKENS[:40], jnp.float32)
    computation.compile()
    assert any("backend_compile" in name for name in compiled)
    compiled.clear()
    assert computation().shape == (300,)
    assert not any("backend_compile" in name for name in compiled)


def test_a_few_programs_serve_all_lengths(config, params):
    prediction._predictions.clear_cache()
    for length in range(2, 41):
        predictions(config, params, TOKENS[:length], k=4, dtype=jnp.float32)()
    assert prediction._predictions._cache_size() == 3  # of 16, 32 and 64 tokens


SCORES = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize(
    "settings, drawn",
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [40 / 85, 30 / 85, 15 / 85, 0, 0]),
        ({"top_p": 0.0001}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.3}, [40 / 85, 30 / 85, 15 / 85, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),  # of what top-k leaves
        ({"top_k": 3, "min_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 99}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.array([16, 9, 2.25, 1, 0.25]) / 28.5),
    ],
)
def test_settings_change_the_distribution(settings, drawn):
    np.testing.assert_allclose(after_settings(SCORES, **settings), drawn, atol=1e-9)
    np.testing.assert_allclose(after_settings(SCORES[::-1], **settings), drawn[::-1], atol=1e-9)


@given(
    st.lists(st.floats(-15, 15), min_size=1, max_size=40), st.floats(0, 100), st.none() | st.integers(1, 50),
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_what_is_drawn_is_a_distribution_that_keeps_the_order(scores, temperature, top_k, top_p, min_p):
    drawn = after_settings(np.array(scores), temperature, top_k, top_p, min_p)
    assert drawn.sum() == pytest.approx(1) and (drawn >= 0).all()
    assert drawn[np.argmax(scores)] == drawn.max()
    ties = len(scores) - len(set(scores))
    assert top_k is None or (drawn > 0).sum() <= top_k + ties


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 0.6, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_the_engine_draws_from_that_distribution(settings):
    scores, count = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32), 20_000
    scores[7] = scores[11]  # equal logits share one fate
    rows = jax.tree.map(lambda x: np.repeat(x, count, axis=0), settings_of([Sampling(**settings)]))
    ids = draw(jnp.tile(scores, (count, 1)), rows, jnp.arange(count), level="full")
    drawn = np.bincount(np.asarray(ids), minlength=40) / count
    expected = after_settings(scores, **settings)
    assert (drawn[expected == 0] == 0).all()
    np.testing.assert_allclose(drawn, expected, atol=5 * np.sqrt(0.25 / count))


def test_entropy_in_bits():
    assert entropy(np.array([0.25] * 4)) == pytest.approx(2)
    assert entropy(np.array([1.0, 0.0])) == 0
