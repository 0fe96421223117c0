"""From rewards to advantages: how much more of its kind each sample should become.

Rewards are `[questions, samples]`, NaN where there is none; so are the advantages, NaN where a sample is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

Rewards = Float[np.ndarray, "Q N"]


def differ(rewards: Rewards) -> Bool[np.ndarray, " Q"]:
    """Which questions have samples with different rewards: only these have something to teach."""
    known = ~np.isnan(rewards)
    return np.where(known, rewards, -np.inf).max(axis=1) > np.where(known, rewards, np.inf).min(axis=1)


def centred(rewards: Rewards) -> Rewards:
    """r - r̄, r̄ being the mean over the question's samples (arXiv:2503.20783)."""
    return _about_the_mean(rewards, lambda known, mean, deviations: deviations)


def leave_one_out(rewards: Rewards) -> Rewards:
    """r less the mean of the question's other samples, which is N / (N - 1) · (r - r̄) (RLOO, arXiv:2402.14740)."""
    return _about_the_mean(rewards, lambda known, mean, deviations: deviations * len(known) / (len(known) - 1))


def standardised(rewards: Rewards) -> Rewards:
    """(r - r̄) / σ, σ being the root of the mean of (r - r̄)² (GRPO, arXiv:2402.03300)."""
    return _about_the_mean(rewards, lambda known, mean, deviations: deviations / np.sqrt(np.mean(deviations**2)))


def maximum_likelihood(rewards: Rewards) -> Rewards:
    """(r - r̄) / r̄, which climbs log p where r is 0 or 1 (MaxRL, arXiv:2602.02710); 0 where r̄ is not positive."""
    return _about_the_mean(rewards, lambda known, mean, deviations: deviations / mean if mean > 0 else 0 * deviations)


ADVANTAGES: dict[str, Callable[[Rewards], Rewards]] = {  # by the name of `RLConfig.advantage`
    "centred": centred,
    "leave_one_out": leave_one_out,
    "standardised": standardised,
    "maximum_likelihood": maximum_likelihood,
}


def _about_the_mean(rewards: Rewards, advantages: Callable[..., np.ndarray]) -> Rewards:
    """Advantages of each question's samples; exactly 0 where their rewards are equal.

    The rounding of a mean would leave numbers such as 1e-17 there, which Muon follows by a full step.
    """
    found = np.where(np.isnan(rewards), np.nan, 0.0)
    for question in np.flatnonzero(differ(rewards)):
        some = ~np.isnan(rewards[question])
        known = rewards[question][some]
        mean = known.mean()
        found[question, some] = advantages(known, mean, known - mean)
    return found


def best_of_n(rewards: Rewards) -> Rewards:
    """1 for the first of each question's best samples and NaN for the others; all NaN where the rewards are equal."""
    weights = np.full(rewards.shape, np.nan)
    rows = np.flatnonzero(differ(rewards))
    weights[rows, np.nanargmax(rewards[rows], axis=1) if len(rows) else rows] = 1.0
    return weights
