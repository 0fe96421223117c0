"""Tokens ahead: one prediction, several targets; against NumPy, and in the train step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.train import loss as module
from jaxchat.train.loss import TOKENS_AHEAD, LossConfig, objective_sum, targets_ahead
from jaxchat.train.step import Reach, init_state, make_train_step

VOCAB, PADDED, CAP = 150, 256, 15.0
WEIGHTS = (1.0, 0.5, 0.25)
CONFIG = GPTConfig(depth=2, sequence_len=16, vocab_size=120)


def reference(hidden, head, targets, weights, scale):
    """Loss, next token's loss and gradients by the definition, one position and one target after another, in fp64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    total, following = 0.0, 0.0
    hidden_grad, head_grad = np.zeros_like(hidden), np.zeros_like(head)
    for row, length in np.ndindex(targets.shape):
        tanh = np.tanh(hidden[row, length] @ head / CAP)
        p = np.where(np.arange(PADDED) < VOCAB, np.exp(CAP * tanh), 0.0)
        p /= p.sum()
        for ahead, weight in enumerate(weights):
            until = targets[row, length : length + ahead + 1]
            if len(until) <= ahead or min(until) < 0:
                break
            total -= scale * weight * np.log(p[until[-1]])
            following -= np.log(p[until[-1]]) if ahead == 0 else 0.0
            pull = scale * weight * (p - (np.arange(PADDED) == until[-1])) * (1 - tanh**2)
            hidden_grad[row, length] += head @ pull
            head_grad += np.outer(hidden[row, length], pull)
    return total, following, hidden_grad, head_grad


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        3 * jax.random.normal(keys[0], (4, 12, 32)),
        jax.random.normal(keys[1], (32, PADDED)),
        np.array(jax.random.randint(keys[2], (4, 12), -20, VOCAB)).clip(-1),
    )


