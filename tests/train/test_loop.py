"""The training loop: the order of events, interruptions, what is logged and saved."""

import queue
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from jaxchat import stopping
from jaxchat.checkpoint import Checkpoints
from jaxchat.errors import UserError
from jaxchat.runs.metrics import read_metrics
from jaxchat.stopping import Interrupted
from jaxchat.train.loop import Evaluator
from tests.train.small_loop import Counting, begin, loop, step_fn, table


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


def test_the_wait_for_a_batch_is_logged(tmp_path):
    class Slow(Counting):
        def next_batch(self, step, params):
            time.sleep(0.05 * (step == 3))
            return super().next_batch(step, params)

    loop(tmp_path, source=Slow()).train(begin())
    waited = {line["step"]: line["input_seconds"] for line in read_metrics(tmp_path)}
    assert waited[3] >= 0.05 and len(waited) == 7
    assert sorted(waited, key=waited.get)[-1] == 3


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


@pytest.mark.parametrize("room", [True, False])
def test_the_next_step_does_not_wait_for_a_save(tmp_path, room):
    """Unless there is no room for a copy of the state, which the next step overwrites."""
    events = []

    class Recording(Checkpoints):
        def copy(self, state_tree):
            return super().copy(state_tree) if room else None

        def save(self, step, *state, **settings):
            events.append(f"save {step}")
            super().save(step, *state, **settings)

    trained = loop(
        tmp_path,
        num_steps=4,
        source=Counting(events),
        save_every=2,
        log=lambda step, **values: events.append(f"log {step}"),
    )
    trained.checkpoints = Recording(tmp_path / "pretrain" / "checkpoints")
    trained.train(begin())
    events_around_save = ["batch 2", "log 1", "save 2"] if room else ["log 1", "save 2", "batch 2"]
    assert events == ["batch 0", "batch 1", "log 0", *events_around_save, "batch 3", "log 2", "log 3", "save 4"]
    x = 0.9 * 1 + 2
    state, position, meta = trained.checkpoints.restore(begin(), 2)
    assert (float(state["params"]["x"]), int(state["step"]), position) == (pytest.approx(x), 2, {"position": 2})
    assert (meta["tokens"], meta["recent_losses"]) == (16, pytest.approx([1 / 7, x / 7]))


@pytest.mark.parametrize("within", ["the next batch", "the next step"])
@pytest.mark.parametrize("error", [UserError("bad text"), MemoryError("too little"), KeyboardInterrupt()], ids=repr)
def test_an_error_before_a_due_save_has_begun_does_not_lose_it(tmp_path, within, error):
    class Source(Counting):
        def next_batch(self, number, params):
            if number == 4 and within == "the next batch":
                raise error
            return super().next_batch(number, params)

    def step(state, batch):
        if int(state["step"]) == 4 and within == "the next step":
            raise error
        return step_fn(state, batch)

    stopped = loop(tmp_path, source=Source(), step_fn=step, save_every=4)
    with pytest.raises(type(error)):
        stopped.train(begin())
    assert Checkpoints(stopped.checkpoints.directory).steps() == [4]
    assert len(table(tmp_path)) == 4
    loop(tmp_path, save_every=4).train(begin())
    whole = loop(tmp_path / "whole", save_every=4)
    whole.train(begin())
    assert table(tmp_path) == table(tmp_path / "whole")


def test_the_speed_of_a_training_leaves_out_the_time_in_which_it_samples(tmp_path):
    class Sampling(Counting):
        samples = True

        def next_batch(self, step, params):
            time.sleep(0.01)
            return super().next_batch(step, params)

        def tokens(self, batch):
            return 5  # of 8 places

    for source, tokens in ((Sampling(), 5), (Counting(), 8)):
        directory = tmp_path / type(source).__name__
        loop(directory, source=source).train(begin())
        for line in read_metrics(directory):
            training = line["step_seconds"] - line["input_seconds"] * source.samples
            assert line["tokens_per_second"] == pytest.approx(tokens / training)
            assert line["tokens"] == tokens * (line["step"] + 1)


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


def test_a_save_in_progress_is_finished_however_the_training_ends(tmp_path):
    """Python would not wait for it."""

    def broken(step, params):
        raise RuntimeError("the evaluation failed")

    trained = loop(tmp_path, save_every=2, evaluators=(Evaluator(4, broken, at_start=False),))
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        trained.train(begin())
    assert Checkpoints(trained.checkpoints.directory).latest_step() == 4


