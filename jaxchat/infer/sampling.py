"""From logits to token ids, with settings of its own for every row, on the device.

No row depends on its companions, nor on the program that it is in: what is added up over a row are integers, whose sum
is the same in any order, and every other number comes from one id or from a maximum. The ids that can be drawn are
those from some logit on, so the vocabulary is never sorted: that logit is found by its bits (`lowest_within`). One of
them is drawn by Gumbel's noise (arXiv:1611.01144), first a block of `BLOCK` ids by its share of the probability, then
an id of the block, which takes V / BLOCK + BLOCK random numbers a row instead of V.

The settings are applied in the order of `Sampling`'s attributes, which is that of Hugging Face's `transformers`. Equal
logits share one fate: top-k and top-p keep all ids whose logit equals the last one kept, as its top-k does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from jaxchat.infer.settings import SMALL_TOP_K, Level, Settings
from jaxchat.ops.cross_entropy import NEVER
from jaxchat.ops.lowest_within import Mass, lowest_within, total_mass

# The model pads its vocabulary to multiples of 128, so that neither of these copies the logits to pad them more.
BLOCK = 32  # ids: with 65,536 of them, as many blocks as `SMALL_TOP_K` blocks have ids
RUN = 128  # ids whose weights are added up first
ONE = 2.0**24  # the highest weight as an integer: a run's sum fits 32 bits, and fp32 holds each weight exactly


# --- the ids that a row has seen ----------------------------------------------------------------------------------

# Int32[B, V], for rows with penalties: twice the number of times that the answer has the id, plus 1 if the prompt has
# it. The engine keeps one for all its rows, donates it to each dispatch of level "full", and passes it to no other.
Seen = Int32[Array, "B V"]


def seen_of(
    prompt: Sequence[int] | np.ndarray, answer: Sequence[int] | np.ndarray, size: int
) -> Int32[np.ndarray, " V"]:
    """A row of `Seen`, made on the host when a request gets its row: `seen = seen.at[row].set(seen_of(...))`.

    `answer` has what a request that takes up its answer again has already; `size` is that of the padded vocabulary.
    """
    row = 2 * np.bincount(np.asarray(answer, np.int64), minlength=size).astype(np.int32)
    row[np.unique(np.asarray(prompt, np.int64))] += 1
    return row


def add_seen(seen: Seen, tokens: Int[Array, " B"], written: Bool[Array, " B"]) -> Seen:
    """`seen` with each row's new token of the answer, where it has `written` one; in place if `seen` is donated."""
    return seen.at[jnp.arange(len(tokens)), tokens].add(2 * written.astype(jnp.int32))


def _adjusted(logits: Float[Array, "B V"], settings: Settings, seen: Seen | None) -> Float[Array, "B V"]:
    """The logits after biases and penalties.

    The repetition penalty is that of CTRL (arXiv:1909.05858, section 4.1) as Hugging Face and vLLM have it, over prompt
    and answer; the other two are those of OpenAI's API, logit - count · frequency - (count > 0) · presence, over the
    answer.
    """

    def adjusted(logits: Float[Array, "B N"], biases: Array | float, seen: Int32[Array, "B N"] | None):
        scores = logits + biases
        if seen is not None:
            repetition, frequency, presence = (
                setting[:, None] for setting in (settings.repetition, settings.frequency, settings.presence)
            )
            repeated = jnp.where(scores > 0, scores / repetition, scores * repetition)
            scores = jnp.where(seen > 0, repeated, scores)
            times = (seen >> 1).astype(jnp.float32)
            scores = scores - times * frequency - jnp.where(times > 0, presence, 0)
        return jnp.where(logits > NEVER / 2, scores, NEVER)

    # The few ids with biases by themselves: adding biases to all logits first would copy these.
    rows = jnp.arange(len(logits))[:, None]
    biased = adjusted(
        logits[rows, settings.bias_ids], settings.bias_values, None if seen is None else seen[rows, settings.bias_ids]
    )
    ids = jnp.where(settings.bias_ids >= 0, settings.bias_ids, logits.shape[1])
    return adjusted(logits, 0.0, seen).at[rows, ids].set(biased, mode="drop")


# --- drawing ------------------------------------------------------------------------------------------------------


class _Limits(NamedTuple):
    """Which of a row's logits can be drawn: from `lowest` on, and at most `depth` nats below the highest."""

    temperature: Float[Array, " B"]
    highest: Float[Array, " B"]
    lowest: Float[Array, " B"]
    depth: Float[Array, " B"] | None = None


