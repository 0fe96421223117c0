"""Cross-entropy of softcapped logits, a chunk of positions at a time: whole-batch logits never exist.

The training loss forms its gradient in the forward pass (a `custom_vjp`), so that the logits' matrix product is done
once and not again in the backward pass: three products instead of four, at the memory of one chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import NEVER, softcap
from jaxchat.ops import kernels
from jaxchat.ops.gpu import fused as kernels_run

CHUNK_BYTES = 1 << 30  # logits held at a time, on one device
FUSED_CAP = 60.0  # the kernel takes no maximum off: e^60 times any vocabulary is finite in fp32
BATCH_AXES = ("data", "fsdp")


class Shape(NamedTuple):
    """What the loss must know of the model: hashable, so that it can be a static argument."""

    vocab_size: int
    logit_cap: float
    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: GPTConfig, mesh: Mesh | None = None) -> Shape:
        return cls(config.vocab_size, config.logit_cap, mesh)


def _chunks(batch: int, length: int, vocab: int, itemsize: int = 4) -> int:
    """The smallest divisor of `length` that keeps a chunk's logits, `itemsize` bytes each, within `CHUNK_BYTES`."""
    wanted = -(-itemsize * batch * length * vocab // CHUNK_BYTES)
    return next(n for n in range(min(wanted, length), length + 1) if length % n == 0)


def _split(x: Array, chunks: int) -> Array:
    """[B, T, ...] → [chunks, B, T/chunks, ...]; splitting T leaves the batch axis, and with it the sharding, alone."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _capped(hidden, head, shape: Shape):
    scores = softcap(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), shape.logit_cap)
    return jnp.where(jnp.arange(head.shape[1]) < shape.vocab_size, scores, NEVER)


def _nll(capped, targets):
    target_score = jnp.take_along_axis(capped, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    log_sum = jax.nn.logsumexp(capped, axis=-1)
    return log_sum, jnp.where(targets >= 0, log_sum - target_score, 0.0)


def _chunk_loss(head, shape: Shape, head_grad, chunk):
    """One chunk's weighted loss, the gradient for its hidden states, and the head's gradient added up."""
    hidden, targets, weights = chunk
    capped = _capped(hidden, head, shape)
    log_sum, nll = _nll(capped, targets)
    weights = jnp.where(targets >= 0, weights, 0.0)
    hit = jnp.arange(head.shape[1]) == targets[..., None]
    # d(cap · tanh(s / cap))/ds = 1 - tanh²; a padded id's softmax is exactly zero, so its column gets no gradient.
    slope = 1.0 - jnp.square(capped / shape.logit_cap)
    grad = (jnp.exp(capped - log_sum[..., None]) - hit) * jnp.where(capped > NEVER, slope, 0.0) * weights[..., None]
    grad = grad.astype(hidden.dtype)
    return head_grad + _head_gradient(hidden, grad), (jnp.sum(nll * weights), grad @ head.T)


def _fused_chunk_loss(head, shape: Shape, head_grad, chunk):
    """As `_chunk_loss`, from logits in the model's dtype to their gradient in one kernel, in place."""
    hidden, targets, weights = chunk
    scores = (hidden @ head).reshape(-1, head.shape[1])
    nll, factor, grad = kernels.cross_entropy_rows(scores, targets.reshape(-1), shape.vocab_size, shape.logit_cap)
    nll, factor = nll.reshape(targets.shape), (factor.reshape(targets.shape) * weights)[..., None]
    # The rows' factors go to what is narrower than the logits: on one side of each product.
    grad = grad.reshape(*targets.shape, -1)
    head_grad += _head_gradient((hidden * factor).astype(hidden.dtype), grad)
    return head_grad, (jnp.sum(nll * weights), ((grad @ head.T) * factor).astype(hidden.dtype))


def _head_gradient(hidden, grad):
    return jnp.einsum("btd,btv->dv", hidden, grad, preferred_element_type=jnp.float32)


def _loss_and_grads(hidden, head, targets, weights, shape: Shape, axes: tuple[str, ...] = ()):
    fused = kernels_run(hidden.dtype) and shape.logit_cap <= FUSED_CAP
    chunk_loss = _fused_chunk_loss if fused else _chunk_loss
    chunks = _chunks(*targets.shape, head.shape[1], hidden.dtype.itemsize if fused else 4)
    head = head.astype(hidden.dtype)
    parts = (_split(hidden, chunks), _split(targets, chunks), _split(weights, chunks))
    start = jnp.zeros(head.shape, jnp.float32)
    head_grad, (losses, hidden_grads) = jax.lax.scan(
        lambda carry, chunk: chunk_loss(head, shape, carry, chunk), start, parts
    )
    loss = jnp.sum(losses)
    if axes:
        loss, head_grad = jax.lax.psum((loss, head_grad), axes)
    return loss, _join(hidden_grads), head_grad


@jax.named_scope("loss")
def _sharded_loss_and_grads(hidden, head, targets, weights, shape: Shape):
    """Each device works on its own rows against the whole head; one sum over devices at the end."""
    if shape.mesh is None or shape.mesh.size == 1:
        return _loss_and_grads(hidden, head, targets, weights, shape)
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        functools.partial(_loss_and_grads, shape=shape, axes=BATCH_AXES),
        mesh=shape.mesh,
        in_specs=(rows, whole, rows, rows),
        out_specs=(whole, rows, whole),
        check_vma=False,  # every device along `tensor` computes the same thing
    )(hidden, head, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    shape: Shape,
) -> Float[Array, ""]:
    """Σ weight · -log p(target) in nats over the targets that are not negative; divide by their count for a mean.

    Differentiable in `hidden` and `head`.
    """
    return _sharded_loss_and_grads(hidden, head, targets, weights, shape)[0]


def _forward(hidden, head, targets, weights, shape):
    loss, hidden_grad, head_grad = _sharded_loss_and_grads(hidden, head, targets, weights, shape)
    return loss, (hidden_grad, head_grad)


@jax.named_scope("loss")
def _backward(shape, grads, cotangent):
    hidden_grad, head_grad = grads
    return (hidden_grad * cotangent.astype(hidden_grad.dtype), head_grad * cotangent, None, None)


cross_entropy_sum.defvjp(_forward, _backward)


@jax.named_scope("loss")
def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], shape: Shape
) -> Float[Array, "B T"]:
    """-log p(target) in nats of each token, 0 where the target is negative; for evaluation, no gradient is formed."""
    chunks = _chunks(*targets.shape, head.shape[1])
    head = head.astype(hidden.dtype)
    parts = (_split(hidden, chunks), _split(targets, chunks))
    return _join(jax.lax.map(lambda chunk: _nll(_capped(chunk[0], head, shape), chunk[1])[1], parts))
