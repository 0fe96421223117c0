"""What a training by rewards says about how much there was to learn."""

import json

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


def test_a_signal_that_is_gone_for_long_is_told():
    """After 10 and 100 steps in a row, also when resumed, with the mean reward and the cause of these steps alone."""
    signal, config = Signal(), RLConfig(max_new_tokens=8, updates_per_batch=2, method="clipped", top_k=None)
    signal.add(np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), ~NONE_CUT)
    told = {}
    for step in range(1, 120):
        signal.add(np.zeros((2, 3)), NONE_CUT)
        signal = Signal(**json.loads(json.dumps(signal.state())))
        told |= {step: line} if (line := signal.warning(config, 100)) else {}
    assert list(told) == [10, 100] and not signal.absent
    assert told[10].startswith(
        "all answers of each question had the same reward in the last 20 steps (0 on average); the model does not find"
    )
    signal.add(np.array([EQUAL, DIFFERENT]), NONE_CUT)
    assert signal.quiet.steps == 0 and signal.warning(config, 100) is None
    for _ in range(10):
        signal.add(np.full((2, 3), np.nan), NONE_CUT)
    assert "no answer had a reward in the last 20 steps (60 answers); mend what scores" in str(
        signal.warning(config, 9)
    )


@pytest.mark.parametrize(
    ("reward", "cut", "settings", "advice"),
    [
        (0.0, True, {"max_new_tokens": 8}, "100% of them had no room to end: raise --rl.max-new-tokens above 8"),
        (0.0, True, {"max_new_tokens": 99}, "no room to end: model.sequence-len leaves 50 tokens for most; train a"),
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
    assert advice in signal.advice(RLConfig(**settings), 50)
