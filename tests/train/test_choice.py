"""The choice of rows and rematerialisation, against steps whose memory is a formula."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.train.choice import MOST_COMPILED, Choice, Expected, by_preference, choose, predict

LEVELS = ("none", "mlp", "full")
ROWS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
EXPECTED = Expected(2.2, {"none": 0.42, "mlp": 0.22, "full": 0.12})  # a d12 on rows of 2,048 tokens, in GiB
CHOICES = by_preference(ROWS, 2048, LEVELS)


class Compiler:
    """Steps that take what a formula says; it counts how many are compiled."""

    def __init__(self, fixed, per_row, refused_above=math.inf):
        self.fixed, self.per_row, self.refused_above, self.compiled = fixed, per_row, refused_above, []

    def takes(self, choice):
        return self.fixed + self.per_row[choice.remat] * choice.device_rows

    def __call__(self, choice):
        assert choice not in self.compiled
        self.compiled.append(choice)
        return self.takes(choice) if self.takes(choice) <= self.refused_above else math.inf


def best(compiler, limit, choices=CHOICES):
    return next((choice for choice in choices if compiler.takes(choice) <= limit), None)


def test_rows_that_do_not_fill_a_device_are_preferred_to_less_recomputation():
    assert by_preference((1, 4, 2), 2048, ("none", "full"))[:3] == [(4, "none"), (4, "full"), (2, "none")]


def test_enough_rows_without_recomputing_are_preferred_to_more_of_them():
    assert by_preference((16, 32, 64, 8), 512, ("none", "full")) == [
        *((64, "none"), (32, "none"), (16, "none"), (64, "full"), (32, "full"), (16, "full")),
        *((8, "none"), (8, "full")),
    ]


def test_where_everything_fits_one_step_is_compiled():
    compiler = Compiler(1.0, {"none": 0.1})
    assert choose(by_preference(ROWS, 2048, ["none"]), 200, compiler, EXPECTED) == (256, "none")
    assert compiler.compiled == [(256, "none")]


def test_what_is_expected_is_compiled_first_and_verified():
    compiler = Compiler(EXPECTED.fixed, EXPECTED.per_row)
    assert choose(CHOICES, 5.3, compiler, EXPECTED) == best(compiler, 5.3) == (4, "none")
    assert compiler.compiled[0] == (4, "none")


@settings(deadline=None, max_examples=40)
@given(scale=st.floats(0.4, 3), limit=st.floats(1, 300))
def test_more_or_less_for_every_row_than_expected_changes_only_what_is_compiled(scale, limit):
    compiler = Compiler(EXPECTED.fixed, {level: scale * taken for level, taken in EXPECTED.per_row.items()})
    found = choose(CHOICES, limit, compiler, EXPECTED)
    assert found == best(compiler, limit) or len(compiler.compiled) >= MOST_COMPILED
    assert len(compiler.compiled) <= MOST_COMPILED + 2


@settings(deadline=None, max_examples=40)
@given(
    fixed=st.floats(0.5, 4),
    none=st.floats(0.1, 1.2),
    ratios=st.tuples(st.floats(0.3, 0.9), st.floats(0.3, 0.9)),
    limit=st.floats(1, 300),
    refuses=st.booleans(),
)
def test_what_is_found_fits_whatever_steps_really_take(fixed, none, ratios, limit, refuses):
    """Also where the compiler says no more of a step than that it is too large, as a TPU's does."""
    compiler = Compiler(fixed, {"none": none, "mlp": none * ratios[0], "full": none * ratios[0] * ratios[1]})
    compiler.refused_above = limit if refuses else math.inf
    found = choose(CHOICES, limit, compiler, EXPECTED)
    assert (found is None) == (best(compiler, limit) is None)
    assert found is None or compiler.takes(found) <= limit
    assert refuses or len(compiler.compiled) <= MOST_COMPILED + 3


@settings(deadline=None, max_examples=40)
@given(limit=st.floats(3, 100), first=st.sampled_from(CHOICES))
def test_what_was_chosen_before_is_kept_where_it_fits(limit, first):
    compiler = Compiler(EXPECTED.fixed, EXPECTED.per_row)
    found = choose(CHOICES, limit, compiler, EXPECTED, first)
    assert compiler.compiled[0] == first
    assert found == (first if compiler.takes(first) <= limit else best(compiler, limit))


def test_a_prediction_goes_by_what_is_nearest():
    measured = {Choice(2, "none"): 5.0, Choice(4, "none"): 8.0, Choice(64, "none"): math.inf}
    assert predict(Choice(8, "none"), EXPECTED, measured) == 14.0
    assert predict(Choice(4, "none"), EXPECTED, measured) == 8.0
    scaled = predict(Choice(8, "full"), EXPECTED, {Choice(8, "none"): 2.2 + 2 * 0.42 * 8})
    assert math.isclose(scaled, 2.2 + 2 * 0.12 * 8)
