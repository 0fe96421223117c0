"""The training loop on a state of one number, where every order of events can be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import UserError
from jaxchat.metrics import Metrics, read_metrics
from jaxchat.train.loop import Evaluator, Loop


class Counting:
    """Batches that hold their own number."""

    def __init__(self, events=None, stop=None):
        self.events, self.stop, self.position = events, stop, 0

    def next_batch(self, step, params):
        if self.stop == step:
            raise KeyboardInterrupt
        if self.events is not None:
            self.events.append(f"batch {step}")
        self.position += 1
        return {"inputs": np.full((1, 2, 4), self.position, np.int32)}, {"extra": float(step)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def step_fn(state, batch):
    """Order matters: a batch left out or given twice changes everything that follows."""
    x = 0.9 * state["params"]["x"] + batch["inputs"][0, 0, 0]
    return {"params": {"x": x}, "step": state["step"] + 1}, {"loss": x / 7, "grad_norm": x}


def begin():
    return {"params": {"x": jnp.zeros(())}, "step": jnp.zeros((), jnp.int32)}


def loop(directory, *, num_steps=7, source=None, step_fn=step_fn, log=None, **settings):
    metrics = Metrics(directory, "pretrain", live=False)
    if log is not None:
        metrics.log = log
    return Loop(
        step_fn=step_fn,
        source=source or Counting(),
        num_steps=num_steps,
        metrics=metrics,
        checkpoints=Checkpoints(directory / "pretrain" / "checkpoints"),
        schedule_values=lambda step: {"lr": 1.0 - step / num_steps},
        flops_per_token=1.0,
        **settings,
    )


def table(directory):
    lines = read_metrics(directory)
    return [(line["step"], line["loss"], line["tokens"], line["extra"]) for line in lines if "loss" in line]


def test_logs_every_step(tmp_path):
    trained = loop(tmp_path)
    state = trained.train(begin())
    x, expected = 0.0, []
    for step in range(7):
        x = 0.9 * x + step + 1
        expected.append((step, pytest.approx(x / 7, rel=1e-5), 8 * (step + 1), float(step)))
    assert table(tmp_path) == expected
    assert float(state["params"]["x"]) == pytest.approx(x, rel=1e-5)
    assert trained.tokens == 56 and 0 < trained.train_seconds <= trained.seconds


def test_next_step_is_dispatched_before_the_last_is_read(tmp_path):
    events = []

    def dispatch(state, batch):
        events.append(f"dispatch {int(state['step'])}")
        return step_fn(state, batch)

    loop(
        tmp_path,
        num_steps=3,
        source=Counting(events),
        step_fn=dispatch,
        log=lambda step, **values: events.append(f"log {step}"),
    ).train(begin())
    assert events == [
        "batch 0", "dispatch 0", "batch 1", "dispatch 1", "log 0", "batch 2", "dispatch 2", "log 1", "log 2",
    ]  # fmt: skip


def test_saves_before_it_evaluates(tmp_path):
    saved = []

    def evaluate(step, params):
        saved.append((step, float(params["x"]), trained.checkpoints.latest_step()))
        if step == 4:
            raise RuntimeError("the evaluation failed")
        yield "bpb", 1.0

    trained = loop(tmp_path, save_every=2, evaluators=(Evaluator(4, evaluate),))
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        trained.train(begin())
    assert [(step, newest) for step, _, newest in saved] == [(0, None), (4, 4)]
    trained = loop(tmp_path, save_every=2)
    trained.train(begin())
    whole = loop(tmp_path / "whole")
    whole.train(begin())
    assert table(tmp_path) == table(tmp_path / "whole")


def test_when_evaluators_run(tmp_path):
    ran = []

    def evaluator(name, every, at_start=True):
        def run(step, params):
            ran.append((name, step))
            return ()

        return Evaluator(every, run, at_start)

    loop(tmp_path, evaluators=(evaluator("often", 3), evaluator("end", 0, at_start=False))).train(begin())
    assert ran == [("often", 0), ("often", 3), ("often", 6), ("often", 7), ("end", 7)]


@pytest.mark.parametrize("save_every", [0, 2])
def test_interrupted_anywhere_it_goes_on_alike(tmp_path, save_every):
    whole = loop(tmp_path / "whole", save_every=save_every)
    end = whole.train(begin())
    for stop in range(7):
        directory = tmp_path / f"at-{stop}"
        interrupted = loop(directory, source=Counting(stop=stop), save_every=save_every)
        with pytest.raises(KeyboardInterrupt):
            interrupted.train(begin())
        assert interrupted.checkpoints.latest_step() == (stop or None)
        assert len(table(directory)) == stop  # what was dispatched is logged, not lost
        resumed = loop(directory, save_every=save_every)
        assert resumed.train(begin())["params"]["x"] == end["params"]["x"]
        assert table(directory) == table(tmp_path / "whole")
        assert resumed.tokens == whole.tokens
        assert resumed.seconds > interrupted.train_seconds


def test_interrupted_within_a_step_it_saves_nothing(tmp_path):
    """The old state's buffers may be gone, and the new one is not there."""

    def interrupted(state, batch):
        if int(state["step"]) == 3:
            raise KeyboardInterrupt
        return step_fn(state, batch)

    stopped = loop(tmp_path, step_fn=interrupted, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == 2


@pytest.mark.parametrize("broken", ["loss", "grad_norm"])
def test_what_is_no_number_ends_the_run_and_is_not_saved(tmp_path, broken):
    def diverge(state, batch):
        state, result = step_fn(state, batch)
        return state, {**result, broken: result[broken] * (jnp.nan if state["step"] == 4 else 1)}

    trained = loop(tmp_path, step_fn=diverge, save_every=2)
    with pytest.raises(UserError, match=f"{broken} is nan at step 3: move .*pretrain away .* lower lr-fraction"):
        trained.train(begin())
    assert trained.checkpoints.latest_step() == 2


def test_checkpoints_of_another_length_are_refused(tmp_path):
    loop(tmp_path, num_steps=4).train(begin())
    with pytest.raises(UserError, match="is of 4 steps, not 7"):
        loop(tmp_path).train(begin())


def test_mfu_needs_a_known_peak(tmp_path, monkeypatch):
    loop(tmp_path / "cpu").train(begin())
    assert not any("mfu" in line for line in read_metrics(tmp_path / "cpu"))
    monkeypatch.setattr("jaxchat.train.loop.device_peak_flops", lambda kind: 1e6)
    loop(tmp_path / "known").train(begin())
    for line in read_metrics(tmp_path / "known"):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / (1e6 * jax.device_count()))
