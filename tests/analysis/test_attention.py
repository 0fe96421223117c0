import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.analysis import attention
from jaxchat.analysis.attention import attention_maps
from jaxchat.model import reference
from tests.analysis.conftest import TOKENS


def expected_maps(config, params, tokens, layer):
    """The weights of each head [N, T, T], by the formulas of the model in NumPy."""
    x = reference.norm(params["embed"]["embedding"][tokens])
    x = reference.smeared(params["smear"], x, None) if config.smear else x
    start = x = x + reference.bigram_rows(params["bigrams"], tokens, None) if config.bigrams else x
    for at in range(layer + 1):
        if config.residual_scales:
            x = params["residual_scales"]["residual"][at] * x + params["residual_scales"]["input"][at] * start
        if at == layer:
            break
        block, normed, added = params["blocks"][str(at)], reference.norm(x), 0.0
        if config.value_embeddings:
            added = reference.embedded_values(params["value_embeddings"], normed, at, tokens, config)
        x = x + reference.attention(block["attn"], normed, at, config, added)
        x = x + np.maximum(reference.norm(x) @ block["mlp"]["up"]["kernel"], 0) ** 2 @ block["mlp"]["down"]["kernel"]
    size, weights = config.head_dim, params["blocks"][str(layer)]["attn"]
    q, k = (reference.norm(x) @ weights[name]["kernel"] for name in "qk")
    maps = []
    for head in range(config.num_heads):
        of_keys = head // (config.num_heads // config.kv_heads)
        query, key = (
            reference.norm(reference.rotate(y[:, i * size : (i + 1) * size], config.rope_base))
            for y, i in ((q, head), (k, of_keys))
        )
        scores = config.attention_scale * query @ key.T / np.sqrt(size)
        scores[reference.unseen(layer, len(x), config)] = -np.inf
        likely = np.exp(scores - scores.max(-1, keepdims=True))
        maps.append(likely / likely.sum(-1, keepdims=True))
    return np.stack(maps)


@pytest.mark.parametrize("layer", range(4))
def test_every_layer_attends_as_numpy_says(config, params, exact, layer):
    tokens = TOKENS[:29]
    weights = attention_maps(config, params, tokens, layer, dtype=jnp.float32)()
    np.testing.assert_allclose(weights, expected_maps(config, exact, np.array(tokens), layer), atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    if config.windows[layer] is not None:
        assert (weights[:, 28, : 28 - 10] == 0).all() and (weights[:, 28, 28 - 10] > 0).all()


@pytest.mark.parametrize("layer", range(4))
def test_the_optional_parts_lead_to_the_maps_too(with_parts, layer):
    config, params, exact = with_parts
    tokens = TOKENS[:29]
    weights = attention_maps(config, params, tokens, layer, dtype=jnp.float32)()
    np.testing.assert_allclose(weights, expected_maps(config, exact, np.array(tokens), layer), atol=1e-5)


@pytest.mark.parametrize("start", [0, 3, 9, 20, 28])
def test_a_part_of_a_long_text_is_cut_out_of_the_whole(config, params, monkeypatch, start):
    tokens = TOKENS[:29]
    whole = attention_maps(config, params, tokens, 3, dtype=jnp.float32)()
    attention._maps.clear_cache()
    monkeypatch.setattr(attention, "MOST", 8)
    part = attention_maps(config, params, tokens, 3, start=start, dtype=jnp.float32)()
    attention._maps.clear_cache()
    shown = slice(start, start + 8)
    np.testing.assert_allclose(part, whole[:, shown, shown], atol=1e-6)


def test_no_more_than_a_map_and_one_program_for_all_layers(config, params):
    attention._maps.clear_cache()
    for layer in range(config.depth):
        weights = attention_maps(config, params, TOKENS, layer, start=20, dtype=jnp.float32)()
        assert weights.shape == (2, 256, 256)
    assert attention._maps._cache_size() == 1
