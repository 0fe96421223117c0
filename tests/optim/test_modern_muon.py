"""Muon with all its additions against NumPy, which has matrices [out, in] as the sources do, alone and over meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import MeshConfig, OptimizerConfig, ScheduleConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import shardings
from jaxchat.optim.decay import add_cautious_decay
from jaxchat.optim.muon import Direction, equalize_columns, newton_schulz, scale_by_muon
from jaxchat.optim.optimizer import POLAR_EXPRESS, make_optimizer
from jaxchat.optim.schedules import matrix_decay, muon_momentum
from tests.optim.test_muon import QUINTIC, SPECTRA, tree

STEPS = 4
MODERN = OptimizerConfig(
    matrix_lr=0.03,
    matrix_weight_decay=0.7,
    muon_momentum=0.9,
    muon_momentum_start=0.6,
    muon_momentum_ratio=0.5,
    muon_momentum_end=0.7,
    polar_express=True,
    equalize_rows=True,
    rescale=True,
    muon_b2=0.9,
    clip_norm=None,
)
SCHEDULE = ScheduleConfig(decay_ratio=0.5, final_fraction=0.1)
MODEL = GPTConfig(depth=3, vocab_size=512)


class NumpyMuon:
    """One matrix W [out, in], as section by section in the papers."""

    def __init__(self, weight):
        self.weight, self.buffer, self.second = weight, np.zeros_like(weight), 0.0
        self.sure = np.ones_like(weight, bool)  # where no direction was so near 0 that rounding decides its sign

    def step(self, grad, momentum, rate, decay):
        self.buffer = momentum * self.buffer + (1 - momentum) * grad
        x = (1 - momentum) * grad + momentum * self.buffer
        out, into = x.shape
        x = x * (np.linalg.norm(x) / np.sqrt(out)) / np.linalg.norm(x, axis=1, keepdims=True)
        x = x / (1.01 * np.linalg.norm(x) + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            outer = x @ x.T
            x = a * x + (b * outer + c * outer @ outer) @ x
        x = x * np.sqrt(min(out, into)) / np.linalg.norm(x)
        mean = (x**2).mean(axis=1 if out >= into else 0, keepdims=True)
        self.second = 0.9 * self.second + 0.1 * mean
        normed = x / np.sqrt(self.second)
        x = normed * np.linalg.norm(x) / np.linalg.norm(normed)
        mask = x * self.weight >= 0
        self.sure &= np.abs(x) > 1e-4
        scaled = rate * np.sqrt(max(1, out / into))
        self.weight = self.weight - scaled * (x + decay * mask * self.weight)


def assert_near(param, numpy):
    np.testing.assert_allclose(np.asarray(param).T[numpy.sure], numpy.weight[numpy.sure], rtol=1e-3, atol=1e-4)
    assert numpy.sure.mean() > 0.98


def optimizer_on(mesh, config=MODERN):
    return make_optimizer(
        config,
        MODEL,
        lambda count: 1.0 - count / 8,
        momentum=muon_momentum(config, SCHEDULE, STEPS),
        decay=matrix_decay(config, STEPS),
        mesh=mesh,
        newton_schulz_dtype=jnp.float32,
    )


MESHES = [None, MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(tensor=2)]


@pytest.mark.parametrize("mesh_config", MESHES)
def test_equals_numpy_on_any_mesh(mesh_config):
    """The momentum is 0.6, 0.75, 0.9, and half-way between 0.9 and 0.7; the decay is half a cosine."""
    mesh = mesh_config and make_mesh(mesh_config)
    rng = np.random.default_rng(0)
    values = tree(lambda shape: rng.normal(size=shape) / 4)
    numpys = jax.tree.map(lambda w: NumpyMuon(w.T), values)
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), values)
    if mesh:
        params = jax.device_put(params, shardings(mesh, params))
    optimizer = optimizer_on(mesh)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for count, momentum in enumerate((0.6, 0.75, 0.9, 0.8)):
        grads = tree(lambda shape: rng.normal(size=shape) / 100)
        now = (momentum, 0.03 * (1 - count / 8), 0.7 * (1 + np.cos(np.pi * count / STEPS)) / 2)
        jax.tree.map(lambda n, g, now=now: n.step(g.T, *now), numpys, grads)
        placed = jax.tree.map(lambda g, p: jax.device_put(g.astype(np.float32), p.sharding), grads, params)
        params, state = step(placed, state, params)
        jax.tree.map(assert_near, params, numpys)


def test_momentum_and_decay_by_the_length_of_the_training():
    config = MODERN
    momentum = [float(muon_momentum(config, SCHEDULE, 10)(count)) for count in range(11)]
    np.testing.assert_allclose(momentum, [0.6, 0.66, 0.72, 0.78, 0.84, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7], rtol=1e-5)
    # Where the rates fall from the start, it rises until it meets the falling line, without a jump.
    falling = [float(muon_momentum(config, ScheduleConfig(decay_ratio=1.0), 10)(count)) for count in range(11)]
    np.testing.assert_allclose(falling, [0.6, 0.66, 0.72, 0.78, 0.82, 0.8, 0.78, 0.76, 0.74, 0.72, 0.7], rtol=1e-5)
    decay = [float(matrix_decay(config, 4)(count)) for count in range(5)]
    np.testing.assert_allclose(decay, 0.7 * np.array([1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]), atol=1e-6)


def test_without_a_known_length_they_do_not_fall():
    momentum, decay = muon_momentum(MODERN), matrix_decay(MODERN)
    assert [float(momentum(count)) for count in (0, 300, 10**6)] == pytest.approx([0.6, 0.9, 0.9])
    assert [float(decay(count)) for count in (0, 10**6)] == pytest.approx([0.7, 0.7])


def test_an_update_takes_the_momentum_and_the_decay_that_it_is_given():
    rng = np.random.default_rng(0)
    params, grads = (tree(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)) for _ in range(2))
    scheduled, given = (
        make_optimizer(MODERN, MODEL, lambda n: 1.0, momentum=lambda n: 0.8, decay=lambda n: 0.2),
        make_optimizer(MODERN, MODEL, lambda n: 1.0, momentum=lambda n: 0.5, decay=lambda n: 0.9),
    )
    expected, _ = jax.jit(scheduled.update)(grads, scheduled.init(params), params)
    found, _ = jax.jit(given.update)(grads, given.init(params), params, muon_momentum=0.8, muon_decay=0.2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


def test_the_host_answers_for_the_steps_that_it_knows():
    for schedule in (muon_momentum(MODERN, SCHEDULE, 10), matrix_decay(MODERN, 10)):
        assert not isinstance(schedule(3), jax.Array)
        np.testing.assert_allclose(schedule(np.arange(10)), [schedule(step) for step in range(10)])
        np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(np.arange(10)), schedule(np.arange(10)), rtol=1e-5)


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(128, 128), (128, 384), (384, 128)], ids=str)
def test_polar_express_in_bf16_is_near_the_exact_polynomials(spectrum, shape):
    """In the directions that the matrix has; what rounding puts into others stays below 1 too.

    Where several values are equal, a rounding moves all of them along a polynomial that is steep there.
    """
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 128)))[0] for n in shape)
    matrix = jnp.asarray((u * SPECTRA[spectrum]) @ v.T, jnp.float32)
    u, values, vt = np.linalg.svd(np.asarray(matrix.astype(jnp.bfloat16), np.float64), full_matrices=False)
    values /= 1.01 * np.linalg.norm(values)
    for a, b, c in POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    rank = np.count_nonzero(SPECTRA[spectrum])
    u, vt = u[:, :rank], vt[:rank]
    actual = np.asarray(newton_schulz(matrix[None], POLAR_EXPRESS, safety=1.01)[0].astype(jnp.float32))
    assert np.linalg.norm(u.T @ actual @ vt.T - np.diag(values[:rank])) < 0.2 * np.linalg.norm(values[:rank])
    assert np.linalg.norm(actual, 2) < 1.25


def test_polar_express_in_bf16_never_blows_up():
    """Thousands of matrices of all ranks, from one that dominates to many equal ones, and of any length."""
    rng = np.random.default_rng(1)
    for size in ((16, 16), (16, 48), (48, 16)):
        u, v = (np.linalg.qr(rng.normal(size=(1000, n, 16)))[0] for n in size)
        decades = rng.uniform(0, 6, size=(1000, 1))
        values = 10 ** (-decades * np.sort(rng.uniform(size=(1000, 16)), axis=1))
        values *= np.arange(16) < rng.integers(1, 17, size=(1000, 1))  # the rest are 0
        lengths = 10 ** rng.uniform(-6, 3, size=(1000, 1, 1))
        stack = jnp.asarray(lengths * (u * values[:, None]) @ v.swapaxes(1, 2), jnp.bfloat16)
        for direction in (Direction(POLAR_EXPRESS, 1.01), Direction(POLAR_EXPRESS, 1.01, equalize=True)):
            found = np.asarray(jax.jit(lambda x, d=direction: d(x)[0])(stack).astype(jnp.float32))
            largest = np.linalg.norm(found, 2, axis=(1, 2))
            assert 0.7 < largest.min() and largest.max() < 1.25


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(8, 8), (8, 24), (24, 8)]), seed=st.integers(0, 2**31), scale=st.floats(-3, 3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)  # fmt: skip
def test_polar_express_comes_nearer_to_one(shape, seed, scale, dtype):
    """Than the quintic, for condition numbers up to 300."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = rng.uniform(0.0033, 1.0, size=8)
    matrix = jnp.asarray(10**scale * (u * values) @ vt, jnp.float32)
    result = np.asarray(newton_schulz(matrix[None], POLAR_EXPRESS, dtype, safety=1.01)[0].astype(jnp.float32))
    singular = np.linalg.svd(result, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.15


def test_zeros_stay_zero():
    everything = Direction(POLAR_EXPRESS, 1.01, equalize=True, rescale=True, variance_decay=0.9)
    x, variance = everything(jnp.zeros((2, 4, 6)), jnp.zeros((2, 1, 6)))
    assert not x.any() and not variance.any()
    column = jnp.ones((1, 4, 6)).at[:, :, 2].set(0)
    x, variance = everything(column, jnp.zeros((1, 1, 6)))
    assert np.isfinite(x.astype(jnp.float32)).all() and not x[:, :, 2].any() and not variance[:, :, 2].any()


def test_equal_columns():
    stack = np.random.default_rng(0).normal(size=(2, 5, 7)) * np.arange(1, 8)
    found = np.asarray(equalize_columns(jnp.asarray(stack, jnp.float32)))
    root_mean_square = np.sqrt((np.linalg.norm(stack, axis=1) ** 2).mean(1, keepdims=True))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.broadcast_to(root_mean_square, (2, 7)), rtol=1e-5)
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True),
                               stack / np.linalg.norm(stack, axis=1, keepdims=True), rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_rescaled_and_normalised_to_the_norm_of_an_orthogonal_matrix(shape):
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
    rescaled, none = Direction(5 * (QUINTIC,), rescale=True, dtype=jnp.float32)(stack)
    assert none is None
    np.testing.assert_allclose(np.linalg.norm(rescaled, axis=(1, 2)), 8**0.5, rtol=1e-5)
    axis = 1 if shape[1] >= shape[0] else 2
    variance = jnp.zeros((3, 1, shape[1]) if axis == 1 else (3, shape[0], 1))
    normed, _ = Direction(5 * (QUINTIC,), variance_decay=0.9, dtype=jnp.float32)(stack, variance)
    plain, _ = Direction(5 * (QUINTIC,), dtype=jnp.float32)(stack)
    np.testing.assert_allclose(np.linalg.norm(normed, axis=(1, 2)), np.linalg.norm(plain, axis=(1, 2)), rtol=1e-5)
    each = np.linalg.norm(normed, axis=axis)  # at the first step all are equally long
    np.testing.assert_allclose(each, np.broadcast_to(each.mean(1, keepdims=True), each.shape), rtol=1e-5)


