"""The training loss of softcapped logits, a chunk of positions at a time: whole-batch logits never exist.

The loss forms its gradient in the forward pass (a `custom_vjp`), so that the logits' matrix product is done once and
not again in the backward pass: three products instead of four, at the memory of one chunk.

What is made of the targets' log-probabilities is an `Objective`: `CROSS_ENTROPY`, or one of `jaxchat.rl.objectives`. A
chunk's log-probabilities are known before the two products that form its gradient, and all that these need of the
objective is its derivative for each log-probability. So any objective costs what cross-entropy costs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxchat.model.config import GPTConfig
from jaxchat.ops.cross_entropy import (
    Entropy,
    Weigh,
    Weighed,
    capped_logits,
    loss_and_gradients,
    nll_of,
)

CHUNK_BYTES = 1 << 30  # logits held at a time, on one device
BATCH_AXES = ("data", "fsdp")
Tokens = dict[str, Float[Array, "B T *K"]]  # what an objective knows of the targets


class LossConfig(NamedTuple):
    """What the loss must know of the model: hashable, so that it can be a static argument."""

    vocab_size: int
    logit_cap: float
    mesh: Mesh | None = None

    @classmethod
    def of(cls, config: GPTConfig, mesh: Mesh | None = None) -> LossConfig:
        return cls(config.vocab_size, config.logit_cap, mesh)


@runtime_checkable
class Objective(Protocol):
    """The loss of targets as a differentiable function of their log-probabilities; hashable, a static argument.

    Called with the log-probabilities and `tokens`, it returns the loss of each target and what it measures of each. The
    loss is multiplied by `tokens["shares"]`, which the function does not get, and summed. `tokens["targets"]` is 1
    where there is a target and 0 elsewhere. There everything else is 0 too, and whatever it returns is left out.

    Attributes:
      by_rows: whether the loss of a target depends on other targets of its row.
      temperature: divides the logits: the log-probabilities are those of answers sampled at it.
      entropy: weight of the entropies, which are added to what is maximised; None if they are not even measured.
      drawn: how many of the vocabulary's ids can be a target: the first. The others have no part in the probabilities.
        None: all.
    """

    @property
    def by_rows(self) -> bool: ...
    @property
    def temperature(self) -> float: ...
    @property
    def entropy(self) -> float | None: ...
    @property
    def drawn(self) -> int | None: ...
    def __call__(self, log_p: Float[Array, "B T *K"], tokens: Tokens) -> tuple[Float[Array, "B T *K"], Tokens]: ...


class CrossEntropy(NamedTuple):
    """-log p of each target."""

    by_rows: bool = False
    temperature: float = 1.0
    entropy: float | None = None
    drawn: int | None = None

    def __call__(self, log_p: Float[Array, "B T"], tokens: Tokens) -> tuple[Float[Array, "B T"], Tokens]:
        return -log_p, {}


CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class TokensAhead:
    """-log p of several targets to a position, the next token and those after it, for one prediction.

    As in multi-token prediction (Gloeckle et al. 2024, arXiv:2404.19737), but with one head and one distribution: all
    share its logits. It measures the loss of the next token alone, as "next".
    """

    by_rows: bool = False
    temperature: float = 1.0
    entropy: float | None = None
    drawn: int | None = None

    def __call__(self, log_p: Float[Array, "*B K"], tokens: Tokens) -> tuple[Float[Array, "*B K"], Tokens]:
        return -log_p, {"next": jnp.where(jnp.arange(log_p.shape[-1]) == 0, -log_p, 0.0)}


TOKENS_AHEAD = TokensAhead()


def targets_ahead(targets: Int[Array, "B T"], count: int) -> Int[Array, "B T K"]:
    """The targets of each position and of the `count` positions after it in its row.

    -1 where the row ends, and from the first position on that has none: beyond the border of two documents, if that is
    no target.
    """
    found = [targets]
    for _ in range(count):
        later = jnp.pad(found[-1][:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        found.append(jnp.where(targets >= 0, later, -1))
    return jnp.stack(found, axis=-1)


def measures(objective: Objective, tokens: Iterable[str]) -> list[str]:
    """The names of what an objective measures of targets of which it gets `tokens`."""
    of = {name: jax.ShapeDtypeStruct((1, 1), jnp.float32) for name in (*tokens, "targets") if name != "shares"}
    _, found = jax.eval_shape(objective, of["targets"], of)
    return [*found, *(["entropy"] if objective.entropy is not None else [])]


def _weigh(objective: Objective, targets: Int[Array, "B T *K"], tokens: Tokens) -> Weigh:
    counts = targets >= 0
    # Whatever stands where there is no target, infinities included, must not reach the gradient.
    tokens = {name: jnp.where(counts, values, 0.0) for name, values in tokens.items()}
    shares = tokens.pop("shares")
    tokens["targets"] = counts.astype(jnp.float32)

    def loss_of(log_p):
        values, measured = objective(log_p, tokens)
        return jnp.sum(jnp.where(counts, values * shares, 0.0)), measured

    def weigh(nll, entropies) -> Weighed:
        loss, pull, measured = jax.vjp(loss_of, -nll, has_aux=True)
        weights = jnp.where(counts, -pull(jnp.ones_like(loss))[0], 0.0)
        entropy_weights = None
        if entropies is not None and objective.entropy is not None:
            measured = {**measured, "entropy": entropies}
            if objective.entropy != 0:
                entropy_weights = objective.entropy * shares
                loss -= jnp.sum(jnp.where(counts, entropy_weights * entropies, 0.0))
        sums = {name: jnp.sum(jnp.where(counts, values, 0.0)) for name, values in measured.items()}
        return Weighed(loss, weights, entropy_weights, sums)

    return weigh


def _chunks(splittable: int, others: int, vocab: int, itemsize: int = 4) -> int:
    """How many chunks to make: the smallest divisor of `splittable` by which the logits of a chunk's positions, of
    `itemsize` bytes each, take at most `CHUNK_BYTES`; a position is one of `splittable` times one of `others`."""
    wanted = -(-itemsize * splittable * others * vocab // CHUNK_BYTES)
    return next(n for n in range(min(wanted, splittable), splittable + 1) if splittable % n == 0)


def _split(x: Array, chunks: int) -> Array:
    """[B, T, ...] → [chunks, B, T/chunks, ...]; splitting T leaves the batch axis, and with it the sharding, alone."""
    batch, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(batch, chunks, length // chunks, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _loss_and_grads(
    hidden, head, targets, tokens, objective: Objective, config: LossConfig, axes: tuple[str, ...] = ()
):
    head = head.astype(hidden.dtype)
    batch, length = targets.shape[:2]
    entropy: Entropy = "unused" if objective.entropy is None else "trained" if objective.entropy else "measured"
    cap = config.logit_cap / objective.temperature
    # With both divided by it, cap · tanh(logits / cap) is too.
    hidden = hidden if objective.temperature == 1 else hidden / objective.temperature
    static = entropy, config.vocab_size if objective.drawn is None else objective.drawn, cap
    # The plain formula holds a chunk's logits in fp32, the kernel in the dtype of `hidden`, or in both with an entropy.
    chosen = loss_and_gradients.choose(hidden, head, targets, None, *static)
    itemsize = 4 if chosen is loss_and_gradients.formula or entropy != "unused" else hidden.dtype.itemsize
    if objective.by_rows:  # here the rows are a device's own, so that they can be split too
        chunks = _chunks(batch, length, head.shape[1], itemsize)
        split, join = lambda x: x.reshape(chunks, -1, *x.shape[1:]), lambda x: x.reshape(batch, *x.shape[2:])
    else:
        chunks = _chunks(length, batch, head.shape[1], itemsize)
        split, join = functools.partial(_split, chunks=chunks), _join

    def add_chunk(head_grad, chunk):
        hidden, targets, tokens = chunk
        loss, hidden_grad, grad, sums = loss_and_gradients(
            hidden, head, targets, _weigh(objective, targets, tokens), *static
        )
        return head_grad + grad, (loss, hidden_grad, sums)

    parts = jax.tree.map(split, (hidden, targets, tokens))
    head_grad, (losses, hidden_grads, sums) = jax.lax.scan(add_chunk, jnp.zeros(head.shape, jnp.float32), parts)
    loss, sums = jax.tree.map(jnp.sum, (losses, sums))
    if axes:
        loss, head_grad, sums = jax.lax.psum((loss, head_grad, sums), axes)
    hidden_grads = join(hidden_grads)
    return loss, hidden_grads if objective.temperature == 1 else hidden_grads / objective.temperature, head_grad, sums


@jax.named_scope("loss")
def _sharded_loss_and_grads(hidden, head, targets, tokens, objective: Objective, config: LossConfig):
    """Each device works on its own rows against the whole head; one sum over devices at the end."""
    if config.mesh is None or config.mesh.size == 1:
        return _loss_and_grads(hidden, head, targets, tokens, objective, config)
    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        functools.partial(_loss_and_grads, objective=objective, config=config, axes=BATCH_AXES),
        mesh=config.mesh,
        in_specs=(rows, whole, rows, rows),
        out_specs=(whole, rows, whole, whole),
        check_vma=False,  # every device along `tensor` computes the same thing
    )(hidden, head, targets, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def objective_sum(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T *K"],
    tokens: Tokens,
    objective: Objective,
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Σ share · loss of `objective` over the targets that are not negative, and the sums of what it measures of them.

    With `TOKENS_AHEAD` there are several targets to a position, each with its share.

    `tokens` has the "shares", and what else the objective needs. The loss is differentiable in `hidden` and `head`.
    """
    loss, _, _, sums = _sharded_loss_and_grads(hidden, head, targets, tokens, objective, config)
    return loss, sums


