"""The losses of reinforcement learning, as functions of the log-probabilities of sampled tokens.

With ℓ the log-probability of a token, b the one at which it was sampled, A its answer's advantage, and ρ = exp(ℓ - b):

| method | loss of a token | from |
| --- | --- | --- |
| reinforce | -A ℓ | Williams 1992 |
| clipped | -min(ρ A, clip(ρ, 1 - low, 1 + high) A) | PPO, arXiv:1707.06347; two limits: DAPO, arXiv:2503.14476 |
| cispo | -min(ρ, cap) A ℓ, without a gradient through min(ρ, cap) | CISPO, arXiv:2506.13585 |
| gspo | clipped, with ρ = exp(mean of ℓ - b over the answer) | GSPO, arXiv:2507.18071 |

At ρ = 1, where the parameters are still those that sampled, all have the gradient of reinforce. They differ in later
updates of the same rollouts, and where sampling computes otherwise than training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchat.config import RLConfig

Values = Float[Array, "B T"]
Method = Literal["reinforce", "clipped", "cispo", "gspo"]
CLIPS = {"clipped": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # low and high, as in DAPO and GSPO
MOST_LOG_RATIO = 20.0  # e^20 is far beyond every limit, and finite
NEAR = 0.1  # how far from 1 a ratio may be to count as the same


def ratio(log_p: Values, behaviour: Values) -> Values:
    """ρ: how much likelier a token has become since it was sampled."""
    return jnp.exp(jnp.clip(log_p - behaviour, -MOST_LOG_RATIO, MOST_LOG_RATIO))


def reinforce(log_p: Values, advantages: Values) -> Values:
    """-A ℓ."""
    return -advantages * log_p


def beyond(ratios: Values, advantages: Values, low: float, high: float) -> Array:
    """Where the clip stops the gradient: the ratio has already gone as far as it may, the way of the advantage."""
    return ((advantages > 0) & (ratios > 1 + high)) | ((advantages < 0) & (ratios < 1 - low))


def clipped(ratios: Values, advantages: Values, low: float, high: float) -> Values:
    """-min(ρ A, clip(ρ, 1 - low, 1 + high) A)."""
    limit = jnp.where(advantages > 0, 1 + high, 1 - low)
    return -advantages * jnp.where(beyond(ratios, advantages, low, high), limit, ratios)


def cispo(log_p: Values, ratios: Values, advantages: Values, cap: float) -> Values:
    """-min(ρ, cap) A ℓ, whose gradient is that of ℓ alone."""
    return reinforce(log_p, jax.lax.stop_gradient(jnp.minimum(ratios, cap)) * advantages)


def answer_ratio(log_p: Values, behaviour: Values, targets: Values, answers: Values | None = None) -> Values:
    """The geometric mean of the ratios of an answer's targets, at each of them.

    `answers` is the number of each target's answer in its row, where several share a row.
    """
    rows, length = log_p.shape
    numbers = jnp.zeros(log_p.shape, jnp.int32) if answers is None else answers.astype(jnp.int32)
    # Sums over each answer alone: a running sum would leave rounding where an answer has no gradient.
    places = jnp.arange(rows)[:, None], numbers

    def sums(values):
        return jnp.zeros((rows, length + 1)).at[places].add(values)

    count = jnp.maximum(sums(targets), 1.0)
    mean = sums(jnp.where(targets > 0, log_p - behaviour, 0.0)) / count
    return ratio(mean, jnp.zeros_like(mean))[places]


def kl_loss(log_p: Values, reference: Values) -> Values:
    """(ℓ - ℓ_ref)² / 2: its mean gradient over samples of the policy is that of KL(policy ‖ reference).

    Of a token, the two are the distributions at its place, after what the answer has before it. That of ℓ - ℓ_ref,
    whose mean is the KL, is 0; `kl_value` has the gradient of KL(reference ‖ policy).
    """
    return jnp.square(log_p - reference) / 2


def kl_value(log_p: Values, reference: Values) -> Values:
    """e^(ℓ_ref - ℓ) - 1 - (ℓ_ref - ℓ): never negative, and its mean over samples of the policy is the KL."""
    less = jnp.clip(reference - log_p, -MOST_LOG_RATIO, MOST_LOG_RATIO)
    return jnp.expm1(less) - less


@dataclass(frozen=True)
class PolicyObjective:
    """An `Objective` (jaxchat.train.loss) of sampled tokens.

    Its `tokens` are `advantages`, `behaviour` (the log-probabilities at which they were sampled) and, with `kl`,
    `reference` (those of the parameters that the training began with); and `documents`, the number of each token's
    answer in its row, where several share a row.

    Attributes:
      low, high: how far from 1 the ratio may go; of clipped and gspo.
      cap: the largest ratio that counts; of cispo.
      kl: weight of the KL divergence from the reference.
      entropy: weight of the entropy, which is added to what is maximised.
      temperature: at which the answers were sampled.
      drawn: how many of the vocabulary's ids could be sampled, the first; None: all.
    """

    method: Method = "reinforce"
    low: float = 0.2
    high: float = 0.28
    cap: float = 5.0
    kl: float = 0.0
    entropy: float = 0.0
    temperature: float = 1.0
    drawn: int | None = None

    @classmethod
    def of(cls, config: RLConfig, drawn: int | None = None) -> PolicyObjective:
        """The objective of a stage's settings. Its best sample is followed as reinforce follows an advantage of 1."""
        method: Method = "reinforce" if config.method == "best_of_n" else config.method
        low, high = CLIPS.get(method, (0.2, 0.28))
        return cls(
            method=method,
            low=low if config.clip_low is None else config.clip_low,
            high=high if config.clip_high is None else config.clip_high,
            cap=config.ratio_cap,
            kl=config.kl,
            entropy=config.entropy,
            temperature=config.temperature,
            drawn=drawn,
        )

    @property
    def by_rows(self) -> bool:
        return self.method == "gspo"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of what a batch must have for it."""
        return ("advantages", "behaviour", "shares", *(["reference"] if self.kl else []))

    def __call__(self, log_p: Values, tokens: dict[str, Values]) -> tuple[Values, dict[str, Values]]:
        """The loss of each token; measures: how far the probabilities are from those of sampling, and what is clipped.

        `logprob_difference` is |ℓ - b|, `probability_difference` |e^ℓ - e^b|, `ratio_outside` whether ρ is outside
        [0.9, 1.1], `kl_from_sampling` estimates KL(sampling ‖ policy); with a clip also `clipped`, whether it stops the
        gradient; with `kl` also `kl`.
        """
        advantages, behaviour = tokens["advantages"], tokens["behaviour"]
        ratios = ratio(log_p, behaviour)
        measured = {
            "logprob_difference": jnp.abs(log_p - behaviour),
            "probability_difference": jnp.abs(jnp.exp(log_p) - jnp.exp(behaviour)),
            "ratio_outside": (jnp.abs(ratios - 1) > NEAR).astype(jnp.float32),
            "kl_from_sampling": kl_value(behaviour, log_p),
        }
        if self.method == "reinforce":
            loss = reinforce(log_p, advantages)
        elif self.method == "cispo":
            loss = cispo(log_p, ratios, advantages, self.cap)
            measured["clipped"] = (ratios > self.cap).astype(jnp.float32)
        else:
            if self.method == "gspo":
                ratios = answer_ratio(log_p, behaviour, tokens["targets"], tokens.get("documents"))
            loss = clipped(ratios, advantages, self.low, self.high)
            measured["clipped"] = beyond(ratios, advantages, self.low, self.high).astype(jnp.float32)
        if self.kl:
            loss += self.kl * kl_loss(log_p, tokens["reference"])
            measured["kl"] = kl_value(log_p, tokens["reference"])
        return loss, measured


def shares(
    counts: Int[np.ndarray, " B"], average: Literal["tokens", "answers", "length"], longest: int
) -> Float[np.ndarray, " B"]:
    """What the loss of each token of an answer is multiplied by, given the answers' numbers of targets.

    "tokens": the loss is the mean over all tokens (DAPO). "answers": over each answer's tokens, and then over answers
    (GRPO, GSPO). "length": the sum over an answer's tokens, divided by the most tokens that an answer may have
    (`longest`), and then the mean over answers (Dr. GRPO). Answers without targets do not count.
    """
    answers = max(1, int(np.sum(counts > 0)))
    if average == "tokens":
        return np.full(counts.shape, 1 / max(1, int(counts.sum())))
    if average == "answers":
        return 1 / (answers * np.maximum(counts, 1))
    return np.full(counts.shape, 1 / (answers * longest))
