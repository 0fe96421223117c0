"""The whole optimizer: who updates what, AdamW against its formula, clipping, rates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxchat.config import OptimizerConfig
from jaxchat.model import parameters
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import init_params
from jaxchat.model.parameters import Parameter, groups_of
from jaxchat.optim.muon import Direction, scale_by_muon
from jaxchat.optim.optimizer import adamw_groups, groups_in, learning_rates, make_optimizer, peak_rates

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


def test_without_a_limit_the_gradient_stays_and_the_state_looks_alike():
    clipped, free = (make_optimizer(OptimizerConfig(clip_norm=norm), MODEL, lambda count: 1.0) for norm in (1.0, None))
    values, grads = params(), params(scale=7.0)
    assert jax.tree.structure(clipped.init(values)) == jax.tree.structure(free.init(values))
    _, state = jax.jit(free.update)(grads, free.init(values), values)
    adam = state[1].inner_states["head"].inner_state[0]
    np.testing.assert_allclose(adam.mu["head"]["kernel"], 0.2 * grads["head"]["kernel"], rtol=1e-5)


def test_by_default_it_is_what_its_pieces_make():
    """Bit for bit, and with a state of the same structure, so that checkpoints of earlier versions fit."""
    schedule = optax.linear_schedule(1.0, 0.5, 4)

    def rate(peak):
        return lambda count: peak * schedule(count)

    def adamw(peak):
        return optax.adamw(rate(peak), b1=0.8, b2=0.95, eps=1e-10, weight_decay=0.1)

    muon = scale_by_muon(optax.linear_schedule(0.85, 0.95, 300), Direction(5 * ((3.4445, -4.7750, 2.0315),)))
    groups = {
        "matrix": optax.chain(muon, optax.scale_by_learning_rate(rate(0.02))),
        "embedding": adamw(0.2 * 2),
        "head": adamw(0.004 * 2),
    }
    pieces = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, groups_of))
    whole = make_optimizer(OptimizerConfig(weight_decay=0.1), MODEL, schedule)
    values = params()
    states = [pieces.init(values), whole.init(values)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(3):
        grads, made = params(), []
        for place, optimizer in enumerate((pieces, whole)):
            updates, states[place] = jax.jit(optimizer.update)(grads, states[place], values)
            made.append((updates, states[place]))
        jax.tree.map(np.testing.assert_array_equal, *made)


OWN = {"value_embedding": (6, 4), "residual_scale": (3,), "input_scale": (3,), "scalar": (5,), "gate": (4, 2)}


def test_each_group_has_its_own_rates_betas_and_decay(monkeypatch):
    """AdamW by its formula: the factor (width / 768)^-1/2, here 2, is for embeddings and head alone."""
    rows = [Parameter(f"extra/{group}/w", group, P(), "") for group in OWN]  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(parameters, "TABLE", (*parameters.TABLE, *rows))
    config = OptimizerConfig(
        clip_norm=None, weight_decay=0.3, embedding_betas=(0.7, 0.9), head_betas=(0.6, 0.96), head_weight_decay=0.02
    )

    def everything(scale=0.1):
        extra = {group: {"w": jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)} for group, shape in OWN.items()}
        return {**params(scale), "extra": extra}

    expected = {  # rate, betas, decay, where
        "embedding": (0.2 * 2, 0.7, 0.9, 0.3, lambda tree: tree["embed"]["embedding"]),
        "head": (0.004 * 2, 0.6, 0.96, 0.02, lambda tree: tree["head"]["kernel"]),
        "value_embedding": (0.075 * 2, 0.8, 0.995, 0.01, lambda tree: tree["extra"]["value_embedding"]["w"]),
        "residual_scale": (0.0025, 0.8, 0.95, 0.05, lambda tree: tree["extra"]["residual_scale"]["w"]),
        "input_scale": (0.025, 0.96, 0.95, 0.0, lambda tree: tree["extra"]["input_scale"]["w"]),
        "scalar": (0.02, 0.8, 0.95, 0.0, lambda tree: tree["extra"]["scalar"]["w"]),
        "gate": (0.003, 0.8, 0.95, 0.0, lambda tree: tree["extra"]["gate"]["w"]),
    }
    assert set(expected) == set(adamw_groups(config))
    optimizer, values = make_optimizer(config, MODEL, lambda count: 1.0), everything()
    assert groups_in(values) == tuple(sorted(("matrix", *expected)))
    state = optimizer.init(values)
    moments = dict.fromkeys(expected, (0.0, 0.0))
    for step in range(2):
        grads = everything()
        updates, state = jax.jit(optimizer.update)(grads, state, values)
        for group, (rate, b1, b2, decay, find) in expected.items():
            grad, (m, v) = np.asarray(find(grads), np.float64), moments[group]
            m, v = moments[group] = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
            direction = m / (1 - b1 ** (step + 1)) / np.sqrt(v / (1 - b2 ** (step + 1)))
            np.testing.assert_allclose(find(updates), -rate * (direction + decay * find(values)), rtol=2e-4, atol=1e-7)
        values = optax.apply_updates(values, updates)


def test_groups_without_parameters_have_no_state_and_no_rate():
    optimizer = make_optimizer(OptimizerConfig(), MODEL, lambda count: 1.0)
    assert set(optimizer.init(params())[1].inner_states) == {"matrix", "embedding", "head"}
    rates = learning_rates(OptimizerConfig(), MODEL, lambda step: 1.0)(0)
    assert set(rates) == {"lr_matrix", "lr_embedding", "lr_head"} < set(peak_rates(OptimizerConfig(), MODEL))


def test_a_model_with_every_part_has_rates_for_all_groups_and_trains():
    model = GPTConfig(
        depth=2, vocab_size=256, sequence_len=16, residual_scales=True, value_embeddings=True, smear=True, backout=True
    )
    config = OptimizerConfig(matrix_weight_decay=0.1, muon_b2=0.9)
    assert learning_rates(config, model, lambda step: 1.0)(0) == pytest.approx(peak_rates(config, model))
    optimizer, values = make_optimizer(config, model, lambda count: 1.0), init_params(model, jax.random.key(0))
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, values), optimizer.init(values), values)
    assert all(np.isfinite(update).all() and update.any() for update in jax.tree.leaves(updates))
