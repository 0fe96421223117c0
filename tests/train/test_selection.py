"""Which checkpoint is a training's result, by the order of its evaluations, however often it was stopped."""

import json

import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import CheckpointConfig
from jaxchat.train.loop import Evaluator
from jaxchat.train.selection import Turn, find_turn
from tests.train.small_loop import Counting, begin, loop

TURNS = (9.0, 3.0, 2.0, 1.0, 1.5, 1.2, 1.6, 1.8)  # bits per byte after 0, 1, ... 7 steps
FALLS = (9.0, 3.0, 2.0, 1.5, 1.4, 1.3, 1.2, 1.1)


def prepare(directory, bpb, *, rereads=lambda position: True, keep=1, **settings):
    evaluator = Evaluator(1, lambda step, params: [("bpb", bpb[step])])
    prepared = loop(directory, evaluators=(evaluator,), rereads=rereads, **settings)
    prepared.checkpoints = Checkpoints(prepared.checkpoints.directory, CheckpointConfig(keep=keep, keep_best=True))
    return prepared


def train(directory, bpb, **settings):
    trained = prepare(directory, bpb, **settings)
    trained.train(begin())
    return trained.checkpoints


def params_after(step):
    x = 0.0
    for number in range(1, step + 1):
        x = 0.9 * x + number
    return pytest.approx(x, rel=1e-6)


@pytest.mark.parametrize("save_every", [0, 2])
def test_the_best_is_kept_beside_the_newest_and_is_the_result_where_validation_turned(tmp_path, save_every):
    checkpoints = train(tmp_path, TURNS, save_every=save_every)
    assert find_turn(checkpoints, 7) == Turn(3, 1.0, 1.8)
    assert checkpoints.steps() == [3, 7]
    state, position, meta = checkpoints.restore(begin(), 3)
    assert float(state["params"]["x"]) == params_after(3) and position == {"position": 3} and meta["tokens"] == 24


def test_the_last_is_the_result_where_validation_never_turned(tmp_path):
    checkpoints = train(tmp_path, FALLS)
    assert find_turn(checkpoints, 7) is None
    assert checkpoints.latest_step() == 7


@pytest.mark.parametrize(("bpb_at_end", "turned"), [(1.0019, False), (1.0021, True), (float("nan"), False)])
def test_a_difference_that_is_noise_is_no_turn(tmp_path, bpb_at_end, turned):
    checkpoints = train(tmp_path, (*TURNS[:-1], bpb_at_end))
    assert (find_turn(checkpoints, 7) is not None) == turned


def test_nothing_is_saved_for_it_while_the_data_is_new(tmp_path):
    """Of what is saved anyway the best is still the result."""
    checkpoints = train(tmp_path / "one", TURNS, rereads=lambda position: False)
    assert checkpoints.steps() == [7] and find_turn(checkpoints, 7) is None
    checkpoints = train(tmp_path / "every 2", TURNS, rereads=lambda position: False, save_every=2)
    assert checkpoints.steps() == [4, 7] and find_turn(checkpoints, 7) == Turn(4, 1.5, 1.8)
    checkpoints = train(tmp_path / "from 5 on", TURNS, rereads=lambda position: position["position"] >= 5)
    assert checkpoints.steps() == [5, 7] and find_turn(checkpoints, 7) == Turn(5, 1.2, 1.8)


@pytest.mark.parametrize("stop", range(1, 7))
def test_stopped_anywhere_the_result_is_the_same(tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TURNS, source=Counting(stop=stop))
    checkpoints = train(tmp_path, TURNS)
    assert find_turn(checkpoints, 7) == Turn(3, 1.0, 1.8) and {3, 7} <= set(checkpoints.steps())
    assert float(checkpoints.restore(begin(), 3)[0]["params"]["x"]) == params_after(3)


def test_a_step_that_was_rated_and_not_saved_is_rated_again(tmp_path):
    """Killed in between, on another course it may be another state, which is worse."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TURNS, source=Counting(stop=2))
    scores = tmp_path / "pretrain" / "checkpoints" / "worths.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "6": -0.1}))
    assert find_turn(train(tmp_path, TURNS), 7) == Turn(3, 1.0, 1.8)


def test_evaluations_of_other_tokens_are_not_compared(tmp_path):
    def meta(tokens):
        return {"stage": "pretrain", "config": {"pretrain": {"eval_tokens": tokens}}}

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, TURNS, source=Counting(stop=5), meta=meta(100))
    bpb = [10 * value for value in TURNS]
    assert find_turn(train(tmp_path, bpb, meta=meta(200)), 7) == Turn(5, 12.0, 18.0)
