"""A training whose length time decides, on a clock that each step and each evaluation puts forward."""

import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import ScheduleConfig
from jaxchat.stopping import Interrupted
from jaxchat.train.horizon import Horizon
from jaxchat.train.loop import Evaluator
from tests.train.small_loop import Counting, begin, loop, step_fn, table


class Timed:
    """A training for which there are so many seconds; steps take one each, evaluations three."""

    def __init__(self, directory, seconds, *, stop=None, slower_from=10**9):
        self.now, self.steps, self.slower_from = 0.0, 0, slower_from
        self.horizon = Horizon(ScheduleConfig(), lambda: seconds - self.now, now=lambda: self.now)
        evaluate = self.horizon.timed(10, self.evaluate)
        self.loop = loop(
            directory,
            num_steps=1,
            source=Counting(stop=stop),
            step_fn=self.step,
            evaluators=(Evaluator(10, evaluate),),
            horizon=self.horizon,
            save_every=25,
        )

    def step(self, state, batch):
        self.steps += 1
        self.now += 1.0 if self.steps <= self.slower_from else 2.0
        return step_fn(state, batch)

    def evaluate(self, step, params):
        self.now += 3.0
        return ()

    def train(self):
        self.loop.train(begin())
        return self.loop.num_steps


def test_it_ends_in_time(tmp_path):
    timed = Timed(tmp_path, 130.0)
    steps = timed.train()
    assert steps == len(table(tmp_path)) == pytest.approx(97, abs=2)  # with 10 evaluations, and two at the ends
    assert timed.now == pytest.approx(130.0, abs=3.0)
    _, _, meta = Checkpoints(tmp_path / "pretrain" / "checkpoints").restore(begin(), steps)
    assert meta["num_steps"] == steps


def test_it_is_shorter_where_steps_have_become_slower(tmp_path):
    steps = Timed(tmp_path, 130.0, slower_from=40).train()
    assert steps == pytest.approx(40 + 35, abs=4)


def test_stopped_while_its_rates_fall_it_goes_on_as_if_it_had_not_been(tmp_path):
    whole = Timed(tmp_path / "whole", 130.0)
    steps = whole.train()
    with pytest.raises(Interrupted):
        Timed(tmp_path / "stopped", 130.0, stop=steps - 8).train()
    rest = Timed(tmp_path / "stopped", 1e6)  # however much time there is
    assert rest.train() == steps
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    assert all(rest.horizon.rates[step] == whole.horizon.rates[step] for step in range(steps - 8, steps))


def test_stopped_while_they_are_constant_it_has_the_time_that_is_left(tmp_path):
    with pytest.raises(Interrupted):
        Timed(tmp_path, 130.0, stop=30).train()
    assert Timed(tmp_path, 70.0).train() == pytest.approx(30 + 53, abs=4)
