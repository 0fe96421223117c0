"""Products with what is done to them in the kernel, against plain formulas. The kernels themselves run where there is a
Hopper GPU (`JAX_PLATFORMS=cuda pytest tests/ops`); elsewhere, what is around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import MeshConfig
from jaxchat.devices.gpu import capability
from jaxchat.devices.mesh import make_mesh
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params
from jaxchat.ops import dispatch, hopper, triton
from jaxchat.ops.dispatch import Level
from jaxchat.ops.linear import product_sum
from jaxchat.ops.mlp import relu_squared_gradient_product, relu_squared_product
from jaxchat.ops.norm import rms_norm
from jaxchat.ops.qkv import rope_norm_product, rope_table
from jaxchat.ops.rope import apply_rope, rope_tables
from jaxchat.ops.stack import gram, stack_product, symmetric_product
from jaxchat.train.loss import LossConfig, cross_entropy_sum

ON_HOPPER = capability() == 9.0
SKIP_ELSEWHERE = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
NEEDS_HOPPER = [pytest.mark.gpu, SKIP_ELSEWHERE]


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def relu_squared(x, w):
    return jnp.square(jax.nn.relu(x @ w))


def relu_squared_gradient(grad, w, y):
    return (grad @ w) * 2 * jnp.sqrt(y)


def sum_of_two(a, b, c, d):
    return a @ b.T + c @ d.T


def cases(rows, length, inner, columns, dtype):
    x, w = draw(rows, length, inner, dtype=dtype), draw(inner, columns, seed=1, dtype=dtype) / inner**0.5
    y = jnp.square(draw(rows, length, columns, seed=2, dtype=dtype))
    other = draw(rows, length, 2 * inner, seed=3, dtype=dtype), draw(columns, 2 * inner, seed=4, dtype=dtype)
    return [
        (relu_squared_product, relu_squared, (x, w)),
        (relu_squared_gradient_product, relu_squared_gradient, (x, w, y)),
        (product_sum(2), sum_of_two, (x, w.T, *other)),
    ]


NAMES = ["relu2", "relu2's gradient", "sum"]


SHAPES = [(2, 128, 256, 256), (4, 512, 320, 768), (1, 34 * 256, 640, 2560), (2, 1024, 384, 1408), (3, 640, 384, 2560)]


@pytest.mark.gpu
@SKIP_ELSEWHERE
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", range(3), ids=NAMES)
def test_the_kernels(case, shape):
    kernel, formula, operands = cases(*shape, jnp.bfloat16)[case]
    expected = formula(*(x.astype(jnp.float32) for x in operands))
    actual = jax.jit(kernel)(*operands)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=2**-7, atol=2e-3 * jnp.max(expected))


@pytest.mark.parametrize(
    "shape, heads",
    [
        ((2, 6, 32), 3),
        pytest.param((4, 384, 320), 6, marks=NEEDS_HOPPER),
        pytest.param((4, 384, 320), 11, marks=NEEDS_HOPPER),
        pytest.param((5, 384, 320), 20, marks=NEEDS_HOPPER),
    ],
)
def test_heads_with_rope_and_norm(shape, heads):
    x = draw(*shape, dtype=jnp.bfloat16)
    weight = draw(shape[2], heads, 128, seed=1, dtype=jnp.bfloat16) / shape[2] ** 0.5
    cos, sin = rope_tables(jnp.arange(shape[1])[None], 128, 10_000.0)
    table = jax.jit(rope_table, static_argnums=2)(cos[0, :, 0], sin[0, :, 0], jnp.bfloat16)
    exact = table.astype(jnp.float32).reshape(len(table), 2, 2, -1).sum(2)
    np.testing.assert_allclose(exact, jnp.stack([cos[0, :, 0], sin[0, :, 0]], 1), atol=1e-5)
    actual, scale = jax.jit(rope_norm_product)(x, weight, table)
    product = jnp.einsum("bti,inh->btnh", x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
    expected = rms_norm(apply_rope(product, cos, sin))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=2**-7, atol=4e-3)
    np.testing.assert_allclose(scale, 1 / jnp.sqrt(jnp.mean(product**2, -1) + 1e-6), rtol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [(3, 256, 256), (2, 768, 1536), (2, 1280, 512), (150, 512, 512), (3, 640, 1664), (2, 1664, 2560), (2, 24, 40)],
)
def test_products_of_stacks(shape):
    x = draw(*shape, dtype=jnp.bfloat16)
    tall = shape[1] > shape[2]
    wide = jnp.matrix_transpose(x) if tall else x
    expected = jnp.einsum("lmn,lkn->lmk", *(wide.astype(jnp.float32),) * 2)
    small = gram(x, tall)
    assert_close(small, expected)
    small = (small / jnp.max(small)).astype(jnp.bfloat16)
    square = jnp.matmul(*(small.astype(jnp.float32),) * 2)
    assert_close(symmetric_product(small, small, 2.0, -5.0), 2 * square - 5 * small.astype(jnp.float32))
    operands = (x, small) if tall else (small, x)
    assert_close(stack_product(*operands), jnp.matmul(*(y.astype(jnp.float32) for y in operands)))


def assert_close(actual, expected):
    assert actual.dtype == jnp.bfloat16
    atol = 2**-7 * jnp.max(jnp.abs(expected))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=2**-7, atol=atol)


def test_tiles_may_cover_a_little_more_than_the_result(monkeypatch):
    monkeypatch.setattr(hopper, "highest_level", lambda dtype: Level.HOPPER)
    assert hopper.fits(65536, 1664, 1664) and hopper.fits(1664, 6656, 1664)  # 7 tiles for 6.5
    assert all(hopper.fits(rows * length, columns, inner) for rows, length, inner, columns in SHAPES)
    assert not hopper.fits(65536, 640, 640)  # 3 for 2.5
    assert not hopper.fits(1664, 1664, 1664) and hopper.fits(1664, 1664, 1664, symmetric=True)
    assert not hopper.fits(65536, 1600, 1664)  # half a head
    assert not hopper.fits(65536, 1664, 192)  # less than the ring holds


@pytest.mark.parametrize("side", range(1, 8))
def test_the_squares_of_a_triangle_come_once_each(side):
    numbers = jnp.arange(side * (side + 1) // 2)
    squares = jnp.stack([jnp.array(hopper.below_diagonal(number, side)) for number in numbers])
    assert sorted(map(tuple, squares.tolist())) == [(i, j) for i in range(side) for j in range(i + 1)]


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("weights", [P(), P(None, "tensor"), P("fsdp", "tensor"), P("tensor", "fsdp")], ids=str)
@pytest.mark.parametrize("case", range(3), ids=NAMES)
def test_a_mesh_shares_the_products_out(case, weights):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    function, formula, operands = cases(4, 6, 8, 12, jnp.float32)[case]
    summed_over = P("fsdp", None, "tensor") if case == 2 and weights == P("fsdp", "tensor") else P("fsdp")
    specs = [summed_over if x.ndim == 3 else weights for x in operands]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    np.testing.assert_allclose(jax.jit(function)(*placed), formula(*operands), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_mesh_shares_the_heads_out():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    x, weight = draw(4, 6, 8), draw(8, 4, 128, seed=1)
    cos, sin = rope_tables(jnp.arange(6)[None], 128, 10_000.0)
    table = rope_table(cos[0, :, 0], sin[0, :, 0], jnp.float32)
    expected = rope_norm_product(x, weight, table)
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in ((x, P("fsdp")), (weight, P(None, "tensor")), (table, P()))
    ]
    actual = rope_norm_product(*placed)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert {shard.data.shape for shard in actual[0].addressable_shards} == {(2, 6, 2, 128)}


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_product_over_split_axes_is_added_up_over_devices_not_gathered():
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    function, _, operands = cases(4, 6, 8, 12, jnp.float32)[2]
    specs = [P(None, None, "tensor") if x.ndim == 3 else P(None, "tensor") for x in operands]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    program = jax.jit(function).lower(*placed).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program


@pytest.mark.skipif(ON_HOPPER, reason="there in bf16 alone, and with the kernels")
def test_the_model_and_its_loss_are_the_same(monkeypatch):
    config = GPTConfig(depth=2, sequence_len=16, vocab_size=120, num_kv_heads=1)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.02 * draw(*p.shape), params)  # none of them zero
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 120)
    calls = []

    @jax.default_matmul_precision("highest")  # a GPU's default for fp32 is not
    def loss(params):
        hidden = hidden_states(config, params, tokens[:, :-1])
        return cross_entropy_sum(
            hidden, params["head"]["kernel"], tokens[:, 1:], jnp.ones((2, 16)), LossConfig.of(config)
        )

    plain = jax.value_and_grad(loss)(params)
    jax.clear_caches()
    monkeypatch.setattr(dispatch, "highest_level", lambda *_: Level.HOPPER)
    monkeypatch.setattr(hopper, "fits", lambda *shape: calls.append(shape))
    monkeypatch.setattr(triton, "INTERPRET", True)
    fused = jax.value_and_grad(loss)(params)
    jax.clear_caches()
    assert len(set(map(str, calls))) == 2  # the MLP, forward and back, and the sum of queries, keys and values
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fused, plain)