def draw(
    logits: Float[Array, "B V"], settings: Settings, count: Int[Array, " B"], seen: Seen | None = None, *, level: Level
) -> Int32[Array, " B"]:
    """Draws an id for each row.

    At temperature 0 the highest logit wins (the lowest id among equals), whatever top-k, top-p and min-p are. The
    smallest temperatures draw among the highest logits only, the largest draw all ids alike. Ids whose logit is -1e30,
    the padding of the vocabulary, are never drawn.

    Args:
      logits: in fp32.
      settings: what `settings_of` makes of the rows; what `level` does not serve is ignored.
      count: how many tokens each row's answer has. Key and count decide the random numbers.
      seen: what the penalties need, at level "full"; without it there are none.
      level: static: of `LEVELS`, one that serves every row (`level_of`).
    """
    settings = jax.tree.map(jnp.asarray, settings)
    if level == "full":
        logits = _adjusted(logits, settings, seen)
    if level in ("top_k", "full"):
        # One set of numbers for all passes: computed again in each, they might be rounded in another way.
        logits = jax.lax.optimization_barrier(logits)
    blocks, tops = _blocks(logits, BLOCK), _tops(logits)
    if level == "greedy":
        block = jnp.argmax(tops, axis=-1)
        return _within(block, jnp.argmax(_block(blocks, block), axis=-1))
    highest = tops.max(axis=-1)
    greedy = settings.temperature == 0
    # What is below the smallest normal number counts as 0 on many devices, and 0 / 0 is no logit.
    temperature = jnp.where(greedy, 1.0, jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny))
    limits = _Limits(temperature, highest, jnp.full_like(highest, NEVER / 2))
    if level == "top_k":
        lowest = _kth_of_few(logits, tops, settings.top_k)
        used = ~greedy & (settings.top_k > 0)
        limits = limits._replace(lowest=jnp.where(used, jnp.maximum(lowest, limits.lowest), limits.lowest))
    elif level == "full":
        used = ~greedy & (settings.top_k > 0)
        lowest = _by_platform(_kth, used, limits.lowest, logits, settings.top_k)
        limits = limits._replace(lowest=lowest)
        used = ~greedy & (settings.top_p < 1)
        lowest = _by_platform(_nucleus, used, limits.lowest, logits, tops, limits, settings.top_p)
        limits = limits._replace(lowest=lowest, depth=-jnp.log(settings.min_p))
    weights = _weights(blocks, tops, limits).sum(axis=-1, dtype=jnp.uint32).astype(jnp.float32)

    noise = _noise(settings.key, count, tops.shape[1] + BLOCK)
    shares = _scaled(tops, highest, limits) + jnp.log(weights) + noise[:, :-BLOCK]
    block = jnp.argmax(jnp.where(greedy[:, None], tops, shares), axis=-1)
    ids = _block(blocks, block)
    scores = jnp.where(_kept(ids, limits), _scaled(ids, highest, limits) + noise[:, -BLOCK:], -jnp.inf)
    return _within(block, jnp.argmax(jnp.where(greedy[:, None], ids, scores), axis=-1))


def _blocks(logits: Float[Array, "B V"], size: int) -> Float[Array, "B N size"]:
    rows, ids = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -ids % size)), constant_values=NEVER)
    return padded.reshape(rows, -1, size)


def _block(blocks: Float[Array, "B N size"], block: Int[Array, " B"]) -> Float[Array, "B size"]:
    """The logits of one block of each row."""
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _within(block: Int[Array, " B"], at: Int[Array, " B"]) -> Int32[Array, " B"]:
    """The id at a place of a block."""
    return (block * BLOCK + at).astype(jnp.int32)


def _tops(logits: Float[Array, "B V"]) -> Float[Array, "B N"]:
    """The highest logit of each block."""
    # The barrier keeps XLA from finding the highest of all in a pass of its own over the vocabulary.
    return jax.lax.optimization_barrier(_blocks(logits, BLOCK).max(axis=-1))


def _noise(key: UInt32[Array, "B 2"], count: Int[Array, " B"], size: int) -> Float[Array, "B size"]:
    """Gumbel's noise, from each row's key and count."""

    def row(key, count):
        return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count), (size,))

    return jax.vmap(row)(key, count)


def _scaled(scores: Float[Array, "B ..."], start: Float[Array, "B ..."], limits: _Limits) -> Float[Array, "B ..."]:
    """(scores - start) / temperature. Measured from above, what overflows is -inf, never inf."""
    return (scores - _like(start, scores)) / _like(limits.temperature, scores)


