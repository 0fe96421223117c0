"""What a training by rewards says about how much there was to learn."""

import numpy as np
import pytest

from jaxchat.config import RLConfig
from jaxchat.rl.signal import Signal

EQUAL, DIFFERENT = [0.1, 0.1, 0.1], [0.0, 1.0, 0.0]
NONE_CUT = np.zeros((2, 3), bool)


def test_a_step_is_counted():
    signal = Signal()
    cut = np.array([[True, False, False], [True, True, False]])
    step = signal.add(np.array([EQUAL, DIFFERENT]), cut)
    assert step == {"reward": pytest.approx(1.3 / 6), "groups_without_signal": 0.5, "cut": 0.5}
    assert not signal.absent
    signal.add(np.array([EQUAL, EQUAL]), NONE_CUT)
    assert signal.facts() == {"groups_without_signal": 0.75, "cut": 0.25, "steps_without_signal": 1}
    assert not signal.absent


def test_a_training_without_signal_is_known_also_when_resumed():
    signal = Signal()
    assert not signal.absent and signal.facts() == {}
    for _ in range(3):
        signal.add(np.array([EQUAL, EQUAL]), NONE_CUT)
        assert signal.absent
        signal = Signal(**signal.state())
    assert signal.facts() == {"groups_without_signal": 1, "cut": 0, "steps_without_signal": 3}
    signal.add(np.array([EQUAL, DIFFERENT]), NONE_CUT)
    assert not signal.absent


@pytest.mark.parametrize(
    ("reward", "cut", "settings", "advice"),
    [
        (0.0, True, {"max_new_tokens": 8}, "100% of them had no room to end: raise --rl.max-new-tokens above 8"),
        (0.0, False, {}, "(0 on average); the model does not find the right ones: train it longer before rl"),
        (0.0, False, {"samples_per_question": 4}, "raise --rl.samples-per-question above 4"),
        (0.0, False, {"temperature": 0.1}, "raise --rl.temperature above 0.1"),
        (1.0, False, {"temperature": 0.1}, "the model knows the answers: name harder --rl.tasks"),
        (1.0, False, {}, "(1 on average); the model knows the answers: name harder --rl.tasks"),
    ],
)
def test_the_advice_fits_the_cause(reward, cut, settings, advice):
    signal = Signal()
    signal.add(np.full((2, 3), reward), np.full((2, 3), cut))
    assert advice in signal.advice(RLConfig(**settings))
