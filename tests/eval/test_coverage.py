"""How often intervals hold what they should, by exact sums and in simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats

from jaxchat.eval.statistics import Z, mean_interval, paired_z, pass_at_k, wilson_interval


def test_the_interval_of_a_proportion_holds_it_in_95_of_100():
    count = 400
    ends = np.array([wilson_interval(right / count, count) for right in range(count + 1)])
    shares = np.linspace(0.01, 0.99, 197)
    held = [
        stats.binom.pmf(np.flatnonzero((ends[:, 0] <= share) & (share <= ends[:, 1])), count, share).sum()
        for share in shares
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.005) and min(held) > 0.92


@pytest.mark.parametrize("k", [1, 4])
def test_the_interval_of_pass_at_k_holds_it_in_95_of_100(k):
    """Of questions of all difficulties, most of them hard, with 8 answers each."""
    rng = np.random.default_rng(k)
    questions, samples, times = 200, 8, 1000
    table = np.array([pass_at_k(samples, right, k) for right in range(samples + 1)])
    chances = rng.beta(0.4, 1.2, (times, questions))
    exact = 1 - np.exp(np.sum([np.log((1.2 + i) / (1.6 + i)) for i in range(k)]))  # the mean of 1 - (1 - p)^k
    held = 0
    for estimates in table[rng.binomial(samples, chances)].tolist():
        low, high = mean_interval(estimates, samples)
        held += low <= exact <= high
    assert held / times == pytest.approx(0.95, abs=0.02)


def test_pass_at_k_is_without_bias():
    """Over all outcomes of five answers, each right with the same chance."""
    for chance, k in itertools.product((0.1, 0.5, 0.9), range(1, 6)):
        mean = sum(stats.binom.pmf(right, 5, chance) * pass_at_k(5, right, k) for right in range(6))
        assert mean == pytest.approx(1 - (1 - chance) ** k)


def test_without_a_change_z_is_beyond_2_once_in_twenty_times():
    rng = np.random.default_rng(0)
    chances = rng.beta(0.4, 1.2, 300)
    before, after = (rng.random((2000, 300)) < chances for _ in range(2))
    beyond = [abs(paired_z(differences)) > Z for differences in (after * 1.0 - before).tolist()]
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.015)
