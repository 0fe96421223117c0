"""Intervals, pass@k and ChatCORE against published values, brute force and their definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.eval.statistics import CHANCE, chat_core, mean_interval, paired_z, pass_at_k, wilson_interval


# Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3.
@pytest.mark.parametrize(
    "right, count, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_the_published_one(right, count, low, high):
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_the_interval_solve_its_equation(counts):
    right, count = counts
    mean = right / count
    low, high = wilson_interval(mean, count)
    assert 0 <= low <= mean <= high <= 1
    assert (low == 0) == (right == 0) and (high == 1) == (right == count)
    for end in (low, high):  # a proportion from which the mean is as far as 95 % allow
        if 0 < end < 1:
            assert abs(mean - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5)
    assert wilson_interval(1 - mean, count) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_of_nothing_nothing_is_known():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_choices_of_k(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [i < correct for i in range(samples)]
        chosen = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_at_k(samples, samples, samples) == 1.0  # any of n
    assert pass_at_k(samples, 0, samples) == 0.0


def test_pass_at_k_of_many_samples():
    product = 1 - math.prod(1 - 100 / i for i in range(200 - 3 + 1, 201))
    assert pass_at_k(200, 3, 100) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("a, b", [(0.1, 0.1), (0.5, 0.5), (2.0, 2.0), (1.0, 19.0), (0.2, 3.8), (19.0, 1.0)])
def test_the_interval_of_pass_at_k_holds_the_truth(a, b, k):
    """In 95 of 100 evaluations of 100 questions, 8 samples each, alike or not."""
    rng, evaluations, questions, samples = np.random.default_rng(1), 600, 100, 8
    right = rng.binomial(samples, rng.beta(a, b, (evaluations, questions)))
    truth = 1 - math.exp(sum(math.log((b + i) / (a + b + i)) for i in range(k)))  # 1 - E (1 - p)^k
    of_count = [pass_at_k(samples, c, k) for c in range(samples + 1)]
    ends = [mean_interval([of_count[c] for c in row], samples) for row in right.tolist()]
    assert 0.92 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.985
    wilson = [wilson_interval(float(np.mean([of_count[c] for c in row])), questions) for row in right.tolist()]
    assert all(high - low <= end - start + 1e-12 for (low, high), (start, end) in zip(ends, wilson, strict=True))


def test_an_interval_knows_no_more_than_its_questions_and_samples():
    assert mean_interval([], 8) == (0.0, 1.0)
    assert mean_interval([0.0] * 20, 8) == wilson_interval(0.0, 20)
    assert mean_interval([0.5], 8) == wilson_interval(0.5, 1)
    assert mean_interval([0.25] * 20, 8) == wilson_interval(0.25, 160)  # all alike: as good as new questions
    assert mean_interval([0.0, 1.0] * 10, 8) == wilson_interval(0.5, 20)  # samples of a question tell nothing new


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=9))
def test_z_is_in_deviations_of_all_ways_to_exchange_before_and_after(differences):
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((-1, 1), repeat=len(differences))]  # fmt: skip
    assert paired_z(differences) * float(np.std(sums)) == pytest.approx(sum(differences))


def test_z_of_right_and_wrong_is_mcnemars():
    assert paired_z([1] * 55 + [-1] * 2 + [0] * 143) == pytest.approx(53 / math.sqrt(57))
    assert paired_z([0, 0]) == paired_z([]) == 0
    flips = np.random.default_rng(2).choice([-1, 0, 1], p=[0.1, 0.8, 0.1], size=(2000, 200))
    assert np.mean([abs(paired_z(row)) > 1.96 for row in flips.tolist()]) == pytest.approx(0.05, abs=0.015)


def test_chat_core():
    chance, best = dict(CHANCE), dict.fromkeys(CHANCE, 1.0)
    assert (chat_core(chance), chat_core(best)) == (0.0, 1.0)
    scores = {**chance, "nanochat_arc_easy": 0.4, "nanochat_gsm8k": 0.05, "nanochat_spelling": 1.0, "gsm8k": 0.9}
    assert chat_core(scores) == pytest.approx((0.15 / 0.75 + 0.05) / 5)
    assert chat_core({**chance, "nanochat_mmlu": 0.1}) == pytest.approx(-0.2 / 5)  # below chance
    for name in CHANCE:
        assert chat_core({other: score for other, score in scores.items() if other != name}) is None


def test_what_cannot_be_is_refused():
    for wrong in (lambda: wilson_interval(1.5, 10), lambda: wilson_interval(0.5, -1)):
        with pytest.raises(UserError):
            wrong()
    with pytest.raises(UserError, match="pass@5 needs at least 5 samples, k at least 1; there are 4"):
        pass_at_k(4, 1, 5)
    with pytest.raises(UserError, match="5 of 4 samples cannot be right"):
        pass_at_k(4, 5, 1)