def _forward(hidden, head, targets, tokens, objective, config):
    loss, hidden_grad, head_grad, sums = _sharded_loss_and_grads(hidden, head, targets, tokens, objective, config)
    return (loss, sums), (hidden_grad, head_grad)


@jax.named_scope("loss")
def _backward(objective, config, grads, cotangents):
    hidden_grad, head_grad = grads
    cotangent, _ = cotangents
    return (hidden_grad * cotangent.astype(hidden_grad.dtype), head_grad * cotangent, None, None)


objective_sum.defvjp(_forward, _backward)


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
    tokens = {"shares": weights}
    loss, _ = objective_sum(hidden, head, targets, tokens, CROSS_ENTROPY, config)  # pyright: ignore[reportGeneralTypeIssues]
    return loss


@jax.named_scope("loss")
def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], config: LossConfig
) -> Float[Array, "B T"]:
    """-log p(target) in nats of each token, 0 where the target is negative; for evaluation, no gradient is formed."""
    chunks = _chunks(targets.shape[1], targets.shape[0], head.shape[1])
    head = head.astype(hidden.dtype)
    parts = (_split(hidden, chunks), _split(targets, chunks))

    def nll(chunk):
        hidden, targets = chunk
        return nll_of(capped_logits(hidden, head, config.vocab_size, config.logit_cap), targets)[1]

    return _join(jax.lax.map(nll, parts))
