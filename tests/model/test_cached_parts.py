"""The optional parts of the model through the cache: whatever the pieces, the logits are those of whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.infer.quantized import quantize, stored
from jaxchat.model import generation
from jaxchat.model.config import GPTConfig
from jaxchat.model.generation import embedded, init_pages, join_qkv, paged_hidden, reads_previous
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.ops.few_rows import decode_block
from jaxchat.ops.linear import Quantized
from jaxchat.ops.pages import PAGE, Place

LENGTH, WINDOW = 140, 40  # two pages and a part of one; the window of two of the four layers
PLAIN = GPTConfig(depth=4, sequence_len=4 * WINDOW, vocab_size=200, num_kv_heads=1, window_pattern="SSL")
PARTS = {
    "attention_scale": 1.44,
    "residual_scales": True,
    "value_embeddings": True,
    "smear": True,
    "bigrams": True,
    "backout": True,
}
CONFIGS = {name: dataclasses.replace(PLAIN, **{name: value}) for name, value in PARTS.items()}
CONFIGS["all"] = ALL = dataclasses.replace(PLAIN, **PARTS)
STEP = jax.jit(paged_hidden, static_argnums=0, static_argnames=("last",))
SHALLOW = [dataclasses.replace(ALL, depth=depth, num_kv_heads=None) for depth in (1, 2)]


@pytest.fixture(scope="module")
def model():
    """The parameters of a configuration, none of which is zero, and the forward pass over whole rows."""
    made = {}

    def make(config):
        if config not in made:
            leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
            keys = jax.random.split(jax.random.key(1), len(leaves))
            moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
            params = jax.tree.unflatten(tree, moved)
            made[config] = (
                params,
                jax.jit(lambda tokens: scores_of(config, params, hidden_states(config, params, tokens))),
            )
        return made[config]

    return make


def scores_of(config, params, hidden):
    """Log-probabilities."""
    return jax.nn.log_softmax(logits(config, params, hidden)[..., : config.vocab_size])


def close(got, expected, atol=1e-5):
    np.testing.assert_allclose(got, expected, atol=atol, rtol=1e-5)


def tokens_of(rows, length=LENGTH, seed=7):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, PLAIN.vocab_size)


def in_pieces(config, params, tokens, ends, *, joint=None, last=()):
    """Log-probabilities [R, T, V], computed in pieces that end at `ends`; of those in `last` only the last token's."""
    rows, parts = len(tokens), []
    table = jnp.arange(3 * rows).reshape(3, rows).T  # no row's pages lie side by side
    pages, start = init_pages(config, 3 * rows), 0
    for end in ends:
        before = (tokens[:, start - 1] if start else jnp.full(rows, -1)) if reads_previous(config) else None
        place = Place(table, jnp.full(rows, start), jnp.full(rows, end - start))
        piece = tokens[:, start:end]
        hidden, pages = STEP(config, params, piece, place, pages, joint=joint, before=before, last=end in last)
        parts.append(scores_of(config, params, hidden))
        start = end
    return jnp.concatenate(parts, axis=1)


# A token at a time about the borders of the window and of pages, and chunks of one size between them.
ENDS = [1, 2, 3, 21, *range(39, 44), *range(61, 67), 84, 102, 120, *range(138, LENGTH + 1)]


@pytest.mark.parametrize("name", CONFIGS)
def test_any_pieces_give_what_whole_rows_give(model, name):
    config = CONFIGS[name]
    params, whole = model(config)
    tokens = tokens_of(2)
    expected = whole(tokens)
    close(in_pieces(config, params, tokens, ENDS, joint=join_qkv(params)), expected)
    # The part is not idle: without it, the same text is scored otherwise.
    plain = {name: params[name] for name in ("embed", "blocks", "head")}
    without = scores_of(PLAIN, plain, jax.jit(hidden_states, static_argnums=0)(PLAIN, plain, tokens))
    assert np.abs(without - expected).max() > 1e-2


@pytest.mark.parametrize("config", SHALLOW, ids=lambda config: f"d{config.depth}")
def test_the_middle_of_shallow_models(model, config):
    params, whole = model(config)
    tokens = tokens_of(2, 12)
    expected = whole(tokens)
    close(in_pieces(config, params, tokens, [5, 6, 12]), expected)
    ends = in_pieces(config, params, tokens, [5, 12], last={12})
    close(ends[:, -1], expected[:, -1])


def test_only_the_last_token_of_a_piece(model):
    params, whole = model(ALL)
    tokens = tokens_of(2)
    ends = in_pieces(ALL, params, tokens, [70, LENGTH], last={70, LENGTH})
    close(ends, whole(tokens)[:, [69, LENGTH - 1]])


def test_right_padded_prompts_go_on_from_their_own_ends(model):
    params, whole = model(ALL)
    tokens, lengths, rows = tokens_of(3), jnp.array([1, 37, 70]), jnp.arange(3)
    padded = jnp.where(jnp.arange(72) < lengths[:, None], tokens[:, :72], 99)
    table = jnp.arange(9).reshape(3, 3)
    place = Place(table, jnp.zeros(3, jnp.int32), lengths)
    hidden, pages = STEP(ALL, params, padded, place, init_pages(ALL, 9), before=jnp.full(3, -1), last=True)
    expected = whole(tokens)
    close(scores_of(ALL, params, hidden)[:, 0], expected[rows, lengths - 1])
    for i in range(3):
        at = lengths + i
        place = Place(table, at, jnp.ones(3, jnp.int32))
        new, before = tokens[rows, at][:, None], tokens[rows, at - 1]
        hidden, pages = STEP(ALL, params, new, place, pages, before=before)
        close(scores_of(ALL, params, hidden)[:, 0], expected[rows, at])


