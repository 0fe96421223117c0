"""Muon against a plain NumPy one that takes a matrix at a time, alone and over meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.model.parameters import shardings
from jaxchat.optim.muon import Direction, newton_schulz, scale_by_muon

QUINTIC = (3.4445, -4.7750, 2.0315)
SHAPES = {"attn": {"q": (16, 16), "k": (16, 4), "v": (16, 4), "o": (16, 16)}, "mlp": {"up": (16, 64), "down": (64, 16)}}


def numpy_newton_schulz(matrix, steps=5, coefficients=QUINTIC):
    a, b, c = coefficients
    x = matrix / (np.sqrt((matrix**2).sum()) + 1e-7)
    for _ in range(steps):
        xx = x @ x.T
        x = a * x + b * xx @ x + c * xx @ xx @ x
    return x


class NumpyMuon:
    def __init__(self):
        self.buffers = {}

    def direction(self, name, grad, mu):
        buffer = self.buffers.get(name, np.zeros_like(grad))
        self.buffers[name] = buffer = buffer + (1 - mu) * (grad - buffer)
        fan_in, fan_out = grad.shape
        return numpy_newton_schulz(grad + mu * (buffer - grad)) * np.sqrt(max(1, fan_out / fan_in))


def tree(function):
    return {
        "blocks": {
            str(i): {part: {n: {"kernel": function(s)} for n, s in kernels.items()} for part, kernels in SHAPES.items()}
            for i in range(3)
        }
    }


def numpy_run(steps):
    """Gradients and NumPy's directions for several steps of growing momentum."""
    rng, reference = np.random.default_rng(0), NumpyMuon()
    for step in range(steps):
        grads = tree(lambda shape: rng.normal(size=shape) / 100)
        expected = jax.tree.map_with_path(
            lambda path, g, mu=0.5 + 0.1 * step: reference.direction(jax.tree_util.keystr(path), g, mu), grads
        )
        yield grads, expected


@pytest.mark.parametrize(
    "mesh_config",
    [None, MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=2), MeshConfig(tensor=2)],
)
def test_equals_numpy_on_any_mesh(mesh_config):
    mesh = mesh_config and make_mesh(mesh_config)
    muon = scale_by_muon(lambda n: 0.5 + 0.1 * n, Direction(5 * (QUINTIC,), dtype=jnp.float32), mesh=mesh)
    params = tree(lambda shape: jnp.zeros(shape, jnp.float32))
    if mesh:
        params = jax.device_put(params, shardings(mesh, params))
    state = jax.jit(muon.init)(params)
    update = jax.jit(muon.update)
    for grads, expected in numpy_run(4):
        grads = jax.tree.map(lambda g, p: jax.device_put(g.astype(np.float32), p.sharding), grads, params)
        updates, state = update(grads, state)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=2e-4, atol=2e-5), updates, expected)
        if mesh:
            jax.tree.map(
                lambda u, p: u.sharding.is_equivalent_to(p.sharding, 2) or pytest.fail("moved"), updates, params
            )
    assert int(state.count) == 4


@pytest.mark.parametrize(
    "config, most",
    [(MeshConfig(), 5), (MeshConfig(fsdp=4), 10), (MeshConfig(tensor=4), 10), (MeshConfig(fsdp=2, tensor=2), 20)],
)
def test_collectives_are_per_stack_not_per_matrix(config, most):
    """18 matrices make five stacks: gathered once over data; there and back again over each axis that shards them."""
    mesh = make_mesh(config)
    muon = scale_by_muon(lambda n: 0.9, Direction(5 * (QUINTIC,)), mesh=mesh)
    params = tree(lambda shape: jnp.zeros(shape, jnp.float32))
    params = jax.device_put(params, shardings(mesh, params))
    hlo = jax.jit(muon.update).lower(params, jax.jit(muon.init)(params)).compile().as_text()
    collectives = re.findall(r" (all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(", hlo)
    assert 0 < len(collectives) <= most
    assert set(collectives) == {"all-gather" if config == MeshConfig() else "all-to-all"}


