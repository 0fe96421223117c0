import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.config import MeshConfig
from jaxchat.devices.mesh import make_mesh
from jaxchat.train import loss as module
from jaxchat.train.loss import LossConfig, cross_entropy_sum, token_nll

VOCAB, PADDED, CAP = 150, 256, 15.0


def plain_loss(hidden, head, targets, weights):
    """The definition, by autodiff over whole logits."""
    scores = CAP * jnp.tanh(hidden @ head / CAP)
    log_p = jax.nn.log_softmax(scores[..., :VOCAB])
    nll = -jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(targets >= 0, nll * weights, 0.0))


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        3 * jax.random.normal(keys[0], (4, 12, 32)),
        jax.random.normal(keys[1], (32, PADDED)),
        jax.random.randint(keys[2], (4, 12), -1, VOCAB),
        jax.random.normal(keys[3], (4, 12)),
    )


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 4 * 3 * PADDED, 1])
@pytest.mark.parametrize("devices", [1, 4])
def test_value_and_gradients_equal_the_definition(case, chunk_bytes, devices, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    mesh = make_mesh(MeshConfig(fsdp=min(devices, 2)), jax.devices()[:devices])
    hidden, head, targets, weights = case
    expected = jax.value_and_grad(plain_loss, (0, 1))(*case)

    def chunked(hidden, head):
        return 0.25 * cross_entropy_sum(hidden, head, targets, weights, LossConfig(VOCAB, CAP, mesh))

    value, grads = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, head)
    np.testing.assert_allclose(value, 0.25 * expected[0], rtol=1e-5)
    for grad, reference in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(grad, 0.25 * reference, atol=2e-5)
    assert not np.any(grads[1][:, VOCAB:])


def test_token_nll_is_the_loss_of_each_token(case):
    hidden, head, targets, _ = case
    each = token_nll(hidden, head, targets, LossConfig(VOCAB, CAP))
    ones = jnp.ones(targets.shape)
    np.testing.assert_allclose(each.sum(), plain_loss(hidden, head, targets, ones), rtol=1e-5)
    assert not np.any(np.asarray(each)[np.asarray(targets) < 0])


def test_without_targets_loss_and_gradients_are_zero(case):
    hidden, head, targets, weights = case
    nothing = jnp.full_like(targets, -1)
    value, grads = jax.value_and_grad(
        lambda h, w: cross_entropy_sum(h, w, nothing, weights, LossConfig(VOCAB, CAP)), (0, 1)
    )(hidden, head)
    assert value == 0 and not np.any(grads[0]) and not np.any(grads[1])


def test_logits_of_a_whole_batch_are_never_held(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 20)
    batch, length, width, vocab = 8, 512, 16, 2048
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(batch, length, width), (width, vocab), (batch, length)]]
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def run(hidden, head, weights, targets):
        return cross_entropy_sum(hidden, head, targets, weights, LossConfig(vocab, CAP))

    compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(*shapes, targets).compile()
    whole_logits = 4 * batch * length * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < whole_logits / 3
