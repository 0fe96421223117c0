"""Matrix products in fp8 against the same formulas in fp32: in Pallas' interpreter on a CPU, or on a GPU if
there is one (`JAX_PLATFORMS=cuda pytest tests/ops`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import Experiment, MeshConfig
from jaxchat.devices.gpu import capability
from jaxchat.devices.mesh import make_mesh
from jaxchat.errors import UserError
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params
from jaxchat.ops import fp8, triton
from jaxchat.ops.add_product import add_product
from jaxchat.ops.attention import attend
from jaxchat.ops.compute import Compute, for_training
from jaxchat.ops.dispatch import Operation
from jaxchat.ops.mlp import add_mlp
from jaxchat.ops.norm import rms_norm
from jaxchat.ops.qkv import norm_qkv
from jaxchat.ops.rope import apply_rope, rope_tables


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", capability() == 0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def in_fp8(operation: Operation):
    return operation.choose(jnp.zeros(()), fp8=True)


def relative_error(actual, expected):
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def assert_close(function, plain, *arguments, forward=0.05, backward=0.12):
    """Results within the error of e4m3's 4 bits, gradients within that of e5m2's 3."""

    def run(function):
        out, pull = jax.vjp(function, *arguments)
        cotangent = jax.tree.map(lambda x: draw(*x.shape, seed=5).astype(x.dtype), out)
        return jax.tree.leaves(out), jax.tree.leaves(pull(cotangent))

    for actual, expected, most in zip(run(function), run(plain), (forward, backward), strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) < most


@settings(deadline=None)
@given(st.floats(1e-25, 1e25), st.sampled_from([fp8.E4M3, fp8.E5M2]))
def test_a_scale_is_the_largest_power_of_two_that_fits(largest, dtype):
    scale, end = float(fp8._scale(jnp.float32(largest), dtype)), float(jnp.finfo(dtype).max)
    assert np.frexp(scale)[0] == 0.5
    assert scale * largest <= end * (1 + 1e-6) and 2.01 * scale * largest > end


def test_the_scale_of_a_norm_is_that_of_its_bound():
    for width in (64, 96, 768, 1280, 1664, 2048):
        assert fp8._norm_scale(width) == float(fp8._scale(jnp.float32(width**0.5), fp8.E4M3))


@pytest.mark.parametrize("shape", [(2, 16, 96), (1, 32, 64), (3, 8, 320)])
def test_a_tensor_is_written_both_ways(shape):
    x, scale = draw(*shape), jnp.float32(4.0)
    rows, columns = fp8.quantize[fp8.E4M3](x, scale)
    assert rows.dtype == fp8.E4M3
    np.testing.assert_array_equal(rows.astype(jnp.float32), (4 * x).astype(fp8.E4M3).astype(jnp.float32))
    np.testing.assert_array_equal(columns.astype(jnp.float32), jnp.moveaxis(rows.astype(jnp.float32), 2, 0))


def test_what_does_not_fit_becomes_the_end_of_the_format():
    rows, _ = fp8.quantize[fp8.E4M3](jnp.full((1, 16, 64), -1e6), jnp.float32(1.0))
    assert (rows.astype(jnp.float32) == -448).all()


@pytest.mark.parametrize("width", [64, 192, 320])
def test_the_norm(width):
    x = 3 * draw(2, 16, width)
    normed, scale = fp8.normed(x)
    expected = rms_norm(x)
    assert relative_error(normed.rows.astype(jnp.float32) * normed.inverse, expected) < 0.04
    np.testing.assert_array_equal(
        normed.columns.astype(jnp.float32), jnp.moveaxis(normed.rows.astype(jnp.float32), 2, 0)
    )
    np.testing.assert_allclose(scale, 1 / np.sqrt(np.mean(np.square(x), -1) + 1e-6), rtol=1e-5)


def test_queries_keys_and_values():
    x = draw(2, 16, 96).astype(jnp.bfloat16)
    kernels = [0.1 * draw(96, width, seed=width) for width in (96, 48, 48)]
    rope = rope_tables(jnp.arange(16)[None], 48, 10_000.0)

    def small(x, *kernels):
        x, q, k, v = norm_qkv(x, *kernels, rope, fp8=True)
        assert jnp.abs(v.array).max() <= v.bound
        return x, q, k, v.array

    def plain(x, *kernels):
        q, k, v = ((rms_norm(x) @ kernel).reshape(2, 16, -1, 48) for kernel in kernels)
        return x, rms_norm(apply_rope(q, *rope)), rms_norm(apply_rope(k, *rope)), v

    assert_close(small, plain, x, *kernels)


def test_the_product_that_is_added():
    x, out = (draw(2, 16, width, seed=width).astype(jnp.bfloat16) for width in (96, 64))
    kernel, bound = 0.2 * draw(64, 96), jnp.float32(30.0)  # some binades above the largest

    def small(x, out, kernel):
        return add_product(x, fp8.Bounded(out, bound), kernel, fp8=True)

    assert_close(small, lambda x, out, kernel: x + out @ kernel, x, out, kernel)


def test_what_has_lost_its_bound_is_measured_not_clipped():
    """As when a value embedding is added to the values: the bound of the values does not hold for the sum."""
    x, v = (draw(2, 16, width, seed=width).astype(jnp.bfloat16) for width in (96, 64))
    kernel, added = 0.2 * draw(64, 96), 100 * draw(2, 16, 64, seed=7).astype(jnp.bfloat16)
    values = fp8.Bounded(v, fp8.largest_magnitude(v))
    for branch in (values + added, added + values, values * added, jnp.asarray(values) * 100.0):
        assert not isinstance(branch, fp8.Bounded)
        expected = x.astype(jnp.float32) + branch.astype(jnp.float32) @ kernel
        assert relative_error(add_product(x, branch, kernel, fp8=True), expected) < 0.05


def test_attention_keeps_a_bound():
    q, k, v = (draw(1, 8, 2, 16, seed=seed) for seed in range(3))
    mixed = attend(q, k, fp8.Bounded(v, fp8.largest_magnitude(v)))
    np.testing.assert_array_equal(mixed.array, attend(q, k, v))
    assert jnp.abs(mixed.array).max() <= mixed.bound


def test_the_mlp():
    x = draw(2, 16, 96).astype(jnp.bfloat16)
    up, down = 0.1 * draw(96, 384), 0.05 * draw(384, 96, seed=1)
    assert_close(in_fp8(add_mlp), lambda x, up, down: x + jnp.square(jax.nn.relu(rms_norm(x) @ up)) @ down, x, up, down)


def test_zeros_in_the_weights_give_zeros():
    x = draw(1, 16, 64).astype(jnp.bfloat16)
    up, down = draw(64, 256), jnp.zeros((256, 64))
    out, pull = jax.vjp(in_fp8(add_mlp), x, up, down)
    grad_x, grad_up, grad_down = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(grad_x, 1)
    assert not grad_up.any() and jnp.isfinite(grad_down).all() and grad_down.any()


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["data4", "fsdp2tensor2"])
def test_a_mesh_gives_what_one_device_gives(mesh):
    mesh = make_mesh(mesh, jax.devices()[:4])
    x = draw(4, 16, 64).astype(jnp.bfloat16)
    up, down = 0.1 * draw(64, 256), 0.05 * draw(256, 64, seed=1)

    def run(x, up, down):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.square(in_fp8(add_mlp)(*a).astype(jnp.float32))), (0, 1, 2))(
            x, up, down
        )

    specs = (P(("data", "fsdp")), P("fsdp", "tensor"), P("tensor", "fsdp"))
    split = jax.jit(run)(
        *(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, up, down), specs, strict=True))
    )
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(jax.jit(run)(x, up, down)), strict=True):
        assert relative_error(a, b) < 0.03  # sums in another order, then rounded to e5m2's 3 bits


def test_the_model_in_fp8_is_near_the_model_in_fp32():
    config = GPTConfig(depth=2, sequence_len=16, vocab_size=120)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.02 * draw(*p.shape), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 120)
    jax.clear_caches()  # of blocks without kernels, and then of those with them: neither serves other tests
    small = hidden_states(config, params, tokens, Compute(jnp.bfloat16, fp8=True))
    assert 1e-3 < relative_error(small, hidden_states(config, params, tokens)) < 0.1
    jax.clear_caches()


@pytest.mark.skipif(fp8.supported(), reason="there is such a GPU")
def test_precision_fp8_is_refused_without_such_a_gpu():
    with pytest.raises(UserError, match="fp8 needs an NVIDIA GPU of the Hopper generation"):
        for_training(Experiment(precision="fp8"))
    assert not for_training(Experiment(precision="bfloat16")).fp8
