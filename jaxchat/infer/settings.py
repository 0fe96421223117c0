"""The settings of rows for the devices, checked and as arrays, and how much a program has to do for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from jaxchat.errors import UserError, check
from jaxchat.infer.request import Sampling

# What a program can do, from the fewest passes over the logits to the most; the token is the same at each level that
# serves the row.
# greedy: temperature 0.  plain: any temperature.  top_k: also top-k up to `SMALL_TOP_K`.  full: everything.
# scored: as plain, with the log-probability of each token, but without alternatives.
Level = Literal["greedy", "plain", "top_k", "full", "scored"]
LEVELS: tuple[Level, ...] = ("greedy", "plain", "top_k", "full")  # each of them serves what those before it do
SMALL_TOP_K = 64
MOST_BIASES = 300  # ids with a bias in a request


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
