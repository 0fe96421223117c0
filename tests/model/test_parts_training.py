"""Training with all parts of the model: on any mesh, at any level of rematerialisation, in fp8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxchat.config import MeshConfig, OptimizerConfig
from jaxchat.devices.mesh import BATCH_SPEC, make_mesh, put_whole
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import hidden_states, init_params, logits
from jaxchat.model.parameters import named_parameters, shardings
from jaxchat.ops.compute import Compute
from jaxchat.optim.optimizer import make_optimizer
from jaxchat.train.step import init_state, make_train_step
from tests.model.test_parts import PARTS

PLAIN = GPTConfig(depth=4, sequence_len=16, vocab_size=200, window_pattern="SL", border_token=7)
ALL = dataclasses.replace(PLAIN, **PARTS["all"])
TOKENS = np.random.default_rng(0).integers(0, 199, (4, 17), dtype=np.int32)
TOKENS[:, 8] = 7


def loss_and_gradients(params, compute, config=ALL, tokens=TOKENS):
    def loss(params, tokens):
        scores = logits(config, params, hidden_states(config, params, tokens[:, :-1], compute))
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1).mean()

    # The gradients lie as the parameters do, as in training.
    places = jax.tree.map(lambda x: x.sharding, params)
    return jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))(params, tokens)


@pytest.fixture(scope="module")
def params():
    """No zeros: with the initial ones, gradients would not reach all parameters."""
    params = init_params(ALL, jax.random.key(0))
    draw = np.random.default_rng(1).standard_normal
    return jax.tree.map(lambda x: x + 0.05 * draw(x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def one_device(params):
    return loss_and_gradients(params, Compute())


def assert_equal(found, expected, **tolerance):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    grads = dict(named_parameters(found[1]))
    for path, grad in named_parameters(expected[1]):
        np.testing.assert_allclose(grads[path], grad, err_msg=path, **tolerance)


def test_gradients_reach_every_parameter(one_device):
    for path, grad in named_parameters(one_device[1]):
        assert np.isfinite(grad).all() and np.any(grad), path


def test_gradients_of_the_initial_values_are_finite():
    loss, grads = loss_and_gradients(init_params(ALL, jax.random.key(0)), Compute())
    assert float(loss) == pytest.approx(np.log(200), rel=1e-5)  # a head of zeros: the uniform distribution
    assert all(np.isfinite(grad).all() for _, grad in named_parameters(grads))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, tensor=2)], ids=["data4", "fsdp4", "fsdp2tensor2"]
)
def test_any_mesh_gives_the_loss_and_the_gradients_of_one_device(mesh, params, one_device):
    mesh = make_mesh(mesh, jax.devices()[:4])
    placed = jax.device_put(params, shardings(mesh, params))
    tokens = put_whole(mesh, TOKENS, BATCH_SPEC)
    assert_equal(loss_and_gradients(placed, Compute(mesh=mesh), tokens=tokens), one_device, rtol=2e-4, atol=2e-6)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_three_steps_move_every_parameter_and_lower_the_loss():
    config, mesh = dataclasses.replace(ALL, depth=2), make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    optimizer = make_optimizer(OptimizerConfig(), config, optax.constant_schedule(1.0), mesh=mesh)
    state = init_state(init_params(config, jax.random.key(0)), optimizer)
    placed = shardings(mesh, state)
    before = jax.device_get(state["params"])
    state, losses = jax.device_put(state, placed), []
    step = make_train_step(config, optimizer, Compute(mesh=mesh), state_shardings=placed)
    for _ in range(3):
        state, metrics = step(state, {"inputs": TOKENS[None, :, :-1], "targets": TOKENS[None, :, 1:]})
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    after = dict(named_parameters(state["params"]))
    for path, array in named_parameters(before):
        assert not np.array_equal(array, after[path]), path


@pytest.mark.parametrize("remat", ["mlp", "full"])
def test_rematerialisation_changes_nothing(remat, params, one_device):
    assert_equal(loss_and_gradients(params, Compute(remat=remat)), one_device, rtol=1e-4, atol=1e-6)


def test_fp8_stays_near_fp32(params, one_device, monkeypatch):
    monkeypatch.setattr("jaxchat.ops.triton.INTERPRET", True)
    loss, grads = loss_and_gradients(params, Compute(jnp.bfloat16, fp8=True))
    assert float(loss) == pytest.approx(float(one_device[0]), rel=0.02)
    expected = dict(named_parameters(one_device[1]))
    for path, grad in named_parameters(grads):
        error, size = (float(jnp.linalg.norm(x)) for x in (grad - expected[path], expected[path]))
        # The gradient of a scale sums over all tokens, where most of it cancels.
        assert error < (0.25 * size if grad.size > 24 else 0.02), path


def test_defaults_are_the_model_without_parts():
    """The loss and the gradient's norm from before there were any."""
    params = init_params(PLAIN, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape), params)
    loss, grads = loss_and_gradients(params, Compute(), PLAIN)
    norm = jnp.sqrt(sum(jnp.sum(grad * grad) for grad in jax.tree.leaves(grads)))
    np.testing.assert_allclose([loss, norm], [5.232993, 4.6296296], rtol=1e-5)
