"""From rewards to advantages."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxchat.rl.advantages import ADVANTAGES, best_of_n, differ

shapes = st.tuples(st.integers(1, 5), st.integers(2, 6))
rewards = hnp.arrays(np.float64, shapes, elements=st.one_of(st.floats(0, 1, width=16), st.just(np.nan)))


def expected(how, reward, group):
    """Published formulas, one number at a time."""
    count, mean = len(group), sum(group) / len(group)
    if how == "leave_one_out":
        return reward - (sum(group) - reward) / (count - 1)
    if how == "standardised":
        return (reward - mean) / (sum((r - mean) ** 2 for r in group) / count) ** 0.5
    if how == "maximum_likelihood":
        return (reward - mean) / mean
    return reward - mean


@settings(deadline=None)  # the first call compiles the type checks
@given(rewards, st.sampled_from(list(ADVANTAGES)))
def test_advantages_are_the_formulas(rewards, how):
    found = ADVANTAGES[how](rewards)
    for row, own in zip(rewards.tolist(), found.tolist(), strict=True):
        group = [reward for reward in row if reward == reward]
        for reward, advantage in zip(row, own, strict=True):
            if reward != reward:
                assert np.isnan(advantage)  # there is none: it is left out, and the others' mean is theirs
            elif len(set(group)) == 1:
                assert advantage == 0
            else:
                assert advantage == pytest.approx(expected(how, reward, group), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("how", ADVANTAGES)
@pytest.mark.parametrize("samples", [2, 3, 12, 16])
def test_equal_rewards_are_exactly_zero(how, samples):
    """The mean of three times 0.1 is not 0.1."""
    for reward in np.arange(101) / 100:
        group = np.full((1, samples), reward)
        assert not differ(group).any()
        assert (ADVANTAGES[how](group) == 0).all()


def test_one_of_eight_weighs_by_its_rarity():
    """Weights of a success at rate p: 1 - p, those by 1 / sqrt(p (1 - p)), and by 1 / p."""
    group = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0]])
    success = {how: advantages(group)[0, 0] for how, advantages in ADVANTAGES.items()}
    assert success["centred"] == 7 / 8 and success["leave_one_out"] == 1
    assert success["standardised"] == pytest.approx(7**0.5) and success["maximum_likelihood"] == 7


def test_what_never_succeeds_teaches_nothing():
    for how, advantages in ADVANTAGES.items():
        assert (advantages(np.zeros((1, 4))) == 0).all(), how
    penalties = np.array([[-1.0, 0.0, -1.0]])
    assert (ADVANTAGES["maximum_likelihood"](penalties) == 0).all()  # a mean that is no probability


@settings(deadline=None)
@given(rewards)
def test_best_of_n(rewards):
    for row, weights in zip(rewards.tolist(), best_of_n(rewards).tolist(), strict=True):
        known = [reward for reward in row if reward == reward]
        if len(set(known)) <= 1:
            assert np.isnan(weights).all()
        else:
            best = row.index(max(known))
            assert weights[best] == 1
            assert np.isnan(weights[:best] + weights[best + 1 :]).all()