def test_decay_only_where_the_update_shrinks_the_weight():
    decay = add_cautious_decay(lambda count: 0.5 / (1 + count))
    update, weight = {"w": jnp.array([[1.0, -1.0, 0.0, 2.0]])}, {"w": jnp.array([[4.0, 4.0, 4.0, -4.0]])}
    found, state = decay.update(update, decay.init(weight), weight)
    np.testing.assert_allclose(found["w"], [[1 + 0.5 * 2 * 4, -1, 0.5 * 2 * 4, 2]])  # 1 -> 4 is scaled by 2
    found, _ = decay.update(update, state, weight)
    np.testing.assert_allclose(found["w"], [[1 + 0.25 * 2 * 4, -1, 0.25 * 2 * 4, 2]])


# --- its state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)])
def test_its_variances_are_split_saved_and_restored_onto_any_mesh(mesh_config, tmp_path):
    mesh = make_mesh(mesh_config)
    rng = np.random.default_rng(0)
    optimizer = optimizer_on(mesh)
    params = tree(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))
    state = {"params": params, "opt_state": optimizer.init(params)}
    placed = shardings(mesh, state)
    step = jax.jit(
        lambda state: dict(zip(("params", "opt_state"), _step(optimizer, state), strict=True)), out_shardings=placed
    )
    state = step(jax.device_put(state, placed))
    variance = state["opt_state"][1].inner_states["matrix"].inner_state[0].variance["blocks"]["0"]
    assert variance["attn"]["q"]["kernel"].shape == (1, 16) and variance["mlp"]["down"]["kernel"].shape == (64, 1)
    if mesh_config.tensor == 2:
        assert variance["mlp"]["up"]["kernel"].sharding.shard_shape((1, 64)) == (1, 32)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state, data={}, meta={})
    checkpoints.close()
    other = make_mesh(MeshConfig(fsdp=2))
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings(other, state)
    )
    restored, _, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract, 1)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    after, again = step(state), jax.jit(lambda state: _step(optimizer_on(other), state)[0])(restored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), after["params"], again)


def _step(optimizer, state):
    grads = jax.tree.map(jnp.sin, state["params"])
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    return optax.apply_updates(state["params"], updates), opt_state


def test_collectives_are_per_stack():
    """The variances add two small gathers to a stack at most, there and back."""
    mesh = make_mesh(MeshConfig(fsdp=4))
    muon = scale_by_muon(lambda n: 0.9, Direction(POLAR_EXPRESS, 1.01, variance_decay=0.9), mesh=mesh)
    params = tree(lambda shape: jnp.zeros(shape, jnp.float32))
    params = jax.device_put(params, shardings(mesh, params))
    state = muon.init(params)
    placed = {"opt_state": state}
    state = jax.device_put(placed, shardings(mesh, placed))["opt_state"]
    hlo = jax.jit(muon.update).lower(params, state).compile().as_text()
    collectives = re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", hlo)
    assert 0 < len(collectives) <= 20
