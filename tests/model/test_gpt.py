import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.errors import UserError
from jaxchat.model import reference
from jaxchat.model.config import GPTConfig
from jaxchat.model.generation import init_pages, join_qkv, paged_hidden
from jaxchat.model.gpt import Block, abstract_params, hidden_states, init_params, logits
from jaxchat.ops.compute import Compute
from jaxchat.ops.pages import Place

# Depth 4 has two heads, depth 6 three: grouped and multi-query attention beside the plain one. Windows are of 3.
CONFIGS = [
    GPTConfig(depth=2, sequence_len=32, vocab_size=200),
    GPTConfig(depth=4, sequence_len=32, vocab_size=130, num_kv_heads=1),
    GPTConfig(depth=8, sequence_len=32, vocab_size=128, num_kv_heads=2),
    *(GPTConfig(depth=6, sequence_len=12, vocab_size=128, window_pattern=w) for w in ("S", "SL", "SSSL")),
]


def name(config):
    return f"d{config.depth}-kv{config.kv_heads}-{config.window_pattern}"


def place(rows, start, count):
    """Rows of one page each."""
    start, count = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows,)) for x in (start, count))
    return Place(jnp.arange(rows, dtype=jnp.int32)[:, None], start, count)


def tokens_of(config, batch, length, seed=7):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_training_forward_cached_forward_and_numpy_agree(config, random_params):
    params, tokens = random_params(config), tokens_of(config, 2, 11)
    joint = join_qkv(params)
    trained = logits(config, params, hidden_states(config, params, tokens))

    prompt, pages = paged_hidden(config, params, tokens[:, :2], place(2, 0, 2), init_pages(config, 2))
    parts = [prompt]
    for i in range(2, 11):
        kept = joint if i % 2 else None
        hidden, pages = paged_hidden(config, params, tokens[:, i : i + 1], place(2, i, 1), pages, joint=kept)
        parts.append(hidden)
    cached = logits(config, params, jnp.concatenate(parts, axis=1))

    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    exact_logits = np.stack([reference.logits(config, exact, np.asarray(row)) for row in tokens])
    real = slice(0, config.vocab_size)
    np.testing.assert_allclose(trained[..., real], exact_logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(cached[..., real], exact_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[-1]], ids=name)
