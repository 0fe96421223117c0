"""What a model predicts: how likely each token of a text was, and what may come next."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat.analysis.computation import Computation, padded
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states, logits
from jaxchat.ops.compute import Compute

POSITIONS = 256  # whose logits are held at once


class Predictions(NamedTuple):
    """The prediction of each token from those before it; of T tokens, the first has none.

    Attributes:
      probability: of the token that is there.
      rank: the token's place among all ids, 1 for the likeliest.
      entropy: of the whole distribution, in bits.
      ids, probabilities: the likeliest ids, likeliest first.
    """

    probability: Float[np.ndarray, " T-1"]
    rank: Int[np.ndarray, " T-1"]
    entropy: Float[np.ndarray, " T-1"]
    ids: Int[np.ndarray, "T-1 K"]
    probabilities: Float[np.ndarray, "T-1 K"]


def predictions(
    config: GPTConfig, params: Params, tokens: list[int], *, k: int, dtype: DTypeLike
) -> Computation[Predictions]:
    """How the model predicts each of `tokens`, with its `k` likeliest alternatives; computed in `dtype`."""
    row = padded(tokens)
    arguments = config, jnp.dtype(dtype).name, min(k, config.vocab_size), params, row, np.roll(row, -1)
    keep = len(tokens) - 1
    return Computation(_predictions, arguments, lambda found: Predictions(*(np.asarray(x)[:keep] for x in found)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _predictions(config: GPTConfig, dtype: str, k: int, params: Params, tokens, targets) -> tuple[Array, ...]:
    hidden = hidden_states(config, params, tokens[None], Compute(dtype))[0]
    size = min(POSITIONS, len(hidden))

    def some(hidden_and_targets) -> tuple[Array, ...]:
        hidden, targets = hidden_and_targets
        scores = logits(config, params, hidden)
        log_probabilities = jax.nn.log_softmax(scores, axis=-1)
        probabilities = jnp.exp(log_probabilities)
        at = targets[:, None]
        rank = 1 + jnp.sum(scores > jnp.take_along_axis(scores, at, axis=-1), axis=-1)
        # An id that is only padding has the probability 0, and 0 · log 0 counts as 0.
        entropy = -jnp.sum(probabilities * log_probabilities, axis=-1) / jnp.log(2.0)
        highest, ids = jax.lax.top_k(scores, k)
        likeliest = jnp.take_along_axis(probabilities, ids, axis=-1)
        return jnp.take_along_axis(probabilities, at, axis=-1)[:, 0], rank, entropy, ids, likeliest

    found = jax.lax.map(some, (hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size)))
    return tuple(array.reshape(-1, *array.shape[2:]) for array in found)


def next_logits(
    config: GPTConfig, params: Params, tokens: list[int], dtype: DTypeLike
) -> Computation[Float[np.ndarray, " V"]]:
    """The fp32 logits of the token after the last of `tokens`, over the vocabulary without its padding."""
    arguments = config, jnp.dtype(dtype).name, params, padded(tokens), np.int32(len(tokens) - 1)
    return Computation(_next_logits, arguments, lambda scores: np.asarray(scores)[: config.vocab_size])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_logits(config: GPTConfig, dtype: str, params: Params, tokens, last):
    return logits(config, params, hidden_states(config, params, tokens[None], Compute(dtype))[0, last])


def entropy(probabilities: Float[np.ndarray, " V"]) -> float:
    """-Σ p log₂ p, in bits."""
    likely = probabilities[probabilities > 0]
    return float(-(likely * np.log2(likely)).sum()) + 0.0  # no -0


def after_settings(
    scores: Float[np.ndarray, " V"], temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
    min_p: float = 0.0,
) -> Float[np.ndarray, " V"]:  # fmt: skip
    """The probabilities with which ids are drawn from logits, as `jaxchat.infer.request.Sampling` describes.

    In fp64, one setting after the other: the plain form of what `jaxchat.infer.sampling.draw` does on the device.
    """
    scores = np.asarray(scores, np.float64)
    if temperature == 0:
        return np.eye(1, len(scores), int(np.argmax(scores)))[0]
    # Measured from the highest, a quotient that overflows is -inf, which is never drawn.
    with np.errstate(over="ignore"):
        likely = _softmax((scores - scores.max()) / temperature)
    order = np.argsort(-scores, kind="stable")
    ranked, steps = scores[order], likely[order]

    def cut(count: int) -> np.ndarray:
        """The first `count` by rank, and all whose logits equal the last of them."""
        return np.where(ranked >= ranked[max(1, count) - 1], steps, 0.0)

    if top_k is not None:
        steps = cut(min(top_k, len(ranked)))
    if top_p < 1:  # the id that crosses it still belongs to those that reach it
        steps = cut(int(np.count_nonzero(np.cumsum(steps) - steps < top_p * steps.sum())))
    steps = np.where(steps >= min_p * steps[0], steps, 0.0)
    drawn = np.zeros(len(order))
    drawn[order] = steps / steps.sum()
    return drawn


def _softmax(scores: np.ndarray) -> np.ndarray:
    likely = np.exp(scores)
    return likely / likely.sum()
