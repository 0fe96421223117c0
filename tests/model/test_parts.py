"""The parts of the model that a configuration turns on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.model import reference
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Block, abstract_params, hidden_states, init_params, logits
from jaxchat.model.parameters import named_parameters

PLAIN = GPTConfig(depth=4, sequence_len=16, vocab_size=200, window_pattern="SL", num_kv_heads=1)
PARTS = {
    "attention_scale": {"attention_scale": 1.44},
    "residual_scales": {"residual_scales": True},
    "value_embeddings": {"value_embeddings": True},
    "smear": {"smear": True},
    "bigrams": {"bigrams": True},
    "backout": {"backout": True},
}
PARTS["all"] = {name: value for part in PARTS.values() for name, value in part.items()}
ALL = dataclasses.replace(PLAIN, **PARTS["all"])


@pytest.fixture
def strong_params(random_params):
    """Parameters that let every part matter: a closed gate would hide what passes through it."""

    def make(config):
        params = random_params(config)
        for name in {"smear", "backout", "value_embeddings"} & set(params):
            params[name] = {key: 20 * x if key == "gate" else x + 0.5 for key, x in params[name].items()}
        return params

    return make


def tokens_of(rows, length, seed=7):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, PLAIN.vocab_size)


def scores(config, params, tokens, documents=None):
    return logits(config, params, hidden_states(config, params, tokens, documents=documents))[..., : config.vocab_size]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("depth", [3, 4])
def test_a_part_is_what_numpy_computes(part, packed, depth, strong_params):
    config = dataclasses.replace(PLAIN, depth=depth, num_kv_heads=None, **PARTS[part])
    params, tokens = strong_params(config), tokens_of(2, 12)
    documents = jnp.array([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 3], [0] * 7 + [1] * 5]) if packed else None
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected = [
        reference.logits(config, exact, np.asarray(row), None if documents is None else np.asarray(documents[i]))
        for i, row in enumerate(tokens)
    ]
    np.testing.assert_allclose(scores(config, params, tokens, documents), np.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_no_logit_sees_the_future(part, strong_params):
    config = dataclasses.replace(PLAIN, **PARTS[part])
    params, tokens = strong_params(config), tokens_of(1, 12)
    before = scores(config, params, tokens)[0]
    for t in range(11):
        changed = scores(config, params, tokens.at[0, t + 1].add(1) % config.vocab_size)[0]
        np.testing.assert_array_equal(before[: t + 1], changed[: t + 1])
        assert not np.array_equal(before[t + 1], changed[t + 1])


@pytest.mark.parametrize("part", PARTS)
def test_a_border_token_parts_documents_altogether(part, strong_params):
    """Neither attention nor smearing reaches across: what is in one document changes no logit of another."""
    config = dataclasses.replace(PLAIN, border_token=199, **PARTS[part])
    params = strong_params(config)
    tokens = (tokens_of(1, 12) % 199).at[0, jnp.array([0, 5, 9])].set(199)
    before = scores(config, params, tokens)[0]
    for t in (1, 4, 6, 8, 10):
        changed = scores(config, params, tokens.at[0, t].set((tokens[0, t] + 1) % 199))[0]
        end = next(border for border in (5, 9, 12) if border > t)
        moved = np.flatnonzero((np.asarray(before) != np.asarray(changed)).any(-1))
        assert moved.tolist() == list(range(t, end))


def test_defaults_have_no_part_and_parts_do_not_change_what_is_drawn_for_the_others():
    plain, full = (dict(named_parameters(init_params(c, jax.random.key(3)))) for c in (PLAIN, ALL))
    assert {path.split("/")[0] for path in plain} == {"embed", "blocks", "head"}
    for path, array in plain.items():
        np.testing.assert_array_equal(array, full[path])
    assert {path for path in full if path not in plain} == {
        "residual_scales/residual", "residual_scales/input", "value_embeddings/embedding", "value_embeddings/gate",
        "smear/gate", "smear/scale", "bigrams/embedding", "backout/scale",
    }  # fmt: skip


def test_a_block_is_traced_once_for_each_window_with_and_without_value_embeddings(monkeypatch):
    config = dataclasses.replace(ALL, depth=8, window_pattern="SSSL")
    traced, call = [], Block.__call__

    def counted(block, *arguments):
        traced.append((block.window, arguments[-1] is not None))
        return call(block, *arguments)

    monkeypatch.setattr(Block, "__call__", counted)
    forward = jax.jit(lambda params, tokens: hidden_states(config, params, tokens))
    forward.lower(abstract_params(config), jax.ShapeDtypeStruct((2, 15), jnp.int32))
    assert len(traced) == len(set(traced)) <= 4
