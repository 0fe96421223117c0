"""A training whose loss becomes NaN or infinite, or spikes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat.errors import UserError
from jaxchat.runs.metrics import read_metrics
from jaxchat.train.divergence import WINDOW, LossWatch
from tests.train.small_loop import Counting, begin, loop, step_fn, table


def diverging(number, name="loss", value=jnp.nan):
    """A step that reports `value` for the batch with this number, and spoils the parameters."""

    def step(state, batch):
        bad = batch["inputs"][0, 0, 0] == number
        state, result = step_fn(state, batch)
        state["params"]["x"] += value if bad else 0.0
        return state, {**result, name: value if bad else result[name]}

    return step


@pytest.mark.parametrize("broken", ["loss", "grad_norm"])
def test_nan_ends_the_run_and_is_not_saved(tmp_path, broken):
    trained = loop(tmp_path, step_fn=diverging(4, broken), save_every=2)
    with pytest.raises(UserError) as error:
        trained.train(begin())
    good = tmp_path / "pretrain" / "checkpoints" / "2"
    assert str(error.value).startswith(f"{broken} is nan at step 3: the last good checkpoint is {good}; resume")
    assert "--on-nan=skip" in str(error.value)
    assert trained.checkpoints.latest_step() == 2


def test_a_loss_without_meaning_may_be_of_any_size():
    watch = LossWatch([0.01] * WINDOW)
    assert not any(watch.fault(loss, 1.0, spikes=spikes) for loss, spikes in ((7.0, False), (0.01, True)))
    assert not watch.high and watch.fault(7.0, 1.0) is None and watch.high == [7.0]
    assert watch.fault(np.nan, 1.0, spikes=False) == "loss is nan"


def losses(directory):
    return [(step, loss) for step, loss, *_ in table(directory)]


@pytest.mark.parametrize("value", [jnp.nan, 1e6])
def test_after_a_divergence_training_returns_to_the_checkpoint_without_the_batches_since(tmp_path, monkeypatch, value):
    monkeypatch.setattr("jaxchat.train.divergence.WINDOW", 3)  # so that the seventh step can count as a spike
    skipping = loop(tmp_path / "skip", num_steps=10, step_fn=diverging(6, value=value), save_every=4, on_nan="skip")
    skipping.train(begin())

    class Without(Counting):
        """Batches 1 to 4, and then from 7 on: 5 follows the checkpoint, and 6 is the bad one."""

        def next_batch(self, step, params):
            if self.position == 4:
                self.position = 6
            return super().next_batch(step, params)

    expected = loop(tmp_path / "without", num_steps=10, source=Without())
    expected.train(begin())
    assert losses(tmp_path / "skip") == losses(tmp_path / "without")
    assert skipping.tokens == expected.tokens
    (event,) = skipping.divergences
    assert (event["step"], event["back_to"], event["batches"]) == (5, 4, 2)
    assert event["why"].startswith("loss is nan" if value != value else "loss spikes to 1000000.00")
    (line,) = [line for line in read_metrics(tmp_path / "skip") if "skipped_batches" in line]
    assert (line["step"], line["skipped_batches"], line["back_to"]) == (5, 2, 4)


def test_skipping_survives_an_interruption(tmp_path):
    settings = {"num_steps": 10, "step_fn": diverging(6), "save_every": 4, "on_nan": "skip"}
    whole = loop(tmp_path / "whole", **settings)
    whole.train(begin())
    for stop in (5, 6, 9):
        source, directory = Counting(), tmp_path / f"at-{stop}"
        stopped = loop(directory, source=source, **settings)
        stopped.checkpoints.close()
        real = source.next_batch

        def next_batch(step, params, real=real, stop=stop, source=source):
            if source.position == stop + 2:  # two batches are left out
                raise KeyboardInterrupt
            return real(step, params)

        source.next_batch = next_batch
        with pytest.raises(KeyboardInterrupt):
            stopped.train(begin())
        resumed = loop(directory, **settings)
        resumed.train(begin())
        assert losses(directory) == losses(tmp_path / "whole")
        assert resumed.divergences == whole.divergences and resumed.tokens == whole.tokens


def test_a_training_that_always_diverges_ends(tmp_path):
    def diverge(state, batch):
        state, result = step_fn(state, batch)
        return state, {**result, "loss": result["loss"] * (jnp.nan if state["step"] == 4 else 1)}

    trained = loop(tmp_path, step_fn=diverge, save_every=2, on_nan="skip")
    with pytest.raises(UserError, match="loss is nan at step 3, after resuming 3 times from .*2 with other batches"):
        trained.train(begin())
    assert [event["back_to"] for event in trained.divergences] == [2, 2, 2]
    with pytest.raises(UserError, match="loss is nan at step 3, before the first checkpoint"):
        loop(tmp_path / "early", step_fn=diverge, on_nan="skip").train(begin())


def test_only_a_loss_far_above_all_recent_ones_is_a_spike():
    watch = LossWatch()
    assert not any(watch.fault(loss, 1.0) for loss in [9.0, *np.linspace(10, 3, WINDOW)])
    assert watch.fault(2 * 9.8, 1.0) is None and not watch.high
    low = LossWatch([0.01] * WINDOW)
    assert low.fault(0.01, 1.0) is None and low.fault(0.9, 1.0) is None and not low.high
    assert LossWatch([0.1] * (WINDOW - 1)).fault(9.0, 1.0) is None  # too few steps to compare with
    nothing = LossWatch()  # as in RL, as long as no sample is right
    assert not any(nothing.fault(0.0, 0.0) for _ in range(2 * WINDOW))
    assert nothing.fault(1.3, 1.0) is None and list(nothing.recent) == [1.3]


def test_a_spike_is_a_fault_only_if_it_stays():
    def watch():
        watch = LossWatch([3.0] * WINDOW)
        assert watch.fault(3.0, 1.0) is None
        return watch

    stays = watch()
    assert not any(stays.fault(25.0 - i / WINDOW, 1.0) for i in range(WINDOW - 1)) and len(stays.high) == WINDOW - 1
    assert stays.fault(24.0, 1.0) == (
        f"loss spikes to 25.00 and stays above 6.00, from at most 3.00 in the {WINDOW} steps before,"
    )
    falls = watch()
    for loss in (10.0, 9.0, 5.9):
        assert falls.fault(loss, 1.0) is None
    assert not falls.high and list(falls.recent)[-3:] == [10.0, 9.0, 5.9]
    assert falls.fault(19.9, 1.0) is None and not falls.high  # of this kind of data the losses are known now


def test_what_spikes_by_parameters_of_a_checkpoint_is_the_data():
    restored = LossWatch([3.0] * WINDOW)
    assert restored.fault(25.0, 1.0) is None and not restored.high and list(restored.recent) == [25.0]
    assert restored.fault(float("nan"), 1.0) == "loss is nan"


def rising(first, last):
    """A step whose loss is high for the batches from `first` to `last`."""

    def step(state, batch):
        number = batch["inputs"][0, 0, 0]
        state, result = step_fn(state, batch)
        return state, {**result, "loss": 0.01 + 50.0 * ((number >= first) & (number <= last))}

    return step


def test_nothing_is_saved_until_a_spike_has_fallen(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxchat.train.divergence.WINDOW", 4)
    settings = {"num_steps": 14, "step_fn": rising(7, 9), "save_every": 4}
    whole = loop(tmp_path / "whole", **settings)
    saved, save = [], whole.checkpoints.save

    def noted(step, state, **more):
        saved.append(step)
        save(step, state, **more)

    whole.checkpoints.save = noted
    whole.train(begin())
    assert saved == [4, 10, 12, 14]  # 8 is put off until 10, when batch 10 has a low loss again
    directory = tmp_path / "stopped"
    stopped = loop(directory, source=Counting(stop=8), **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == 4
    loop(directory, **settings).train(begin())
    assert losses(directory) == losses(tmp_path / "whole")


def test_a_spike_that_stays_leads_back_to_where_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxchat.train.divergence.WINDOW", 4)
    trained = loop(tmp_path, num_steps=16, step_fn=rising(7, 99), save_every=2)
    with pytest.raises(UserError, match=r"loss spikes to 50.01 and stays above 1.01, .* at step 6: the last good"):
        trained.train(begin())
    assert trained.checkpoints.latest_step() == 6
