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
from jaxchat.ops.cross_entropy import capped_logits, loss_and_gradients, nll_of

CHUNK_BYTES = 1 << 30  # logits held at a time, on one device
BATCH_AXES = ("data", "fsdp")


class LossConfig(NamedTuple):
    """What the loss must know of the model: hashable, so that it can be a static argument."""

    vocab_size: int
    logit_cap: float
    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: GPTConfig, mesh: Mesh | None = None) -> LossConfig:
        return cls(config.vocab_size, config.logit_cap, mesh)


def _chunks(batch: int, length: int, vocab: int, itemsize: int = 4) -> int:
    """How many chunks to make: the smallest divisor of `length` by which a chunk's logits, of `itemsize` bytes each,
    take at most `CHUNK_BYTES`."""
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


def _loss_and_grads(hidden, head, targets, weights, config: LossConfig, axes: tuple[str, ...] = ()):
    head = head.astype(hidden.dtype)
    vocabulary = config.vocab_size, config.logit_cap
    # The plain formula holds a chunk's logits in fp32, the kernel in the dtype of `hidden`.
    chosen = loss_and_gradients.choose(hidden, head, targets, weights, *vocabulary)
    itemsize = 4 if chosen is loss_and_gradients.formula else hidden.dtype.itemsize
    chunks = _chunks(targets.shape[0], targets.shape[1], head.shape[1], itemsize)

    def add_chunk(head_grad, chunk):
        hidden, targets, weights = chunk
        loss, hidden_grad, grad = loss_and_gradients(hidden, head, targets, weights, *vocabulary)
        return head_grad + grad, (loss, hidden_grad)

    parts = (_split(hidden, chunks), _split(targets, chunks), _split(weights, chunks))
    head_grad, (losses, hidden_grads) = jax.lax.scan(add_chunk, jnp.zeros(head.shape, jnp.float32), parts)
    loss = jnp.sum(losses)
    if axes:
        loss, head_grad = jax.lax.psum((loss, head_grad), axes)
    return loss, _join(hidden_grads), head_grad


@jax.named_scope("loss")
def _sharded_loss_and_grads(hidden, head, targets, weights, config: LossConfig):
    """Each device works on its own rows against the whole head; one sum over devices at the end."""
    if config.mesh is None or config.mesh.size == 1:
        return _loss_and_grads(hidden, head, targets, weights, config)
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        functools.partial(_loss_and_grads, config=config, axes=BATCH_AXES),
        mesh=config.mesh,
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
    config: LossConfig,
) -> Float[Array, ""]:
    """Σ weight · -log p(target) in nats over the targets that are not negative; divide by their count for a mean.

    Differentiable in `hidden` and `head`.
    """
    return _sharded_loss_and_grads(hidden, head, targets, weights, config)[0]


def _forward(hidden, head, targets, weights, config):
    loss, hidden_grad, head_grad = _sharded_loss_and_grads(hidden, head, targets, weights, config)
    return loss, (hidden_grad, head_grad)


@jax.named_scope("loss")
def _backward(config, grads, cotangent):
    hidden_grad, head_grad = grads
    return (hidden_grad * cotangent.astype(hidden_grad.dtype), head_grad * cotangent, None, None)


cross_entropy_sum.defvjp(_forward, _backward)


@jax.named_scope("loss")
def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], config: LossConfig
) -> Float[Array, "B T"]:
    """-log p(target) in nats of each token, 0 where the target is negative; for evaluation, no gradient is formed."""
    chunks = _chunks(targets.shape[0], targets.shape[1], head.shape[1])
    head = head.astype(hidden.dtype)
    parts = (_split(hidden, chunks), _split(targets, chunks))

    def nll(chunk):
        hidden, targets = chunk
        return nll_of(capped_logits(hidden, head, config.vocab_size, config.logit_cap), targets)[1]

    return _join(jax.lax.map(nll, parts))