@pytest.fixture(scope="module")
def expected(case):
    return reference(*case, WEIGHTS, 0.25)


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 4 * 3 * PADDED, 1])
@pytest.mark.parametrize("devices", [1, 4])
def test_value_and_gradients_equal_the_definition(case, expected, chunk_bytes, devices, monkeypatch):
    if jax.device_count() < devices:
        pytest.skip(f"there are not {devices} devices")
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    mesh = make_mesh(MeshConfig(fsdp=min(devices, 2)), jax.devices()[:devices])
    hidden, head, targets = case
    several = targets_ahead(jnp.asarray(targets), 2)

    def ahead(hidden, head):
        shares = 0.25 * jnp.broadcast_to(jnp.array(WEIGHTS), several.shape)
        return objective_sum(hidden, head, several, {"shares": shares}, TOKENS_AHEAD, LossConfig(VOCAB, CAP, mesh))

    (value, sums), grads = jax.jit(jax.value_and_grad(ahead, (0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose([value, sums["next"]], expected[:2], rtol=1e-5)
    for grad, by_definition in zip(grads, expected[2:], strict=True):
        np.testing.assert_allclose(grad, by_definition, atol=2e-5)


def test_targets_end_at_the_end_of_a_row_and_at_a_border():
    found = targets_ahead(jnp.array([[1, 2, -1, 4, 5, 6]]), 2)
    assert found.tolist() == [[[1, 2, -1], [2, -1, -1], [-1, -1, -1], [4, 5, 6], [5, 6, -1], [6, -1, -1]]]


# --- in the train step ------------------------------------------------------------------------------------------------


def batch(seed=0, accumulation=2, rows=2, length=16):
    tokens = np.random.default_rng(seed).integers(0, 120, (accumulation, rows, length + 1), dtype=np.int32)
    return {"inputs": jnp.array(tokens[..., :-1]), "targets": jnp.array(tokens[..., 1:])}


def stepped(batch, config=CONFIG, steps=1):
    optimizer = make_optimizer(OptimizerConfig(), config, optax.constant_schedule(1.0), newton_schulz_dtype=jnp.float32)
    state = init_state(init_params(config, jax.random.key(0)), optimizer)
    # With a head of zeros no gradient would reach the layers in the first step.
    state["params"]["head"]["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), (config.width, 128))
    state["params"]["blocks"]["0"]["attn"]["o"]["kernel"] += 0.02
    step = make_train_step(config, optimizer)
    for _ in range(steps):
        state, metrics = step(state, batch)
    assert step._cache_size() == 1
    return state["params"], {name: float(value) for name, value in metrics.items()}


def assert_same(params, others, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), params, others)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_that_of_the_next_token_and_the_rest_apart(accumulation):
    given = batch(accumulation=accumulation, rows=4 // accumulation)
    plain_params, plain = stepped(given)
    params, metrics = stepped({**given, "ahead": jnp.array([0.5, 0.25])})
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-6) and metrics["targets"] == plain["targets"]
    # Random tokens: those further ahead are as hard to predict; the last positions of a row have fewer.
    assert metrics["loss_ahead"] == pytest.approx(plain["loss"] * (0.5 * 15 + 0.25 * 14) / 16, rel=0.1)
    assert (
        np.abs(params["blocks"]["0"]["attn"]["q"]["kernel"] - plain_params["blocks"]["0"]["attn"]["q"]["kernel"]).max()
        > 1e-4
    )
    params, metrics = stepped({**given, "ahead": jnp.zeros(2)})
    assert metrics["loss_ahead"] == pytest.approx(0, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_a_batch_that_says_how_many_micro_batches_is_the_smaller_one():
    small = batch(accumulation=2)
    padding = {"inputs": jnp.zeros((3, 2, 16), jnp.int32), "targets": jnp.full((3, 2, 16), -1)}
    large = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), small, padding)
    for more in ({}, {"ahead": jnp.array([0.5])}):
        params, metrics = stepped({**small, **more})
        others, same = stepped({**large, **more, "micro_batches": jnp.array(2)})
        assert same == pytest.approx(metrics, rel=1e-6)
        assert_same(params, others, 1e-6)


def test_reach_is_a_model_with_other_windows():
    """A quarter of whole windows is what S is, in all layers; the last layer of a pattern is always L."""
    given = batch()
    whole, metrics = stepped(given)
    near, quarter = stepped({**given, "reach": Reach(0.25)})
    assert abs(quarter["loss"] - metrics["loss"]) > 1e-5

    class Short(GPTConfig):
        @property
        def windows(self):
            return (4, 4)

    by_windows, short = stepped(given, Short(**dataclasses.asdict(CONFIG)))
    assert short == pytest.approx(quarter, rel=1e-6)
    assert_same(near, by_windows, 1e-6)


@pytest.mark.parametrize("pattern, windows", [("L", (4, 4, 4)), ("SSL", (1, 1, 4)), ("SL", (1, 4, 4))])
def test_all_windows_shrink(pattern, windows):
    config = GPTConfig(depth=3, sequence_len=16, vocab_size=120, window_pattern=pattern)
    assert dataclasses.replace(config, reach=0.25).windows == windows
    assert dataclasses.replace(config, reach=0.95).windows[-1] == 16 and config.windows[-1] is None


@pytest.mark.parametrize("reach", [1.0, 0.25])
def test_nothing_is_known_of_later_tokens_or_of_those_out_of_reach(reach):
    config = dataclasses.replace(CONFIG, reach=reach)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    tokens = batch()["inputs"][0]

    def scores(tokens):
        return np.asarray(logits(config, params, hidden_states(config, params, tokens)))

    before, at = scores(tokens), 3
    changed = np.any(scores(tokens.at[:, at].add(1)) != before, axis=(0, 2))
    assert not changed[:at].any() and changed[at]
    assert changed[at:].all() if reach == 1 else not changed[at + 2 * 4 + 1 :].any()
