"""Schedules against their tables."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.optim.schedules import multiplier, muon_momentum


def table(schedule, steps):
    return [float(schedule(count)) for count in range(steps)]


def test_default_is_constant_then_linear_to_just_above_zero():
    got = table(multiplier(ScheduleConfig(), 20), 20)
    np.testing.assert_allclose(got, [1.0] * 17 + [0.75, 0.5, 0.25], rtol=1e-6)


def test_warmup_moves_from_the_first_step_and_decay_ends_above_final_fraction():
    config = ScheduleConfig(warmup_ratio=0.4, decay_ratio=0.5, final_fraction=0.1)
    got = table(multiplier(config, 10), 10)
    np.testing.assert_allclose(got, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28], rtol=1e-6)


def test_cosine_decay():
    config = ScheduleConfig(decay_ratio=0.4, decay="cosine", final_fraction=0.2)
    got = table(multiplier(config, 10), 10)
    half = 0.8 * np.sqrt(0.5) / 2
    np.testing.assert_allclose(got, [1.0] * 7 + [0.6 + half, 0.6, 0.6 - half], rtol=1e-6)


def test_no_decay_is_constant_and_full_decay_falls_at_every_step():
    assert table(multiplier(ScheduleConfig(decay_ratio=0.0), 5), 5) == [1.0] * 5
    np.testing.assert_allclose(table(multiplier(ScheduleConfig(decay_ratio=1.0), 4), 4), [1, 0.75, 0.5, 0.25])


@settings(max_examples=100, deadline=None)
@given(
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    final=st.floats(0, 1),
    kind=st.sampled_from(["linear", "cosine"]),
    steps=st.integers(1, 300),
)
def test_rises_then_falls_within_bounds(warmup, decay, final, kind, steps):
    values = np.asarray(multiplier(ScheduleConfig(warmup, decay, kind, final), steps)(np.arange(steps)))
    assert (values > 0).all() and (values <= 1 + 1e-6).all()
    peak = values.argmax()
    assert (np.diff(values[: peak + 1]) >= -1e-6).all() and (np.diff(values[peak:]) <= 1e-6).all()


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_host_and_device_agree_and_the_host_does_not_touch_the_device(decay):
    schedule = multiplier(ScheduleConfig(warmup_ratio=0.3, decay=decay, final_fraction=0.1), 20)
    on_host = [schedule(count) for count in range(20)]
    assert not any(isinstance(value, jax.Array) for value in on_host)
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(np.arange(20)), on_host, rtol=1e-6)


@pytest.mark.parametrize("count, momentum", [(0, 0.85), (75, 0.875), (150, 0.9), (300, 0.95), (5000, 0.95)])
def test_muon_momentum(count, momentum):
    assert float(muon_momentum(OptimizerConfig())(count)) == pytest.approx(momentum, rel=1e-6)


@pytest.mark.parametrize("count", [0, 1, 400])
def test_muon_momentum_without_steps_in_which_it_rises(count):
    config = OptimizerConfig(muon_momentum_steps=0)
    assert float(muon_momentum(config)(count)) == pytest.approx(config.muon_momentum)