def _like(values: Float[Array, "B ..."], scores: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    return values.reshape(values.shape + (1,) * (scores.ndim - values.ndim))


def _kept(scores: Float[Array, "B ..."], limits: _Limits) -> Bool[Array, "B ..."]:
    """Which logits can be drawn."""
    kept = scores >= _like(limits.lowest, scores)
    if limits.depth is None:
        return kept
    return kept & (_scaled(scores, limits.highest, limits) >= -_like(limits.depth, scores))


def _weights(blocks: Float[Array, "B N K"], tops: Float[Array, "B N"], limits: _Limits) -> UInt32[Array, "B N K"]:
    """The probabilities as integers, as shares of that of their block's highest logit; 0 for what cannot be drawn."""
    weights = jnp.round(jnp.exp(_scaled(blocks, tops, limits)) * ONE).astype(jnp.uint32)
    return jnp.where(_kept(blocks, limits), weights, 0)


def _by_platform(
    find: Callable[..., Float[Array, " B"]], used: Bool[Array, " B"], unused: Array, *arrays: Any
) -> Array:
    """`find(used, *arrays, on_cpu=...)` for the rows that use it, `unused` for the others.

    Where no row does, a CPU leaves it out. A GPU would wait for the host to decide, which costs more.
    """

    def on_cpu(used, unused, *arrays):
        return jax.lax.cond(used.any(), functools.partial(find, on_cpu=True), lambda *_: unused, used, *arrays)

    def elsewhere(used, unused, *arrays):
        return find(used, *arrays, on_cpu=False)

    found = jax.lax.platform_dependent(used, unused, *arrays, cpu=on_cpu, default=elsewhere)
    return jnp.where(used, jnp.maximum(found, unused), unused)


def _kth_of_few(
    logits: Float[Array, "B V"], tops: Float[Array, "B N"], top_k: Int32[Array, " B"]
) -> Float[Array, " B"]:
    """The `top_k`-th highest logit of each row, for `top_k` up to `SMALL_TOP_K`.

    These logits are in as many blocks, those with the highest `tops`.
    """
    blocks = _blocks(logits, BLOCK)
    if blocks.shape[1] > SMALL_TOP_K:
        _, ids = jax.lax.top_k(tops, SMALL_TOP_K)
        blocks = jnp.take_along_axis(blocks, ids[:, :, None], axis=1)
    few = blocks.reshape(len(blocks), -1)
    highest, _ = jax.lax.top_k(few, min(SMALL_TOP_K, few.shape[1]))
    return jnp.take_along_axis(highest, jnp.clip(top_k, 1, highest.shape[1])[:, None] - 1, axis=1)[:, 0]


def _kth(
    used: Bool[Array, " B"], logits: Float[Array, "B V"], top_k: Int32[Array, " B"], *, on_cpu: bool
) -> Float[Array, " B"]:
    """The `top_k`-th highest logit of each row that uses it, or the lowest one if it has fewer."""
    needed = jnp.where(used, jnp.clip(top_k, 1, logits.shape[1]), 0).astype(jnp.float32)
    return lowest_within(_blocks(logits, RUN), None, needed, on_cpu=on_cpu)


def _nucleus(
    used: Bool[Array, " B"],
    logits: Float[Array, "B V"],
    tops: Float[Array, "B N"],
    limits: _Limits,
    top_p: Float[Array, " B"],
    *,
    on_cpu: bool,
) -> Float[Array, " B"]:
    """The highest logit of each row that uses it from which on what `limits` allow has `top_p` of their probability."""
    runs = _blocks(logits, RUN)
    tops = _blocks(tops, RUN // BLOCK).max(axis=-1)
    mass = Mass(_weights(runs, tops, limits), jnp.exp(_scaled(tops, limits.highest, limits)))
    # Masses are whole numbers: a `top_p` so small that the product is below 1, or 0 in fp32, needs no less than 1.
    needed = jnp.where(used, jnp.maximum(top_p * total_mass(runs, mass), 1), 0)
    return lowest_within(runs, mass, needed, on_cpu=on_cpu)


# --- log-probabilities --------------------------------------------------------------------------------------------


def _log_sum(logits: Float[Array, "B V"], tops: Float[Array, "B N"]) -> Float[Array, " B"]:
    """The logarithm of the sum of each row's exponentials."""
    highest = tops.max(axis=-1)
    return jnp.log(jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)) + highest


def logprob(logits: Float[Array, "B V"], ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """The log-probability of each row's id, in nats."""
    own = jnp.take_along_axis(logits, ids[:, None].astype(jnp.int32), axis=-1)[:, 0]
    return own - _log_sum(logits, _tops(logits))


def logprobs(
    logits: Float[Array, "B V"], ids: Int[Array, " B"], k: int
) -> tuple[Float[Array, " B"], Int32[Array, "B k"], Float[Array, "B k"]]:
    """The log-probability of each row's id, in nats; the `k` likeliest ids, likeliest first; their log-probabilities.

    An id among the likeliest has the same number in both places, to the last bit. Of equal logits the lower id comes
    first; which of them come last among the `k` is not said. Padding has a log-probability of about -1e30.
    """
    tops = _tops(logits)
    log_sum = _log_sum(logits, tops)
    own = jnp.take_along_axis(logits, ids[:, None].astype(jnp.int32), axis=-1)[:, 0]
    blocks = _blocks(logits, BLOCK)
    names = jnp.broadcast_to(jnp.arange(blocks.shape[1], dtype=jnp.int32), blocks.shape[:2])
    if blocks.shape[1] > k > 0:
        _, names = jax.lax.top_k(tops, k)
        names = jnp.sort(names, axis=-1)  # so that the lower of equal ids comes first
        blocks = jnp.take_along_axis(blocks, names[:, :, None], axis=1)
    highest, places = jax.lax.top_k(blocks.reshape(len(logits), -1), k)
    likeliest = jnp.take_along_axis(names, places // BLOCK, axis=-1) * BLOCK + places % BLOCK
    return own - log_sum, likeliest.astype(jnp.int32), highest - log_sum[:, None]