def test_a_missed_evaluation_is_run_after_resuming(tmp_path):
    """The run stopped between a save and the evaluation of the same step."""
    ran = []

    def evaluate(step, params):
        ran.append((step, float(params["x"])))
        if ran[-2:] == [(0, 0.0), (3, ran[-1][1])]:
            raise RuntimeError("killed")
        return ()

    stopped = loop(tmp_path, save_every=3, evaluators=(Evaluator(3, evaluate),))
    with pytest.raises(RuntimeError, match="killed"):
        stopped.train(begin())
    stopped.checkpoints.wait()
    loop(tmp_path, save_every=3, evaluators=(Evaluator(3, evaluate),)).train(begin())
    assert [step for step, _ in ran] == [0, 3, 3, 6, 7] and ran[1] == ran[2]


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
def test_interrupted_anywhere_it_resumes_with_the_same_losses(tmp_path, save_every):
    whole = loop(tmp_path / "whole", save_every=save_every)
    end = whole.train(begin())
    for stop in range(7):
        directory = tmp_path / f"at-{stop}"
        interrupted = loop(directory, source=Counting(stop=stop), save_every=save_every)
        with pytest.raises(KeyboardInterrupt):
            interrupted.train(begin())
        assert interrupted.checkpoints.latest_step() == (stop or None)
        assert len(table(directory)) == stop  # what was dispatched is logged
        resumed = loop(directory, save_every=save_every)
        assert resumed.train(begin())["params"]["x"] == end["params"]["x"]
        assert table(directory) == table(tmp_path / "whole")
        assert resumed.tokens == whole.tokens
        assert resumed.seconds > interrupted.train_seconds


