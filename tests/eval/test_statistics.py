"""Intervals, pass@k and ChatCORE against published values, brute force and their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.errors import UserError
from jaxchat.eval.statistics import CHANCE, chat_core, pass_at_k, wilson_interval


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