def test_consecutive_parts_of_a_text_are_read_at_once(model):
    """As rows that have one table; the last is padded, and a row of another text lies between them."""
    params, whole = model(ALL)
    text, other = tokens_of(2)
    parts = [text[:PAGE], other[:PAGE], text[PAGE : 2 * PAGE], jnp.pad(text[2 * PAGE :], (0, 3 * PAGE - LENGTH))]
    table = jnp.array([[2, 0, 3], [1, 4, 5], [2, 0, 3], [2, 0, 3]])
    place = Place(table, jnp.array([0, 0, PAGE, 2 * PAGE]), jnp.array([PAGE, PAGE, PAGE, LENGTH - 2 * PAGE]))
    before = jnp.array([-1, -1, text[PAGE - 1], text[2 * PAGE - 1]])
    hidden, _ = STEP(ALL, params, jnp.stack(parts), place, init_pages(ALL, 6), before=before)
    scores, expected = scores_of(ALL, params, hidden), whole(tokens_of(2))
    got = jnp.concatenate([scores[0], scores[2], scores[3]])[:LENGTH]
    close(got, expected[0])
    close(scores[1], expected[1, :PAGE])


def test_documents_of_a_row_are_what_each_is_alone(model):
    """Training packs conversations; each of them decodes as if it had the row to itself."""
    params, _ = model(ALL)
    sizes = [3, WINDOW + 2, 1, 58]
    documents = jnp.asarray(np.repeat(np.arange(len(sizes)), sizes))[None].repeat(2, axis=0)
    tokens = tokens_of(2, sum(sizes))
    packed = jax.jit(hidden_states, static_argnums=0)(ALL, params, tokens, documents=documents)
    packed = scores_of(ALL, params, packed)
    start = 0
    for size in sizes:
        own = tokens[:, start : start + size]
        ends = [*range(18, size, 18), *range(size - size % 18 + 1, size + 1)]
        close(in_pieces(ALL, params, own, ends, joint=join_qkv(params)), packed[:, start : start + size])
        start += size


def test_no_piece_sees_the_future(model):
    params, _ = model(ALL)
    tokens, joint = tokens_of(2), join_qkv(params)
    before = np.asarray(in_pieces(ALL, params, tokens, ENDS, joint=joint))[0]
    for at in (1, 2, 3, WINDOW, WINDOW + 1, PAGE - 1, PAGE, PAGE + 1, LENGTH - 1):
        changed = tokens.at[0, at].add(1) % PLAIN.vocab_size
        after = np.asarray(in_pieces(ALL, params, changed, ENDS, joint=joint))[0]
        np.testing.assert_array_equal(after[:at], before[:at])
        assert np.abs(after[at] - before[at]).max() > 1e-3


def test_a_token_is_smeared_with_the_one_before_it_and_with_no_other(model):
    params, _ = model(CONFIGS["smear"])
    tokens = jnp.array([[5, 6, 7]])

    def first(before):
        return embedded(CONFIGS["smear"], params, tokens, jnp.array([before]), jnp.float32)

    alone, after_3, after_4 = first(-1), first(3), first(4)
    np.testing.assert_array_equal(alone[:, 1:], after_3[:, 1:])
    table = params["embed"]["embedding"]
    np.testing.assert_allclose(alone[0, 0], table[5] / jnp.sqrt(jnp.mean(table[5] ** 2) + 1e-6), rtol=1e-5)
    assert np.abs(after_3[0, 0] - after_4[0, 0]).max() > 1e-2
    with pytest.raises(ValueError, match="the token before each row's first"):
        embedded(CONFIGS["smear"], params, tokens, None, jnp.float32)


def test_rounded_weights_go_through_the_cache_too(model):
    params, _ = model(ALL)
    rounded = quantize(params, "float32")
    for group in ("residual_scales", "value_embeddings", "smear", "bigrams", "backout"):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded[group])), group
    for kept in (quantize(params, "bfloat16"), stored(params, "bfloat16")):
        assert kept["value_embeddings"]["embedding"].dtype == kept["embed"]["embedding"].dtype == jnp.bfloat16
        assert kept["value_embeddings"]["gate"].dtype == kept["residual_scales"]["input"].dtype == jnp.float32
    exact = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), rounded, is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    tokens, ends = tokens_of(2, 56), [18, 36, 37, 38, 56]
    expected = scores_of(ALL, exact, jax.jit(hidden_states, static_argnums=0)(ALL, exact, tokens))
    close(in_pieces(ALL, rounded, tokens, ends, joint=join_qkv(rounded)), expected, atol=1e-4)


@pytest.mark.parametrize("name, joined", [("attention_scale", True), ("attention_scale", False), ("all", True)])
def test_each_layer_of_a_step_has_counters_of_its_own(model, monkeypatch, name, joined):
    config, seen = CONFIGS[name], []
    params, _ = model(config)

    def recorded(*operands):
        *results, counters = decode_block(*operands)
        *_, following, given, layer = operands
        seen.append((layer, len(given), int(given[0, 0]), following is not None))
        return *results, counters + 1

    monkeypatch.setattr(generation, "decode_block", recorded)
    place = Place(jnp.arange(2)[:, None], jnp.array([3, 5]), jnp.ones(2, jnp.int32))
    joint = join_qkv(params) if joined else None
    paged_hidden(config, params, tokens_of(2, 1), place, init_pages(config, 2), joint=joint, before=jnp.array([1, 2]))
    # All in one array, which each layer gets from the one before, and no number twice.
    assert [call[:3] for call in seen] == [(layer, config.depth, layer) for layer in range(config.depth)]
    straight = joined and not config.residual_scales  # nothing is between this block and the next one's product
    assert [call[3] for call in seen] == [straight] * (config.depth - 1) + [False]
