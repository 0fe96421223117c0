"""The phases of pretraining: what each step does, in tokens."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import Impossible, PhasesConfig, PretrainConfig, ScheduleConfig
from jaxchat.model.config import GPTConfig
from jaxchat.optim.schedules import multiplier
from jaxchat.train.budget import (
    check_length,
    count_parameters,
    flops_per_token,
    plans_of_stage,
    pretraining_flops_per_token,
    training_length,
    training_tokens,
)
from jaxchat.train.phases import Phases

MODEL = GPTConfig(depth=2, sequence_len=64, vocab_size=300)


def config(last=384, schedule=None, **phases):
    return PretrainConfig(batch_tokens=last, schedule=schedule or ScheduleConfig(), phases=PhasesConfig(**phases))


def test_without_phases_all_steps_are_alike():
    plain, schedule = Phases(config(), 50), multiplier(ScheduleConfig(), 50)
    assert not plain.config.phases.change and plain.tokens == 50 * 384
    assert [plain(step) for step in range(50)] == [(384, 1.0, (), float(schedule(step))) for step in range(50)]
    assert training_tokens(config(), MODEL) == 384 * training_length(config(), MODEL)
    assert pretraining_flops_per_token(config(), MODEL) == flops_per_token(MODEL)


@settings(deadline=None)
@given(
    st.integers(1, 120),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(sorted),
    st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4, unique=True),
)
def test_the_phases_divide_the_tokens(steps, units, until):
    *early, last = units
    chosen = config(64 * last, batch_tokens=tuple(64 * n for n in early), until=tuple(sorted(until[: len(early)])))
    phases = Phases(chosen, steps)
    tokens = [phases(step).tokens for step in range(steps)]
    assert tokens == sorted(tokens) and set(tokens) <= {64 * n for n in units}
    assert [phases.tokens_before(step) for step in range(steps)] == [sum(tokens[:step]) for step in range(steps)]
    assert phases.tokens == sum(tokens)
    for border, begin in zip(chosen.phases.until if early else (), phases.begins[1:], strict=True):
        # A border is off by at most half a step, and the total with it by half a step at each border.
        assert abs(phases.tokens_before(begin) - border * phases.tokens) <= 64 * last * (len(early) + 1)


def test_modded_nanogpts_batches():
    """131,072, 262,144 and 393,216 tokens; three equal parts of the tokens."""
    grown = config(393_216, batch_tokens=(131_072, 262_144), windows=(0.25, 0.5))
    phases = Phases(grown, 1100)
    assert grown.unit_tokens == 131_072 and phases.begins == (0, 600, 900)
    assert [phases(step)[:2] for step in (0, 599, 600, 899, 900, 1099)] == [
        (131_072, 0.25), (131_072, 0.25), (262_144, 0.5), (262_144, 0.5), (393_216, 1.0), (393_216, 1.0)
    ]  # fmt: skip
    assert phases.tokens == 3 * 600 * 131_072
    flat = ScheduleConfig(decay_ratio=0.0)
    rates = Phases(config(393_216, flat, batch_tokens=(131_072, 262_144)), 1100)
    assert [rates(step).rate for step in (0, 600, 900)] == pytest.approx([math.sqrt(1 / 3), math.sqrt(2 / 3), 1])
    rates = Phases(config(393_216, flat, batch_tokens=(131_072, 262_144), rates=(0.5, 0.9)), 1100)
    assert [rates(step).rate for step in (0, 600, 900)] == [0.5, 0.9, 1]


def test_rates_fall_by_tokens():
    schedule = ScheduleConfig(warmup_ratio=0.1, decay_ratio=0.4, final_fraction=0.1)
    phases = Phases(config(512, schedule, batch_tokens=(128,), until=(0.25,), rates=(1.0,)), 70)
    assert phases.begins == (0, 40) and phases.tokens == 160 * 128  # 40 steps of one unit, 30 of four
    by_unit = multiplier(schedule, 160)
    expected = [by_unit(step) for step in range(40)] + [by_unit(40 + 4 * step) for step in range(30)]
    assert [phases(step).rate for step in range(70)] == pytest.approx([float(rate) for rate in expected])


def test_the_weights_of_tokens_ahead_fall_to_nothing():
    phases = Phases(config(ahead=(0.5, 0.25), ahead_until=0.4), 100)
    assert phases.steps_ahead == 40 and phases(40).ahead == phases(99).ahead == ()
    for step in range(40):
        assert phases(step).ahead == pytest.approx((0.5 * (1 - step / 40), 0.25 * (1 - step / 40)))
    assert Phases(config(), 100).steps_ahead == 0
    assert Phases(config(ahead=(0.5,), ahead_until=1.0), 100).steps_ahead == 100


@pytest.mark.parametrize(
    "phases", [{}, {"batch_tokens": (64, 256)}, {"batch_tokens": (64,), "until": (0.7,)}, {"windows": (0.1, 0.4)}]
)
def test_length_in_tokens_or_compute(phases):
    whole = config(384, **phases)
    wanted = 20 * count_parameters(MODEL).counted
    assert training_tokens(whole, MODEL) == pytest.approx(wanted, abs=3 * 384)
    check_length(whole, MODEL)
    compute = PretrainConfig(batch_tokens=384, target_flops=1e12, phases=PhasesConfig(**phases))
    flops = training_tokens(compute, MODEL) * pretraining_flops_per_token(compute, MODEL)
    assert flops == pytest.approx(1e12, rel=0.01)


def test_smaller_windows_take_fewer_flops():
    grown = pretraining_flops_per_token(config(windows=(0.25,)), MODEL)
    # Equal shares of the tokens; a layer with a window of 16 in a row of 64 meets at most 33 keys a token.
    assert 12 * 2 * 128 * (64 - 33) / 2 < flops_per_token(MODEL) - grown < 12 * 2 * 128 * 64 / 2


def test_a_batch_of_each_phase_is_whole_micro_batches():
    grown = config(64 * 12, batch_tokens=(64 * 4, 64 * 8))
    plans = plans_of_stage(grown, 64, 2)
    assert [(plan.rows, plan.accumulation) for plan in plans] == [(4, 3), (2, 6)]


@pytest.mark.parametrize(
    "phases, message",
    [
        ({"windows": (0.5, 0.25)}, r"^pretrain.phases.windows is \(0.5, 0.25\); it must be in rising order$"),
        ({"windows": (0.5,), "batch_tokens": (64, 128)}, "^pretrain.phases.batch-tokens has 2 and windows has 1; "),
        ({"windows": (0.5,), "until": (0.5, 0.5)}, "^pretrain.phases.until has 2 and windows has 1; "),
        ({"windows": (0.2, 0.5), "until": (0.5, 0.5)}, "^pretrain.phases.until is .* in rising order$"),
        ({"until": (0.5,)}, "^pretrain.phases.until is given, but neither windows nor batch-tokens"),
        ({"rates": (0.5,)}, "^pretrain.phases.rates has 1 and batch-tokens has 0"),
        ({"batch_tokens": (512,)}, r"^pretrain.phases.batch-tokens is \(512\); .* at most pretrain.batch-tokens, 384$"),
        ({"windows": (1.0,)}, "^pretrain.phases.windows is .*; it must be above 0 and below 1$"),
    ],
)
def test_phases_that_cannot_be(phases, message):
    with pytest.raises(Impossible, match=message):
        config(**phases)