def test_work_is_shared_out():
    params = tree(lambda shape: jnp.zeros(shape, jnp.float32))

    def flops(mesh):
        muon = scale_by_muon(lambda n: 0.9, Direction(5 * (QUINTIC,), dtype=jnp.float32), mesh=mesh)
        placed = jax.device_put(params, shardings(mesh, params)) if mesh else params
        return jax.jit(muon.update).lower(placed, muon.init(placed)).compile().cost_analysis()["flops"]

    assert flops(make_mesh(MeshConfig())) < 0.5 * flops(None)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(8, 8), (8, 24), (24, 8)]), seed=st.integers(0, 2**31), scale=st.floats(-3, 3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)  # fmt: skip
def test_singular_values_come_near_one_and_vectors_stay(shape, seed, scale, dtype):
    """Holds for condition numbers up to about 50; smaller singular values need more than five steps."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    values = rng.uniform(0.05, 1.0, size=8)
    matrix = jnp.asarray(10**scale * (u * values) @ vt, jnp.float32)
    result = np.asarray(newton_schulz(matrix[None], 5 * (QUINTIC,), dtype)[0].astype(jnp.float32))
    singular = np.linalg.svd(result, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    aligned = u.T @ result @ vt.T
    tolerance = 1e-3 if dtype == jnp.float32 else 0.15
    np.testing.assert_allclose(aligned, np.diag(np.diag(aligned)), atol=tolerance)


SPECTRA = {
    "powers": np.arange(1, 129) ** -1.5,
    "one direction": np.append(1, np.full(127, 1e-3)),
    "few directions": np.append(np.ones(8), np.zeros(120)),
    "exponential": np.exp(-np.arange(128) / 13),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [128, 384])
def test_rounding_to_bf16_does_no_harm(spectrum, size):
    """Whatever the spectrum, the result lies as near to the exact polynomial's as bf16 allows, and does not blow up."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 128)))[0] for n in (128, size))
    matrix = jnp.asarray((u * SPECTRA[spectrum]) @ v.T, jnp.float32)
    u, values, vt = np.linalg.svd(np.asarray(matrix.astype(jnp.bfloat16), np.float64), full_matrices=False)
    values /= np.linalg.norm(values)
    a, b, c = QUINTIC
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    expected = (u * values) @ vt
    actual = np.asarray(newton_schulz(matrix[None], 5 * (QUINTIC,))[0].astype(jnp.float32))
    assert np.linalg.norm(actual - expected) < 0.06 * np.linalg.norm(expected)
    assert np.linalg.norm(actual, 2) < 1.25


def test_cubic_iteration_through_the_coefficients():
    """3/2 X - 1/2 X X^T X, run long enough, gives the polar factor itself."""
    matrix = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    got = newton_schulz(jnp.asarray(matrix)[None], 30 * ((1.5, -0.5, 0.0),), jnp.float32)[0]
    np.testing.assert_allclose(got, u @ vt, atol=1e-5)


def test_zero_matrix_stays_zero():
    assert not newton_schulz(jnp.zeros((2, 4, 4)), 5 * (QUINTIC,)).any()


def test_count_drives_the_schedule_and_momentum_is_fp32():
    muon = scale_by_muon(optax.linear_schedule(0.0, 1.0, 2), Direction(5 * (QUINTIC,)))
    grads = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    state = muon.init(grads)
    assert state.count == 0 and state.momentum["w"].dtype == jnp.float32
    _, state = muon.update(grads, state)
    np.testing.assert_allclose(state.momentum["w"], 1.0)
    _, state = muon.update({"w": jnp.full((4, 4), 3.0)}, state)
    np.testing.assert_allclose(state.momentum["w"], 2.0)
    _, state = muon.update({"w": jnp.full((4, 4), 9.0)}, state)
    np.testing.assert_allclose(state.momentum["w"], 2.0)
    assert state.count == 3
