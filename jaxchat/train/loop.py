"""The only training loop: pretraining, midtraining, SFT and RL all run through `Loop.train`.

`_Attempt.one_step` shows a step from its batch to the evaluation after it. The next step is dispatched before the
metrics of the last one are read, so that the devices never wait for the host. They do not wait for a save either, if
they have room for a copy of the state.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax

from jaxchat import stopping
from jaxchat.checkpoint import Checkpoints
from jaxchat.devices.machine import device_peak_flops
from jaxchat.devices.processes import StopFlag, active, cause_of
from jaxchat.errors import UserError, check
from jaxchat.runs.metrics import Metrics
from jaxchat.stopping import Cause, Deferral, Interrupted
from jaxchat.train.divergence import Diverged, LossWatch
from jaxchat.train.horizon import Horizon
from jaxchat.train.selection import forget_scores, rate, score_of
from jaxchat.train.step import AbstractBatch, Batch, State

MAX_RETURNS = 3  # to one checkpoint: a training that diverges more often suffers from more than bad batches
STOP = "stop"  # in a step's results: whether and why a process was asked to stop, as a number


@runtime_checkable
class Source(Protocol):
    """Where batches come from; in RL the current parameters write them: then `samples` is true."""

    samples = False

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch of this step, on the devices, and metrics to log with it."""
        ...

    def tokens(self, batch: Batch) -> int:
        """How many tokens the last batch has."""
        return batch["inputs"].size

    def get_state(self) -> dict:
        """The position after the last batch, as JSON; after `set_state` the same batches follow."""
        ...

    def set_state(self, state: dict) -> None: ...

    def others(self) -> Sequence[AbstractBatch]:
        """What else `next_batch` returns than the first batch, each for a program of its own."""
        return ()

    def whole_state(self, state: dict) -> dict:
        """The position from which any number of processes can resume, given that of this process.

        All processes call it together.
        """
        return state


