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
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from jaxchat.errors import UserError, check
from jaxchat.infer.request import Sampling
from jaxchat.ops.cross_entropy import NEVER
from jaxchat.ops.lowest_within import Mass, lowest_within, total_mass

# What a program can do, from the fewest passes over the logits to the most; the token is the same at each level that
# serves the row.
# greedy: temperature 0.  plain: any temperature.  top_k: also top-k up to `SMALL_TOP_K`.  full: everything.
# scored: as plain, with the log-probability of each token, but without alternatives.
Level = Literal["greedy", "plain", "top_k", "full", "scored"]
LEVELS: tuple[Level, ...] = ("greedy", "plain", "top_k", "full")  # each of them serves what those before it do
SMALL_TOP_K = 64
MOST_BIASES = 300  # ids with a bias in a request
# The model pads its vocabulary to multiples of 128, so that neither of these copies the logits to pad them more.
BLOCK = 32  # ids: with 65,536 of them, as many blocks as `SMALL_TOP_K` blocks have ids
RUN = 128  # ids whose weights are added up first
ONE = 2.0**24  # the highest weight as an integer: a run's sum fits 32 bits, and fp32 holds each weight exactly


class Settings(NamedTuple):
    """The rows' settings as arrays with one entry a row; 0, 1 or id -1 where a setting is off, as in `Sampling`.

    `key` is the row's random key, made of its seed and number. A row of zeros, which only fills a batch, is greedy.
    """

    temperature: Float[Array, " B"]
    top_k: Int32[Array, " B"]  # 0: all ids
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    frequency: Float[Array, " B"]
    presence: Float[Array, " B"]
    key: UInt32[Array, "B 2"]
    logprob_temperature: Float[Array, " B"]
    bias_ids: Int32[Array, "B N"]  # -1 where a row has fewer than `MOST_BIASES`
    bias_values: Float[Array, "B N"]


def _misfit(s: Sampling) -> tuple[str, str] | None:
    """The first field that is out of range, and how a message names the range; None if all fit.

    Written out, because a batch of rows is checked while a GPU waits.
    """
    if not 0 <= s.temperature < math.inf:
        return "temperature", "0 (greedy) or more"
    if not 0 < s.logprob_temperature < math.inf:
        return "logprob_temperature", "above 0 (1 for the model's own probabilities)"
    if s.top_k is not None and s.top_k < 1:
        return "top_k", "at least 1, or None for all ids"
    if not 0 < s.top_p <= 1:
        return "top_p", "above 0 and at most 1"
    if not 0 <= s.min_p <= 1:
        return "min_p", "0 to 1"
    if not 0 < s.repetition_penalty < math.inf:
        return "repetition_penalty", "above 0 (1 changes nothing)"
    if not -2 <= s.frequency_penalty <= 2:
        return "frequency_penalty", "-2 to 2"
    if not -2 <= s.presence_penalty <= 2:
        return "presence_penalty", "-2 to 2"
    return None


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises `UserError` for a setting that is out of range. Penalties and biases have the ranges of OpenAI's API."""
    misfit = _misfit(sampling)
    if misfit is not None:
        name, allowed = misfit
        raise UserError(f"{name} is {getattr(sampling, name)}; it must be {allowed}")
    biases = sampling.logit_bias
    if len(biases) > MOST_BIASES:
        raise UserError(f"logit_bias has {len(biases)} ids; it can have at most {MOST_BIASES}")
    for id, value in biases.items():
        check(0 <= id < vocab_size, f"logit_bias has id {id}; this vocabulary has ids 0 to {vocab_size - 1}")
        check(-100 <= value <= 100, f"logit_bias of id {id} is {value}; it must be -100 to 100")


def serving(level: Level) -> tuple[Level, ...]:
    """The levels that serve what `level` does, from it on."""
    return ("scored", "full") if level == "scored" else LEVELS[LEVELS.index(level) :]


def joint_level(levels: Iterable[Level]) -> Level:
    """The cheapest level that serves what each of `levels` does; at least one."""
    wanted = set(levels)
    if "scored" in wanted:
        return "scored" if wanted <= {"scored", "greedy", "plain"} else "full"
    return max(wanted, key=LEVELS.index)


def level_of(sampling: Sampling) -> Level:
    """The cheapest level that serves a row, without log-probabilities."""
    s = sampling
    if s.logit_bias or needs_seen(s):
        return "full"
    if s.temperature == 0:
        return "greedy"
    if s.top_p < 1 or s.min_p > 0 or (s.top_k or 0) > SMALL_TOP_K:
        return "full"
    return "top_k" if s.top_k else "plain"


def needs_seen(sampling: Sampling) -> bool:
    """Whether the row's draws depend on the ids that its prompt and its answer have."""
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0)


def settings_of(samplings: Sequence[Sampling]) -> Settings:
    """The settings of rows, as NumPy arrays. Seeds and numbers count modulo 2^32."""

    def column(name):
        return np.array([getattr(sampling, name) for sampling in samplings], np.float32)

    ids = np.full((len(samplings), MOST_BIASES), -1, np.int32)
    values = np.zeros((len(samplings), MOST_BIASES), np.float32)
    for row, sampling in enumerate(samplings):
        if sampling.logit_bias:
            ids[row, : len(sampling.logit_bias)] = list(sampling.logit_bias)
            values[row, : len(sampling.logit_bias)] = list(sampling.logit_bias.values())
    # A temperature above 0 stays above it, and finite, in fp32.
    limits = np.finfo(np.float32)
    temperatures = np.array([sampling.temperature for sampling in samplings], np.float64)
    temperatures = np.where(temperatures > 0, np.clip(temperatures, limits.tiny, limits.max), 0)
    arrays: dict[str, Any] = {
        "temperature": temperatures.astype(np.float32),
        "top_k": np.array([min(s.top_k or 0, 2**31 - 1) for s in samplings], np.int32),
        "top_p": column("top_p"),
        "min_p": column("min_p"),
        "repetition": column("repetition_penalty"),
        "frequency": column("frequency_penalty"),
        "presence": column("presence_penalty"),
        "key": np.array([(s.seed % 2**32, s.number % 2**32) for s in samplings], np.uint32).reshape(-1, 2),
        "logprob_temperature": column("logprob_temperature"),
        "bias_ids": ids,
        "bias_values": values,
    }
    return Settings(**arrays)


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
