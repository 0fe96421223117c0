"""What a score is worth: its confidence interval, pass@k, its change, and the mean over tasks above chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxchat.errors import check

Z = 1.959963984540054  # standard errors on either side of the mean that hold 95 % of a normal distribution

# What guessing scores in the five tasks of ChatCORE.
CHANCE = {
    "nanochat_arc_easy": 0.25,
    "nanochat_arc_challenge": 0.25,
    "nanochat_mmlu": 0.25,
    "nanochat_gsm8k": 0.0,
    "nanochat_humaneval": 0.0,
}


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953), within [0, 1].

    Scores between 0 and 1 vary less than a proportion with the same mean, so for their mean it is conservative.

    Args:
      mean: of `count` independent scores in [0, 1]. Of no scores nothing is known: (0, 1).
    """
    check(0 <= mean <= 1, f"the mean is {mean}; scores lie between 0 and 1")
    check(count >= 0, f"the count is {count}; it must be at least 0")
    if count == 0:
        return 0.0, 1.0
    middle = mean + Z**2 / (2 * count)
    half = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    # Exactly 0 and 1 at the ends, where rounding would leave 1e-17.
    low = 0.0 if mean == 0 else max(0.0, (middle - half) / scale)
    high = 1.0 if mean == 1 else min(1.0, (middle + half) / scale)
    return low, high


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of `k` samples is right: 1 - C(n - c, k) / C(n, k), without bias.

    The estimator of Chen et al. 2021 (arXiv:2107.03374), from n `samples` of a question of which c are `correct`.
    """
    check(1 <= k <= samples, f"pass@{k} needs at least {max(k, 1)} samples, k at least 1; there are {samples}")
    check(0 <= correct <= samples, f"{correct} of {samples} samples cannot be right")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_interval(estimates: Sequence[float], samples: int) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of `estimates`, each in [0, 1] and from `samples` answers to a question.

    It is Wilson's, of as many independent answers as would vary as much as the estimates do (Korn and Graubard 1998,
    Survey Methodology 24, 193-201): at least one a question, if it is the questions that differ, and at most all.
    """
    count = len(estimates)
    if count == 0:
        return 0.0, 1.0
    mean = min(1.0, max(0.0, math.fsum(estimates) / count))
    if mean in (0, 1) or count == 1:  # nothing is known of how much questions differ
        return wilson_interval(mean, count)
    variance = math.fsum((estimate - mean) ** 2 for estimate in estimates) / (count - 1)
    independent = mean * (1 - mean) / variance if variance > 0 else math.inf  # answers to each question
    return wilson_interval(mean, round(count * min(max(independent, 1.0), samples)))


def paired_z(differences: Sequence[float]) -> float:
    """By how many standard errors scores of the same questions have changed, given the difference of each; 0 if none.

    If answers are right or wrong, and b have become right and c wrong, it is (b - c) / sqrt(b + c), the root of
    McNemar's statistic (1947, doi:10.1007/BF02295996). Without a real change it is beyond 2 once in twenty times.
    """
    squares = math.fsum(difference**2 for difference in differences)
    return math.fsum(differences) / math.sqrt(squares) if squares > 0 else 0.0


def chat_core(scores: Mapping[str, float]) -> float | None:
    """ChatCORE as nanochat defines it: the mean of (score - chance) / (1 - chance) over the five tasks of `CHANCE`.

    Args:
      scores: in [0, 1], by task; other tasks do not count.

    Returns None unless all five are there.
    """
    if not CHANCE.keys() <= scores.keys():
        return None
    return sum((scores[name] - chance) / (1 - chance) for name, chance in CHANCE.items()) / len(CHANCE)
