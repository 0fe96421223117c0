"""The Triton kernels against the plain formulas: in Pallas' interpreter on a CPU, or on a GPU if there is one
(`JAX_PLATFORMS=cuda pytest tests/ops`)."""

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
from jaxchat.ops import triton
from jaxchat.ops.cross_entropy import capped_logits, cross_entropy_rows, nll_of
from jaxchat.ops.dispatch import Level, highest_level
from jaxchat.ops.mlp import relu_squared
from jaxchat.ops.norm import norm_branch, rms_norm
from jaxchat.ops.rope import apply_rope, rope_norm, rope_tables
from jaxchat.ops.stack import stack
from jaxchat.rl.objectives import PolicyObjective
from jaxchat.train.loss import TOKENS_AHEAD, LossConfig, cross_entropy_sum, objective_sum, targets_ahead


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", capability() == 0)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def value_and_grads(function, *arguments):
    """The results and the gradients of a random weighting of them: any mistake in either shows."""

    def weighted(*arguments):
        out = function(*arguments)
        parts = [jnp.sum(x * draw(*x.shape, seed=9 + i)) for i, x in enumerate(jax.tree.leaves(out))]
        return sum(parts), out

    grads, out = jax.grad(weighted, argnums=tuple(range(len(arguments))), has_aux=True)(*arguments)
    return jax.tree.leaves((out, grads))


def assert_same(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [64, 96, 320], ids=["pow2", "masked", "wide"])
def test_the_norm_that_branches_off(width):
    x = draw(2, 6, width)
    assert_same(value_and_grads(norm_branch, x), value_and_grads(norm_branch.formula, x))


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = jnp.zeros((1, 4, 64))
    assert_same(value_and_grads(norm_branch, x), value_and_grads(norm_branch.formula, x))


def test_relu_squared():
    x = draw(2, 6, 96)
    assert_same(value_and_grads(relu_squared, x), value_and_grads(relu_squared.formula, x))


@pytest.mark.skipif(capability() > 0, reason="there the dtype decides")
def test_the_interpreter_runs_the_kernels():
    assert highest_level(jnp.float32) == Level.TRITON
    for operation, operands in (
        (norm_branch, [draw(2, 6, 64)]),
        (stack, [[draw(8, 16)]]),
        (relu_squared, [draw(2, 6, 64)]),
    ):
        assert operation.choose(*operands) is not operation.formula


@pytest.mark.parametrize("count, shape", [(1, (8, 16)), (5, (24, 40))])
def test_a_stack(count, shape):
    matrices = [draw(*shape, seed=seed) for seed in range(count)]
    np.testing.assert_array_equal(stack(matrices), np.stack(matrices))


@pytest.mark.parametrize("heads, size", [(1, 64), (3, 128), (2, 96)])
def test_rope_and_the_norm_of_each_head(heads, size):
    x = draw(2, 8, heads, size)
    cos, sin = rope_tables(jnp.arange(8)[None], size, 10_000.0)
    plain = value_and_grads(lambda x: rms_norm(apply_rope(x, cos, sin)), x)
    assert_same(value_and_grads(lambda x: rope_norm(x, cos, sin), x), plain)


@pytest.mark.parametrize("vocab", [300, 384])
def test_the_rows_of_the_loss(vocab):
    rows, padded, cap = 6, 384, 15.0
    scores, weights = 8 * draw(rows, padded), jnp.abs(draw(rows, seed=1))
    targets = jnp.array([0, 299, -1, 7, -1, 150])

    def loss(scores):
        capped = cap * jnp.tanh(scores / cap)
        capped = jnp.where(jnp.arange(padded) < vocab, capped, -jnp.inf)
        log_p = jax.nn.log_softmax(capped)
        nll = jnp.where(targets >= 0, -log_p[jnp.arange(rows), jnp.maximum(targets, 0)], 0.0)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1)
        return jnp.sum(weights * nll), (nll, entropy)

    expected_grad, expected = jax.grad(loss, has_aux=True)(scores)
    nll, factor, grad, entropy = cross_entropy_rows(scores, targets, vocab, cap, with_entropy=True)
    assert_same((nll, entropy, (weights * factor)[:, None] * grad), (*expected, expected_grad))
    without = cross_entropy_rows(scores, targets, vocab, cap)
    assert without[3] is None
    assert_same(without[:3], (nll, factor, grad), 0)