def test_a_right_padded_prompt_decodes_like_the_bare_one(config, random_params):
    params, tokens = random_params(config), tokens_of(config, 2, 9)
    lengths = jnp.array([3, 5])
    padded = jnp.where(jnp.arange(8) < lengths[:, None], tokens[:, :8], 99)
    _, pages = paged_hidden(config, params, padded, place(2, 0, lengths), init_pages(config, 2))
    rows = jnp.arange(2)
    for i in range(3):
        hidden, pages = paged_hidden(
            config, params, tokens[rows, lengths + i][:, None], place(2, lengths + i, 1), pages
        )
    for row, length in enumerate(lengths):
        bare = hidden_states(config, params, tokens[row : row + 1, : length + 3])
        np.testing.assert_allclose(hidden[row, 0], bare[0, -1], atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_logits_do_not_see_the_future(config, random_params):
    params, tokens = random_params(config), tokens_of(config, 1, 12)

    def forward(tokens):
        return logits(config, params, hidden_states(config, params, tokens))[0, :, : config.vocab_size]

    before = forward(tokens)
    for t in range(11):
        changed = forward(tokens.at[0, t + 1].add(1) % config.vocab_size)
        np.testing.assert_array_equal(before[: t + 1], changed[: t + 1])
        assert not np.array_equal(before[t + 1], changed[t + 1])


@pytest.mark.parametrize("cached", [False, True], ids=["rows", "cache"])
def test_a_token_at_the_windows_edge_is_seen_and_the_next_one_is_not(cached, random_params):
    """Only the first layer, of a window of 4, tells positions of each other: the last one's output matrix is zero."""
    config = GPTConfig(depth=2, sequence_len=16, vocab_size=200, window_pattern="SL")
    params, tokens = random_params(config), tokens_of(config, 1, 16)
    params["blocks"]["1"]["attn"]["o"]["kernel"] *= 0

    def forward(tokens):
        if not cached:
            return hidden_states(config, params, tokens)[0]
        return paged_hidden(config, params, tokens, place(1, 0, 16), init_pages(config, 1))[0][0]

    changed = forward(tokens.at[0, 5].add(1) % config.vocab_size) != forward(tokens)
    assert np.flatnonzero(changed.any(-1)).tolist() == [5, 6, 7, 8, 9]


def test_windows_repeat_over_the_layers_and_the_last_is_full():
    def windows(pattern, depth=6):
        return GPTConfig(depth=depth, sequence_len=2048, window_pattern=pattern).windows

    assert windows("L") == (None,) * 6
    assert windows("S") == (512,) * 5 + (None,)
    assert windows("SL") == (512, None) * 3
    assert windows("SSSL") == windows("sssl") == (512, 512, 512, None, 512, None)
    assert windows("SSSLSLLL", 4) == (512, 512, 512, None) and windows("S", 1) == (None,)
    assert GPTConfig(window_pattern="sL") == GPTConfig(window_pattern="SL")


@pytest.mark.parametrize("pattern, length", [("L", 13), ("SSSL", 14)])  # lengths that no other test has traced
def test_a_block_is_traced_and_lowered_once_for_each_window(pattern, length, monkeypatch):
    config = GPTConfig(depth=8, sequence_len=16, vocab_size=128, window_pattern=pattern)
    traced, call = [], Block.__call__

    def counted(block, *arguments):
        traced.append(block.window)
        return call(block, *arguments)

    monkeypatch.setattr(Block, "__call__", counted)
    forward = jax.jit(lambda params, tokens: hidden_states(config, params, tokens))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    lowered = forward.lower(abstract_params(config), tokens).as_text()
    jax.eval_shape(jax.grad(lambda *a: forward(*a).sum()), abstract_params(config), tokens)
    assert sorted(traced, key=str) == sorted(set(config.windows), key=str)
    assert lowered.count("func.func private @_run_block") == len(set(config.windows))


def test_gradients_of_a_position_reach_only_the_past(random_params):
    config = CONFIGS[0]
    params, tokens = random_params(config), jnp.arange(10)[None]

    def one_logit(table):
        changed = {**params, "embed": {"embedding": table}}
        return logits(config, changed, hidden_states(config, changed, tokens))[0, 4].sum()

    reached = jnp.abs(jax.grad(one_logit)(params["embed"]["embedding"])).sum(-1)
    assert (reached[:5] > 0).all() and (reached[5:] == 0).all()


def test_initialisation_follows_its_table():
    config = GPTConfig(depth=8, sequence_len=16, vocab_size=5000)
    params = init_params(config, jax.random.key(0))
    width = config.width
    block = params["blocks"]["3"]
    assert np.std(params["embed"]["embedding"]) == pytest.approx(1.0, rel=0.02)
    assert np.std(block["attn"]["q"]["kernel"]) == pytest.approx(width**-0.5, rel=0.02)
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(width**-0.5, rel=0.02)
    for zero in (params["head"], block["attn"]["o"], block["mlp"]["down"]):
        assert not np.any(zero["kernel"])
    assert not np.array_equal(block["attn"]["q"]["kernel"], params["blocks"]["4"]["attn"]["q"]["kernel"])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))


def test_padded_vocabulary_ids_get_no_probability(random_params):
    config = GPTConfig(depth=2, sequence_len=8, vocab_size=129)
    params = random_params(config)
    scores = logits(config, params, hidden_states(config, params, tokens_of(config, 1, 8)))
    assert scores.shape[-1] == 256
    assert (jax.nn.softmax(scores)[..., 129:] == 0).all()
    assert jnp.abs(scores[..., :129]).max() <= config.logit_cap


def test_bf16_stays_near_fp32(random_params):
    config = CONFIGS[0]
    params, tokens = random_params(config), tokens_of(config, 2, 16)
    wide = logits(config, params, hidden_states(config, params, tokens))[..., :200]
    narrow = logits(config, params, hidden_states(config, params, tokens, Compute(jnp.bfloat16)))[..., :200]
    assert narrow.dtype == jnp.float32
    assert jnp.abs(wide - narrow).mean() < 0.03 * jnp.abs(wide).mean() + 0.02


@pytest.mark.parametrize(
    "fields, hint",
    [
        ({"depth": 5}, "nearest depths that work: 4 and 6"),
        ({"num_kv_heads": 5}, "6 heads"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_impossible_shapes_are_refused(fields, hint):
    with pytest.raises(UserError, match=hint):
        GPTConfig(**fields)