def test_interrupted_while_dispatching_it_saves_nothing(tmp_path):
    """The old state's buffers may be gone, and the new state does not exist yet."""

    def interrupted(state, batch):
        if int(state["step"]) == 3:
            raise KeyboardInterrupt
        return step_fn(state, batch)

    stopped = loop(tmp_path, step_fn=interrupted, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == 2


@pytest.mark.parametrize("name, why", [("SIGTERM", " by SIGTERM"), ("SIGHUP", " by SIGHUP"), ("SIGINT", "")])
@pytest.mark.parametrize("asked", ["before the loop reads", "within the step"])
def test_a_signal_saves_at_the_step_boundary(tmp_path, asked, name, why):
    number = getattr(signal, name)
    whole = loop(tmp_path / "whole", save_every=3)
    end = whole.train(begin())
    for stop in (1, 2, 3, 6):  # the two around a save, and the last

        def step(state, batch, stop=stop):
            if asked == "within the step" and int(state["step"]) == stop:
                signal.raise_signal(number)
            return step_fn(state, batch)

        class Source(Counting):
            def next_batch(self, step, params, stop=stop):
                if asked == "before the loop reads" and step == stop:
                    signal.raise_signal(number)
                return super().next_batch(step, params)

        directory = tmp_path / f"at-{stop}"
        stopped = loop(directory, source=Source(), step_fn=step, save_every=3)
        with pytest.raises(Interrupted) as interrupted:
            stopped.train(begin())
        assert str(interrupted.value) == f"stopped{why}, step {stop + 1} saved"
        assert stopped.checkpoints.latest_step() == stop + 1
        assert len(table(directory)) == stop + 1
        assert loop(directory, save_every=3).train(begin())["params"]["x"] == end["params"]["x"]
        assert table(directory) == table(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("first", [0, 3])
def test_a_signal_before_the_end_of_the_first_step_takes_effect_at_once(tmp_path, number, first):
    """As in RL, where XLA compiles in it: there is nothing to save."""
    if first:
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path, source=Counting(stop=first)).train(begin())

    def step(state, batch):
        signal.raise_signal(number)
        raise AssertionError("the step went on")

    stopped = loop(tmp_path, step_fn=step)
    with pytest.raises(Interrupted, match="stopped( by SIGTERM| by SIGHUP)?$"):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == (first or None)
    whole = loop(tmp_path / "whole").train(begin())
    assert loop(tmp_path).train(begin())["params"]["x"] == whole["params"]["x"]
    assert table(tmp_path) == table(tmp_path / "whole")


@pytest.mark.parametrize("in_the_way", ["a full disk", "a folder"])
@pytest.mark.parametrize("due", [3, 4, 5])
def test_a_log_that_cannot_be_written_ends_the_training_in_order(tmp_path, in_the_way, due):
    """Whether no save is due, or one has begun, or one waits for the log of its step."""
    file, aside = tmp_path / "metrics.jsonl", tmp_path / "aside"

    class Source(Counting):
        def next_batch(self, step, params):
            if step == 5:
                file.rename(aside)
                file.symlink_to("/dev/full") if in_the_way == "a full disk" else file.mkdir()
            return super().next_batch(step, params)

    stopped = loop(tmp_path, source=Source(), save_every=due)
    why = r"No space left on device\); make room, and" if in_the_way == "a full disk" else r"Is a directory\);"
    with pytest.raises(UserError, match=rf"metrics.jsonl cannot be written \({why} the same command resumes from"):
        stopped.train(begin())
    assert stopped.checkpoints.steps() == ([due] if due < 5 else [])
    file.unlink() if in_the_way == "a full disk" else file.rmdir()
    aside.rename(file)
    whole = loop(tmp_path / "whole", save_every=due)
    assert loop(tmp_path, save_every=due).train(begin())["params"]["x"] == whole.train(begin())["params"]["x"]
    assert table(tmp_path) == table(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_wait_for_text_that_never_comes(tmp_path, monkeypatch, number):
    monkeypatch.setattr(stopping, "PATIENCE", 0.2)

    class Source(Counting):
        def next_batch(self, step, params):
            if step == 3:
                signal.raise_signal(number)
                queue.Queue().get(timeout=30)
            return super().next_batch(step, params)

    end = loop(tmp_path / "whole").train(begin())
    began = time.monotonic()
    with pytest.raises(Interrupted, match="step 3 saved"):
        loop(tmp_path / "run", source=Source()).train(begin())
    assert time.monotonic() - began < 20
    resumed = loop(tmp_path / "run")
    assert resumed.checkpoints.latest_step() == 3
    assert resumed.train(begin())["params"]["x"] == end["params"]["x"]


def test_ctrl_c_during_a_save_takes_effect_after_it(tmp_path):
    events = []

    class Slow(Checkpoints):
        def save(self, step, *state, **position):
            events.append(f"save {step}")
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            super().save(step, *state, **position)
            events.append(f"saved {step}")

    stopped = loop(tmp_path, save_every=3)
    stopped.checkpoints = Slow(tmp_path / "pretrain" / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        stopped.train(begin())
    assert events[:2] == ["save 3", "saved 3"] and events[2::2] == [f"save {stopped.checkpoints.latest_step()}"]
    assert stopped.checkpoints.latest_step() in (4, 5)  # a step was under way, or two


def test_ctrl_c_ends_the_training_even_if_the_last_step_has_diverged(tmp_path):
    class Source(Counting):
        def next_batch(self, number, params):
            if number == 5:
                raise KeyboardInterrupt
            return super().next_batch(number, params)

    def broken(state, batch):
        state, metrics = step_fn(state, batch)
        return state, {**metrics, "loss": metrics["loss"] * (jnp.nan if int(state["step"]) == 5 else 1.0)}

    stopped = loop(tmp_path, source=Source(), step_fn=broken, save_every=2, on_nan="skip")
    with pytest.raises(KeyboardInterrupt):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == 4


def test_sigterm_after_the_last_step_is_not_lost(tmp_path):
    def evaluate(step, params):
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return ()

    trained = loop(tmp_path, evaluators=(Evaluator(0, evaluate),))
    with pytest.raises(Interrupted, match="SIGTERM"):
        trained.train(begin())
    assert trained.checkpoints.latest_step() == 7


@pytest.mark.parametrize("at_step", [0, 4])
def test_a_long_evaluation_is_left_at_once(tmp_path, at_step):
    def evaluate(step, params):
        if step == at_step:
            signal.raise_signal(signal.SIGTERM)
            stopping.raise_if_asked()
            raise AssertionError("the evaluation went on")
        yield "bpb", 1.0

    stopped = loop(tmp_path, evaluators=(Evaluator(4, evaluate),))
    with pytest.raises(Interrupted, match="SIGTERM" if at_step == 0 else "SIGTERM, step 4 saved"):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() == (at_step or None)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)

    def step(state, batch):
        if int(state["step"]) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the step went on")
        return step_fn(state, batch)

    stopped = loop(tmp_path, step_fn=step)
    with pytest.raises(Interrupted):
        stopped.train(begin())
    assert stopped.checkpoints.latest_step() is None


def test_checkpoints_of_another_number_of_steps_are_refused(tmp_path):
    loop(tmp_path, num_steps=4).train(begin())
    with pytest.raises(UserError, match="holds a training of 4 steps, not 7"):
        loop(tmp_path).train(begin())


def test_mfu_needs_a_known_peak(tmp_path, monkeypatch):
    loop(tmp_path / "cpu").train(begin())
    assert not any("mfu" in line for line in read_metrics(tmp_path / "cpu"))
    monkeypatch.setattr("jaxchat.train.loop.device_peak_flops", lambda kind: 1e6)
    loop(tmp_path / "known").train(begin())
    for line in read_metrics(tmp_path / "known"):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] / (1e6 * jax.device_count()))