def test_the_rows_of_several_targets():
    rows, padded, vocab, cap = 5, 384, 300, 15.0
    scores = 8 * draw(rows, padded)
    targets = jnp.array([[0, 299, 7], [150, -1, -1], [-1, -1, -1], [7, 7, 7], [150, 2, 150]])
    shares = jnp.where(targets >= 0, jnp.array([1.0, 0.5, 0.25]), 0.0)
    shares /= jnp.maximum(shares.sum(-1, keepdims=True), 1e-9)

    def loss(scores):
        log_p = jax.nn.log_softmax(jnp.where(jnp.arange(padded) < vocab, cap * jnp.tanh(scores / cap), -jnp.inf))
        nll = jnp.where(targets >= 0, -jnp.take_along_axis(log_p, jnp.maximum(targets, 0), -1), 0.0)
        return jnp.sum(shares * nll), nll

    expected_grad, expected = jax.grad(loss, has_aux=True)(scores)
    nll, factor, grad, _ = cross_entropy_rows(scores, targets, vocab, cap, shares=shares)
    assert_same((nll, factor[:, None] * grad), (expected, expected_grad))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_tokens_ahead_are_the_same_with_kernels(monkeypatch, dtype, tolerance):
    hidden, head = (2 * draw(2, 8, 32)).astype(dtype), draw(32, 128, seed=1)
    targets = targets_ahead(jax.random.randint(jax.random.key(3), (2, 8), -1, 120), 2)
    shares = 0.1 * jnp.broadcast_to(jnp.array([1.0, 0.5, 0.25]), targets.shape)

    @jax.default_matmul_precision("highest")
    def loss(hidden, head):
        return objective_sum(hidden, head, targets, {"shares": shares}, TOKENS_AHEAD, LossConfig(120, 15.0))

    with_kernels = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    monkeypatch.setattr(triton, "INTERPRET", False)
    jax.clear_caches()
    without = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    in_fp32 = [[leaf.astype(jnp.float32) for leaf in jax.tree.leaves(each)] for each in (with_kernels, without)]
    assert_same(*in_fp32, tolerance)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "tensor")])
def test_a_mesh_runs_the_kernels_on_its_parts(spec):
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    x = draw(4, 6, 96)
    expected = norm_branch(x)[1]
    split = jax.jit(lambda x: norm_branch(x)[1])(jax.device_put(x, NamedSharding(mesh, spec)))
    assert_same([split], [expected])


@pytest.mark.parametrize("entropy", [0.0, 0.2], ids=["measured", "trained"])
def test_an_objective_is_the_same_with_kernels(monkeypatch, entropy):
    objective = PolicyObjective(method="clipped", temperature=0.8, entropy=entropy)
    hidden, head, log_p = 2 * draw(2, 8, 32), draw(32, 128, seed=1), -2 - draw(2, 8, seed=2)
    targets = jax.random.randint(jax.random.key(3), (2, 8), -1, 120)
    tokens = {"advantages": draw(2, 8, seed=4), "behaviour": log_p, "shares": jnp.full((2, 8), 0.1)}

    @jax.default_matmul_precision("highest")
    def loss(hidden, head):
        return objective_sum(hidden, head, targets, tokens, objective, LossConfig(120, 15.0))

    with_kernels = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    monkeypatch.setattr(triton, "INTERPRET", False)
    jax.clear_caches()
    without = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    assert_same(jax.tree.leaves(with_kernels), jax.tree.leaves(without), 1e-4)


def test_an_objective_has_fp32_logits_of_a_bf16_model(monkeypatch):
    """As the engine has them: a bf16 logit of 10 is off by 0.03."""
    hidden, head = (40 * draw(2, 8, 32)).astype(jnp.bfloat16), draw(32, 128, seed=1).astype(jnp.bfloat16)
    targets = jax.random.randint(jax.random.key(3), (2, 8), 0, 120)
    log_p = -nll_of(capped_logits(hidden, head, 120, 15.0), targets)[1]
    tokens = {"advantages": draw(2, 8, seed=4), "behaviour": log_p, "shares": jnp.full((2, 8), 0.1)}

    def loss(hidden, head):
        return objective_sum(hidden, head, targets, tokens, PolicyObjective(), LossConfig(120, 15.0))

    (_, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    assert sums["logprob_difference"] / 16 < 1e-4
    monkeypatch.setattr(triton, "INTERPRET", False)
    jax.clear_caches()
    _, expected = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    assert_same(
        [g.astype(jnp.float32) for g in gradients],
        [g.astype(jnp.float32) for g in expected],
        1e-2 * float(jnp.abs(expected[1]).max()),
    )


def test_the_model_and_its_loss_are_the_same_with_kernels(monkeypatch):
    config = GPTConfig(depth=2, sequence_len=16, vocab_size=120, num_kv_heads=1)
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.02 * draw(*p.shape), params)  # none of them zero
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 120)
    weights = jnp.ones((2, 16))

    @jax.default_matmul_precision("highest")  # a GPU's default for fp32 is not
    def loss(params):
        hidden = hidden_states(config, params, tokens[:, :-1])
        return cross_entropy_sum(hidden, params["head"]["kernel"], tokens[:, 1:], weights, LossConfig.of(config))

    monkeypatch.setattr(triton, "INTERPRET", True)
    with_kernels = jax.value_and_grad(loss)(params)
    monkeypatch.setattr(triton, "INTERPRET", False)
    jax.clear_caches()
    assert_same(jax.tree.leaves(with_kernels), jax.tree.leaves(jax.value_and_grad(loss)(params)), 1e-4)
