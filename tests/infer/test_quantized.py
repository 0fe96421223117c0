import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxchat.infer.engine import Engine
from jaxchat.infer.quantized import LARGEST, cache_dtype, quantize, quantize_weight, stored
from jaxchat.model.generation import init_pages, paged_hidden
from jaxchat.model.gpt import hidden_states, logits
from jaxchat.ops.linear import Quantized
from jaxchat.ops.pages import Place, in_range

TINY = 2e-38  # what XLA rounds to zero
WEIGHTS = arrays.arrays(np.float32, (5, 3), elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None)
@given(WEIGHTS)
def test_a_weight_is_at_most_half_a_scale_from_its_8_bits(weight):
    quantized = quantize_weight(jnp.array(weight))
    largest = np.abs(weight).max(0)
    np.testing.assert_allclose(quantized.scale, largest / LARGEST, rtol=1e-6, atol=TINY)
    assert quantized.values.dtype == jnp.int8 and np.abs(quantized.values).max() <= LARGEST
    error = np.abs(np.asarray(quantized.astype(jnp.float32)) - weight)
    assert np.all(error <= 0.5001 * np.asarray(quantized.scale) + 1e-6 * largest + LARGEST * TINY)


def test_eight_bits_are_halves_rounded_to_even_symmetrically():
    weight = jnp.array([[127.0, 2.5], [-0.5, -254.0], [1.5, 0.0]])
    quantized = quantize_weight(weight)
    np.testing.assert_array_equal(quantized.values, [[127, 1], [0, -127], [2, 0]])
    np.testing.assert_array_equal(quantized.scale, [1, 2])


def test_a_column_of_zeros_stays_zero():
    np.testing.assert_array_equal(quantize_weight(jnp.zeros((4, 2))).astype(jnp.float32), np.zeros((4, 2)))


def test_embedding_stays_and_matrices_and_head_are_quantized(config, random_params):
    params = quantize(random_params, "bfloat16")
    assert params["embed"]["embedding"].dtype == jnp.bfloat16
    weights = [params["head"]["kernel"], *jax.tree.leaves(params["blocks"], is_leaf=lambda x: isinstance(x, Quantized))]
    assert len(weights) == 1 + 6 * config.depth and all(isinstance(weight, Quantized) for weight in weights)


def test_the_model_computes_with_the_rounded_weights(config, random_params):
    params = quantize(random_params, "float32")
    plain = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params, is_leaf=lambda x: isinstance(x, Quantized))
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, config.vocab_size)
    scores = [logits(config, tree, hidden_states(config, tree, tokens)) for tree in (params, plain)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_rounding_costs_little(config, tokenizer, trained_params, conversations):
    """On text that the model knows by heart: its loss stays below a hundredth of a nat a token."""
    ids, mask = tokenizer.render_conversation(conversations[0])
    inputs, targets = jnp.array([ids[:-1]]), jnp.array([ids[1:]])

    def nats(params):
        scores = logits(config, params, hidden_states(config, params, inputs))
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return float(jnp.mean(losses, where=jnp.array([mask[1:]]) == 1))

    plain, rounded = nats(trained_params), nats(quantize(trained_params, "float32"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, abs=0.01)


def test_in_range_clips_what_a_cast_to_8_bits_would_make_nan():
    x = jnp.array([0.0, 1.0, -1.125, 448.0, 449.0, -1e9, 0.0019])
    assert bool(jnp.isnan(x.astype(jnp.float8_e4m3fn)).any())
    kept = in_range(x, jnp.float8_e4m3fn)
    assert kept.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(kept.astype(jnp.float32), [0, 1, -1.125, 448, 448, -448, 2**-9])
    np.testing.assert_array_equal(in_range(x, jnp.float32), x)


@pytest.mark.parametrize(("kv_cache", "close"), [("auto", 1e-4), ("fp8", 0.3)])
def test_a_cache_in_8_bits_gives_nearly_the_same_logits(config, random_params, kv_cache, close):
    """Prompt and continuation through the pages, against whole rows."""
    tokens = jax.random.randint(jax.random.key(0), (2, 80), 0, config.vocab_size)
    whole = logits(config, random_params, hidden_states(config, random_params, tokens))
    pages = init_pages(config, 4, cache_dtype("float32", kv_cache))
    table = jnp.array([[2, 0], [1, 3]])
    parts = []
    for start, end in ((0, 70), (70, 80)):
        place = Place(table, jnp.full(2, start), jnp.full(2, end - start))
        hidden, pages = paged_hidden(config, random_params, tokens[:, start:end], place, pages)
        parts.append(logits(config, random_params, hidden))
    difference = jnp.max(jnp.abs(jnp.concatenate(parts, 1) - whole)[..., : config.vocab_size])
    assert difference < close
    assert (difference > 1e-3) == (kv_cache == "fp8")


def test_stored_is_what_the_engine_asks_for(random_params):
    assert {leaf.dtype for leaf in jax.tree.leaves(stored(random_params, jnp.bfloat16))} == {jnp.dtype("bfloat16")}
    kept = stored(random_params, jnp.bfloat16, "int8")
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept["head"])) == 128 * 384 + 4 * 384


def test_an_engine_with_8_bit_weights_is_one_with_the_rounded_weights(config, random_params, trained_params, tokenizer):
    """Before and after its parameters are swapped for others, which are rounded again."""
    prompts = [[5, 6, 7], [8], [20, 30] * 10]
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=3, weights="int8")
    for params in (trained_params, random_params):
        engine.params = params
        rounded = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32),
            quantize(params, "float32"),
            is_leaf=lambda x: isinstance(x, Quantized),
        )
        plain = Engine(config, rounded, tokenizer, dtype="float32", rows=3)
        options = {"max_new_tokens": 20, "temperature": 0.0}
        assert engine.generate(prompts, **options) == plain.generate(prompts, **options)


def test_an_engine_with_an_8_bit_cache_answers(config, trained_params, tokenizer, conversations):
    engine = Engine(config, trained_params, tokenizer, dtype="float32", rows=3, weights="int8", kv_cache="fp8")
    prompt = tokenizer.render_for_completion(conversations[0])
    (completion,) = engine.generate([prompt], max_new_tokens=60, temperature=0.0)
    assert tokenizer.decode(completion.tokens).endswith("It is 92.") and completion.finished
