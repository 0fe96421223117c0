"""The whole optimizer: who updates what, AdamW against its formula, clipping, rates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import OptimizerConfig
from jaxchat.model.config import GPTConfig
from jaxchat.optim.optimizer import learning_rates, make_optimizer

MODEL = GPTConfig(depth=3, vocab_size=512)
RNG = np.random.default_rng(0)


def params(scale=0.1):
    def array(*shape):
        return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)

    def matrices(**shapes):
        return {name: {"kernel": array(*shape)} for name, shape in shapes.items()}

    block = {
        "attn": matrices(q=(8, 8), k=(8, 4), v=(8, 4), o=(8, 8)),
        "mlp": matrices(up=(8, 32), down=(32, 8)),
    }
    return {"embed": {"embedding": array(16, 8)}, "blocks": {"0": block}, "head": {"kernel": array(8, 16)}}


def test_learning_rates():
    rates = learning_rates(OptimizerConfig(), MODEL, lambda step: 1 / (1 + step), lr_fraction=0.5)(1)
    assert rates == pytest.approx({"lr_matrix": 0.005, "lr_embedding": 0.1, "lr_head": 0.002})


def test_adamw_equals_its_formula_and_rates_follow_the_count():
    config = OptimizerConfig(weight_decay=0.1, clip_norm=1e9)
    optimizer = make_optimizer(config, MODEL, lambda count: 1.0 - count / 4, lr_fraction=0.5)
    values = params()
    state = optimizer.init(values)
    update = jax.jit(optimizer.update)
    expected = {
        key: np.asarray(values[key][name], np.float64) for key, name in (("embed", "embedding"), ("head", "kernel"))
    }
    moments = {key: (0.0, 0.0) for key in expected}
    # Depth 3 is 192 wide, which doubles Adam's rates.
    peaks = {"embed": 0.2 * 2 * 0.5, "head": 0.004 * 2 * 0.5}
    for step in range(4):
        grads = params(scale=10.0**-step)
        updates, state = update(grads, state, values)
        values = optax.apply_updates(values, updates)
        for key, name in (("embed", "embedding"), ("head", "kernel")):
            grad, (m, v) = np.asarray(grads[key][name], np.float64), moments[key]
            m, v = 0.8 * m + 0.2 * grad, 0.95 * v + 0.05 * grad**2
            moments[key] = m, v
            m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
            rate = peaks[key] * (1 - step / 4)
            expected[key] = expected[key] - rate * (m_hat / (np.sqrt(v_hat) + 1e-10) + 0.1 * expected[key])
            np.testing.assert_allclose(values[key][name], expected[key], rtol=1e-5, atol=1e-6)


def test_matrices_take_muons_step():
    """An update of rate lr moves a matrix by lr sqrt(max(1, out/in)) in every direction, however long the gradient."""
    optimizer = make_optimizer(OptimizerConfig(), MODEL, lambda count: 1.0, newton_schulz_dtype=jnp.float32)
    values, update = params(), jax.jit(optimizer.update)
    for scale in (1e-3, 1e3):
        updates, _ = update(params(scale), optimizer.init(values), values)
        up = np.linalg.svd(updates["blocks"]["0"]["mlp"]["up"]["kernel"], compute_uv=False)
        down = np.linalg.svd(updates["blocks"]["0"]["mlp"]["down"]["kernel"], compute_uv=False)
        assert (0.6 * 0.04 < up).all() and (up < 1.3 * 0.04).all()
        assert (0.6 * 0.02 < down).all() and (down < 1.3 * 0.02).all()


def test_clips_by_the_norm_of_all_groups_together():
    """Adam's first moment is 0.2 of the gradient that it was given."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=0.5), MODEL, lambda count: 1.0)
    values, grads = params(), params(scale=7.0)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(values), values)
    adam = state[1].inner_states["head"].inner_state[0]
    np.testing.assert_allclose(adam.mu["head"]["kernel"], 0.2 * 0.5 / norm * grads["head"]["kernel"], rtol=1e-5)


def test_logging_the_norm_costs_nothing():
    """XLA merges the step's own global norm with the clip's: as many reductions with it as without."""
    optimizer = make_optimizer(OptimizerConfig(), MODEL, lambda count: 1.0)
    values = params()

    def reductions(step):
        hlo = jax.jit(step).lower(values, optimizer.init(values), values).compile().as_text()
        return len(re.findall(r"= f32\[\]\S* reduce\(", hlo))

    def with_norm(grads, state, values):
        return optax.tree.norm(grads), optimizer.update(grads, state, values)

    assert 0 < reductions(with_norm) <= reductions(optimizer.update)
