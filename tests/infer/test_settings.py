"""The settings of rows: their ranges, their arrays, and the level of work that serves them."""

import re

import pytest

from jaxchat.errors import UserError
from jaxchat.infer.request import Sampling
from jaxchat.infer.settings import (
    MOST_BIASES,
    SMALL_TOP_K,
    check_sampling,
    joint_level,
    level_of,
    needs_seen,
    settings_of,
)

VOCAB = 300


def test_the_cheapest_level_that_serves_all_rows():
    def level(*cases):
        return joint_level(level_of(Sampling(**case)) for case in cases)

    assert level({}) == level({}, {"temperature": 0.0}) == "plain"
    assert level({"temperature": 0.0}) == level({"temperature": 0.0}, {"temperature": 0.0}) == "greedy"
    assert level({"temperature": 0.0, "top_k": 5000, "top_p": 0.1, "min_p": 0.5}) == "greedy"  # none of them matters
    assert level({}, {"top_k": 1}) == level({"top_k": SMALL_TOP_K}) == "top_k"
    for case in ({"top_k": SMALL_TOP_K + 1}, {"top_p": 0.99}, {"min_p": 0.01}, {"logit_bias": {1: 1.0}},
                 {"temperature": 0.0, "presence_penalty": 0.1}):  # fmt: skip
        assert level({"top_k": 1}, case) == "full"


def test_penalties_need_what_a_row_has_seen_and_nothing_else_does():
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        assert needs_seen(Sampling(**{name: 1.1}))
    assert not needs_seen(Sampling(temperature=0.3, top_k=5, top_p=0.5, min_p=0.1, logit_bias={3: 1.0}))


@pytest.mark.parametrize(
    "case, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 (greedy) or more"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"logprob_temperature": 0.0}, "logprob_temperature is 0.0; it must be above 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5; it must be -2 to 2"),
        ({"presence_penalty": -3}, "presence_penalty is -3; it must be -2 to 2"),
        ({"logit_bias": {300: 1.0}}, "logit_bias has id 300; this vocabulary has ids 0 to 299"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has id -1"),
        ({"logit_bias": {4: 101}}, "logit_bias of id 4 is 101; it must be -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(MOST_BIASES + 1), 1.0)}, "logit_bias has 301 ids; it can have at most 300"),
    ],
)
def test_settings_out_of_range_are_refused(case, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_sampling(Sampling(**case), VOCAB)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"temperature": 0.0, "top_k": 1, "top_p": 1e-9, "min_p": 0.0},
        {"temperature": 1e300, "logprob_temperature": 1e-300, "top_k": 2**40, "top_p": 1.0, "min_p": 1.0},
        {"repetition_penalty": 1e-9, "frequency_penalty": -2.0, "presence_penalty": -2.0},
        {"repetition_penalty": 1e9, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"logit_bias": {0: -100, VOCAB - 1: 100}},
        {"logit_bias": dict.fromkeys(range(MOST_BIASES), 1.0)},
    ],
    ids=str,
)
def test_settings_at_the_ends_of_their_ranges_are_taken(case):
    check_sampling(Sampling(**case), VOCAB)


def test_seeds_and_numbers_of_any_size_are_taken():
    given = settings_of([Sampling(seed=2**63 + 5, number=2**32 + 1), Sampling(seed=-1), Sampling(top_k=2**40)])
    assert given.key.tolist() == [[5, 1], [2**32 - 1, 0], [0, 0]]
    assert settings_of([]).key.shape == (0, 2)