@dataclass(frozen=True)
class Evaluator:
    """Measures the parameters every `every` steps, after the last step and, if `at_start`, before the first.

    With 0 for `every` it does not run in between. `run` gets the number of steps done and the parameters, and yields
    (metric name, value).
    """

    every: int
    run: Callable[[int, Any], Iterable[tuple[str, Any]]]
    at_start: bool = True

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether it runs after `step` steps of `num_steps`."""
        return step == num_steps or (self.every > 0 and step % self.every == 0)


@dataclass
class Loop:
    """The training of one stage, and how far it has come.

    `flops_per_token` gives the MFU on devices whose peak is known. Checkpoints are saved every `save_every` steps (0:
    only at the end) and when the run is interrupted. After a divergence the training stops, or, with `on_nan` "skip",
    resumes from the newest checkpoint without the batches since then.
    """

    step_fn: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    source: Source
    num_steps: int
    metrics: Metrics
    checkpoints: Checkpoints
    schedule_values: Callable[[int], dict[str, float]]
    flops_per_token: Callable[[int], float]  # at a step
    save_every: int = 0
    evaluators: tuple[Evaluator, ...] = ()
    watch: Callable[[dict[str, float]], None] = lambda values: None  # is given the metrics of each step
    on_nan: Literal["stop", "skip"] = "stop"
    meta: dict = field(default_factory=dict)
    # Whether the data from a position on has been read before, so that validation may turn (`train/selection.py`).
    rereads: Callable[[dict], bool] = lambda position: False
    # Whether a training of another number of steps (the second argument) did its first steps (the first) as this does.
    same_course: Callable[[int, int], bool] = lambda done, num_steps: False
    horizon: Horizon | None = None  # which finds `num_steps` while it trains, if time decides
    began: float = field(default_factory=time.perf_counter)  # when this process began the stage
    startup: dict[str, float] = field(default_factory=dict)  # seconds spent before the first step, by what on
    # Over all processes that have trained the stage, one after another:
    train_seconds: float = 0.0  # of steps alone
    tokens: int = 0
    divergences: list[dict] = field(default_factory=list)  # step, back_to, batches left out, why
    _earlier_seconds: float = 0.0
    _loss_watch: LossWatch = field(default_factory=LossWatch)
    _returns: Counter[int] = field(default_factory=Counter)  # after divergences, by the step of the checkpoint
    _first_step_logged: bool = False

    @property
    def seconds(self) -> float:
        """Of the stage, resumed or not: steps, compilation, evaluation, samples and checkpoints."""
        return self._earlier_seconds + time.perf_counter() - self.began

    def train(self, state: State) -> State:
        """Trains until `num_steps`, from the newest checkpoint if there is one; returns the final state.

        Raises:
          UserError: the loss diverges, and the training cannot or must not resume without the batches at fault; or the
            checkpoints are those of a training with another number of steps.
          Interrupted: the training was asked to end (`jaxchat.stopping`), and has, after the current step, saved its
            state. Before the end of the first step that it does there is nothing to save, and it ends at once.
        """
        abstract = jax.tree.map(_abstract, state)
        self.checkpoints.prepare(abstract)
        step = self.checkpoints.latest_step()
        if step is None:
            step = 0
        else:
            jax.tree.map(lambda x: x.delete(), state)  # the caller may hold it, and its memory is needed
            state = self._resume(abstract, step)
        with stopping.deferred(alone=not active(), unsaved=False) as deferral:
            self._evaluate_at_start(step, state)
            try:
                while True:
                    try:
                        return _Attempt(self, state, step, deferral).run()
                    except Diverged as error:
                        diverged = error.with_traceback(None)  # a traceback would hold the state, and its memory
                    state, step = self._return_to_checkpoint(abstract, diverged)
            finally:
                self.checkpoints.wait()  # however the training ends: a save in progress would end with the program

    def save(self, state: State, step: int, position: dict, is_copy: bool = False) -> None:
        """Saves the state after `step` steps, or a copy of it, with the data position that belongs to it."""
        meta = {
            **self.meta,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "tokens": self.tokens,
            "divergences": self.divergences,
            "recent_losses": list(self._loss_watch.recent),
        }
        self.metrics.flush()  # whoever resumes from this checkpoint must find what was logged before it
        self.checkpoints.wait()
        data = self.source.whole_state(position)
        self.checkpoints.save(step, state, data=data, meta=meta, is_copy=is_copy)

    def evaluate(self, evaluators: Iterable[Evaluator], step: int, params) -> float | None:
        """Runs evaluators after `step` steps, logs what they measure, and returns how good that is, as `score_of`."""
        score = None
        for evaluator in evaluators:
            values = dict(evaluator.run(step, params))
            if values:
                self.metrics.log(step, **values)
            score = score_of(values) if score is None else score
        return score

    def log_step(self, step: int, batch_tokens: int, results: dict[str, float], extra: dict, seconds: float) -> None:
        """Logs a step that took `seconds`, and counts it.

        Its speed is that of training: the time in which the model wrote the batch itself is left out.
        """
        training = seconds - extra["input_seconds"] if self.source.samples else seconds
        values = {
            **{name: value for name, value in results.items() if name not in (STOP, "targets")},
            **self.schedule_values(step),
            "tokens": self.tokens + batch_tokens,
            "tokens_per_second": batch_tokens / training,
            "step_seconds": seconds,
            **extra,
        }
        peak = device_peak_flops(jax.devices()[0].device_kind)
        if peak:
            values["mfu"] = batch_tokens / training * self.flops_per_token(step) / (peak * jax.device_count())
        self.metrics.log(step, **values)
        # Counted last: an interruption above leaves the whole step unlogged, and it is logged again.
        self.train_seconds += seconds
        self.tokens += batch_tokens
        if not self._first_step_logged:
            self._first_step_logged = True
            parts = ", ".join(f"{name} {spent:.1f}" for name, spent in self.startup.items())
            elapsed = time.perf_counter() - self.began
            self.metrics.note(f"first step after {elapsed:.1f} s{': ' if parts else ''}{parts}")
        self.metrics.live(step + 1, **values)
        self.watch(values)

    def _resume(self, abstract: State, step: int) -> State:
        """Restores the checkpoint of an earlier process, and adds to its time and divergences."""
        state, meta = self._restore(abstract, step)
        self._earlier_seconds, self.train_seconds = meta["seconds"], meta["train_seconds"]
        self.divergences = meta["divergences"]
        if step < self.num_steps:
            self.metrics.note(f"resuming at step {step:,} of {self.num_steps:,}")
        return state

    def _restore(self, abstract: State, step: int) -> tuple[State, dict]:
        state, position, meta = self.checkpoints.restore(abstract, step)
        if self.horizon is not None:
            self.num_steps = self.horizon.resume(step, meta["num_steps"])
        check(
            meta["num_steps"] == self.num_steps or self.same_course(step, meta["num_steps"]),
            f"{self.checkpoints.directory} holds a training of {meta['num_steps']} steps, not {self.num_steps}, and of "
            f"its first {step} at least one would have had another learning rate or phase; leave data and settings as "
            f"they were, or do the stage again with --redo={self.checkpoints.directory.parent.name}",
        )
        self.source.set_state(position)
        forget_scores(self.checkpoints, step, meta, self.meta)
        self.tokens, self._loss_watch = meta["tokens"], LossWatch(meta["recent_losses"])
        return state, meta

    def _evaluate_at_start(self, step: int, state: State) -> None:
        # Resumed, those that are due at this step run again: the last process may have stopped between its save and
        # the evaluation.
        due = [e for e in self.evaluators if (e.is_due(step, self.num_steps) if step else e.at_start)]
        if due:
            began = time.perf_counter()
            score = self.evaluate(due, step, state["params"])
            if step > 0:
                rate(self.checkpoints, step, score)
            self.startup["evaluation"] = time.perf_counter() - began

    def _return_to_checkpoint(self, abstract: State, diverged: Diverged) -> tuple[State, int]:
        """The state of the newest checkpoint and its step; the data continues after the batch that diverged.

        As for PaLM (Chowdhery et al. 2022, section 5.1): a spike comes from certain batches meeting a certain state, so
        the batches between the checkpoint and the spike are left out too.

        Raises:
          UserError: `on_nan` forbids it, there is no checkpoint, or this one was returned to too often.
        """
        step = self.checkpoints.latest_step()
        advice = "a lower lr-fraction, in another --run-dir"
        if step is None:
            raise UserError(f"{diverged}, before the first checkpoint: start over with {advice}")
        folder = self.checkpoints.directory / str(step)
        check(
            self.on_nan == "skip",
            f"{diverged}: the last good checkpoint is {folder}; resume from it without the batches since then with "
            f"--on-nan=skip, or start over with {advice}",
        )
        self._returns[step] += 1
        check(
            self._returns[step] <= MAX_RETURNS,
            f"{diverged}, after resuming {MAX_RETURNS} times from {folder} with other batches: start over with "
            f"{advice}",
        )
        state, _ = self._restore(abstract, step)
        self.source.set_state(diverged.position)
        batches = diverged.step + 1 - step
        event = {"step": diverged.step, "back_to": step, "batches": batches, "why": str(diverged)}
        self.divergences = [*self.divergences, event]
        self.metrics.log(diverged.step, skipped_batches=batches, back_to=step)
        self.metrics.note(f"{diverged}: back to step {step:,}, without the {batches:,} batches since then")
        return state, step


class _DispatchedStep(NamedTuple):
    """A step that the devices compute, or have computed, and that is not yet logged."""

    step: int
    tokens: int
    results: dict[str, Any]  # on the devices
    extra: dict[str, float]  # metrics that came with the batch
    position: dict  # of the data, after its batch
    copy: State | None = None  # of the state after it, to be saved when its metrics have turned out good


class _Attempt:
    """Training from one state until the end of the stage, an interruption, or a divergence.

    `state` is the one after `step` steps, and `position` that of the data after their batches. While a step is being
    dispatched the three do not belong together, and `consistent` is false: the step takes the old state's buffers.
    """

    def __init__(self, loop: Loop, state: State, step: int, deferral: Deferral):
        self.loop, self.deferral, self.stop_flag = loop, deferral, StopFlag()
        self.state, self.step, self.position, self.consistent = state, step, loop.source.get_state(), True
        self.first = step
        self.dispatched: deque[_DispatchedStep] = deque()
        self.clock = time.perf_counter()  # when the time of the next step to be logged began
        self.rise: _DispatchedStep | None = None  # the first step of a spike; until it has ended nothing is saved
        self.owed = False  # a save that a spike has put off
        self.stop: Cause | None = None  # why the training is to end after this step

    def run(self) -> State:
        """Trains; whatever ends it early, what is worth saving is saved, or left in the newest checkpoint.

        Raises:
          Diverged, Interrupted, KeyboardInterrupt.
        """
        try:
            while self.step < self.loop.num_steps:
                self.one_step()
            return self.state
        except KeyboardInterrupt as error:  # Ctrl-C outside the program: in a notebook
            stopped = error if isinstance(error, Interrupted) else Interrupted(Cause.CTRL_C)
            raise Interrupted(stopped.cause, stopped.kept or self.save_after_interrupt()) from None
        except Diverged:
            raise
        except Exception:  # bad text, for example
            if self.has_unsaved_copy():
                with contextlib.suppress(Diverged):
                    self.log_dispatched()
            raise

    def one_step(self) -> None:
        """One step, from its batch to the evaluation after it."""
        loop = self.loop
        if loop.horizon is not None:
            loop.num_steps = loop.horizon(self.step)
        batch, extra = self.next_batch()
        self.dispatch(batch, extra)

        last = self.step == loop.num_steps
        save = last or self.owed or bool(loop.save_every and self.step % loop.save_every == 0)
        due = [e for e in loop.evaluators if e.is_due(self.step, loop.num_steps)]
        if self.deferral.alone:
            self.stop = self.stop or self.deferral.cause

        # While the devices compute this step, read and log the one before. This one is read too if the host has to
        # wait for its end anyway: to save, to evaluate, or to sample from its parameters, which takes long.
        self.log_dispatched(leave=0 if last or due or self.stop or loop.source.samples else 1)
        if save and self.dispatched and self.rise is None:
            save = not self.copy_for_later_save()
            self.owed = False
        if save or self.stop:
            self.log_dispatched()
            self.owed = self.rise is not None and not last  # the last state is the result: nobody can tell any more
            if not self.owed:
                loop.save(self.state, self.step, self.position)
        if self.stop:
            loop.checkpoints.wait()
            raise Interrupted(self.stop, "" if self.owed else f"step {self.step:,} saved")
        if due:  # after the save: an evaluation that fails loses nothing
            score = loop.evaluate(due, self.step, self.state["params"])
            if self.rise is None and rate(
                loop.checkpoints, self.step, score, saved=save, rereads=lambda: loop.rereads(self.position)
            ):
                loop.save(self.state, self.step, self.position)
        if save or due:
            self.clock = time.perf_counter()

    def next_batch(self) -> tuple[Batch, dict[str, float]]:
        began, samples = time.perf_counter(), self.loop.source.samples  # which looks for a request to end by itself
        with contextlib.nullcontext() if samples else stopping.interruptible():
            batch, extra = self.loop.source.next_batch(self.step, self.state["params"])
        return batch, {**extra, "input_seconds": time.perf_counter() - began}

    def dispatch(self, batch: Batch, extra: dict[str, float]) -> None:
        loop = self.loop
        self.consistent = False
        self.state, results = loop.step_fn(self.state, batch)
        self.position = loop.source.get_state()
        results = {**results, STOP: self.stop_flag(self.deferral.cause)}
        self.dispatched.append(_DispatchedStep(self.step, loop.source.tokens(batch), results, extra, self.position))
        self.step, self.consistent, self.deferral.unsaved = self.step + 1, True, True

    def log_dispatched(self, leave: int = 0) -> None:
        """Waits for dispatched steps and logs them until `leave` are left, or none if the training is to stop.

        Saves the copies of the state that belong to them.

        Raises:
          Diverged: a step, which is not logged.
        """
        while len(self.dispatched) > (0 if self.stop else leave):
            oldest = self.dispatched[0]
            results = {name: float(value) for name, value in jax.device_get(oldest.results).items()}
            now = time.perf_counter()
            # What a model samples has a loss of no meaning: its advantages decide the size.
            spikes = not self.loop.source.samples
            watch = self.loop._loss_watch
            fault = watch.fault(results["loss"], results["grad_norm"], spikes=spikes)
            if not watch.high:
                self.rise = None
            elif self.rise is None:
                self.rise = oldest._replace(copy=None)
                rises = f"loss {watch.high[0]:.2f} at step {oldest.step:,}, from at most {max(watch.recent):.2f} before"
                self.loop.metrics.note(f"{rises}: nothing is saved until it falls")
            if fault is not None:
                begun = self.rise or oldest
                raise Diverged(fault, begun.step, begun.position)
            self.loop.log_step(oldest.step, oldest.tokens, results, oldest.extra, now - self.clock)
            self.clock = now
            self.dispatched.popleft()  # only now: after an interruption above it is logged again
            self.stop = self.stop or cause_of(results[STOP])
            if oldest.copy is not None and self.rise is None:
                self.loop.save(oldest.copy, oldest.step + 1, oldest.position, is_copy=True)
            elif oldest.copy is not None:
                self.owed = True

    def copy_for_later_save(self) -> bool:
        """Copies the state on the devices, to be saved once the step's metrics are known; False if there is no room.

        Never at the first step: how much memory a step needs beside the copy is known only after one.
        """
        if not self.loop._first_step_logged:
            return False
        copy = self.loop.checkpoints.copy(self.state)
        self.dispatched[-1] = self.dispatched[-1]._replace(copy=copy)
        return copy is not None

    def has_unsaved_copy(self) -> bool:
        return any(step.copy is not None for step in self.dispatched)

    def save_after_interrupt(self) -> str:
        """Saves the state, unless it is lost because the interruption came while a step was dispatched.

        Returns which step was saved, in words; empty if none was.
        """
        if active():  # one of several processes cannot save alone
            return ""
        try:
            if self.consistent or self.has_unsaved_copy():
                self.log_dispatched()
        except Diverged:  # the state is of no use; the checkpoint before it is
            return ""
        saves = self.consistent and self.step > self.first and self.rise is None
        if saves:
            self.loop.save(self.state, self.step, self.position)
        self.loop.checkpoints.wait()
        return f"step {self.step:,} saved" if saves else ""


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
