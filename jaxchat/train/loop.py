"""The only training loop: pretraining, midtraining, SFT and RL all run through `train`.

The next step is dispatched before the last one's metrics are read, so that the device never waits for the host. Nor
does it for a save, if there is room for a copy of the state on the devices, and no evaluation is due.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from jaxchat.checkpoint import Checkpoints
from jaxchat.devices.launchers import Preempted
from jaxchat.devices.processes import Preemption, active, ctrl_c_later
from jaxchat.errors import check
from jaxchat.runs.metrics import Metrics, device_peak_flops
from jaxchat.train.divergence import Diverged, LossWatch
from jaxchat.train.step import Batch, State

MAX_RETURNS = 3  # to one checkpoint: what goes on diverging has more than bad batches
STOP = "stop"  # among a step's results: whether a process was asked to end
WORTH = {"bpb": -1.0, "reward_eval": 1.0}  # what tells a stage's best checkpoint, and whether more or less is better
Values = Iterable[tuple[str, Any]]


@runtime_checkable
class Source(Protocol):
    """Where batches come from. Supervised sources ignore the parameters; RL samples with them: `samples`."""

    samples = False

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch of this step, on the devices, and metrics to log with it."""
        ...

    def get_state(self) -> dict:
        """The position behind the last batch, as JSON; `set_state` goes on from there exactly."""
        ...

    def set_state(self, state: dict) -> None: ...

    def whole_state(self, state: dict) -> dict:
        """What can go on with any number of processes, from the state of this one; all processes call it together."""
        return state


@dataclass(frozen=True)
class Evaluator:
    """Runs every `every` steps, at the end, and, unless told otherwise, before step 0; yields (metric name, value)."""

    every: int
    run: Callable[[int, Any], Values]
    at_start: bool = True


class _Dispatched(NamedTuple):
    step: int
    tokens: int
    result: dict[str, Any]
    extra: dict[str, float]
    position: dict  # of the data, behind its batch
    copy: State | None = None  # of the state behind it, to be saved once its metrics are known to be good


@dataclass
class Loop:
    """What one stage's training consists of.

    `flops_per_token` gives the MFU, over `devices` of a known peak. Checkpoints are written every `save_every` steps
    (0: only at the end) and when the run is interrupted. After a divergence `on_nan` lets it stop, or go on from the
    newest one without the batches since then.
    """

    step_fn: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    source: Source
    num_steps: int
    metrics: Metrics
    checkpoints: Checkpoints
    schedule_values: Callable[[int], dict[str, float]]
    flops_per_token: float
    save_every: int = 0
    evaluators: tuple[Evaluator, ...] = ()
    on_nan: Literal["stop", "skip"] = "stop"
    meta: dict = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)  # the stage, in this sitting
    startup: dict[str, float] = field(default_factory=dict)  # what the first step had to wait for, in seconds
    train_seconds: float = 0.0  # of steps alone, over all sittings
    tokens: int = 0
    divergences: list[dict] = field(default_factory=list)  # step, back_to, batches left out, why
    _earlier: float = 0.0  # seconds of earlier sittings
    _watch: LossWatch = field(default_factory=LossWatch)
    _returns: Counter[int] = field(default_factory=Counter)  # to a checkpoint's step after a divergence
    _started: bool = False

    @property
    def seconds(self) -> float:
        """Of the stage, over all sittings: steps, compilation, evaluation, samples and checkpoints."""
        return self._earlier + time.perf_counter() - self.began

    def save(self, state: State, step: int, position: dict, is_copy: bool = False) -> None:
        """Writes the state behind `step` steps, or its copy, with the data position that belongs to it."""
        meta = {
            **self.meta,
            "num_steps": self.num_steps,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "tokens": self.tokens,
            "divergences": self.divergences,
            "recent_losses": list(self._watch.recent),
        }
        self.metrics.flush()  # a resume goes on from here: what was logged before must not be missing
        self.checkpoints.wait()
        data = self.source.whole_state(position)
        with ctrl_c_later():  # what is saved by half cannot be saved again
            self.checkpoints.save(step, state, data=data, meta=meta, is_copy=is_copy)

    def train(self, state: State) -> State:
        """Trains until `num_steps`, from the newest checkpoint if there is one; returns the final state.

        Raises:
          UserError: the loss diverges, and `on_nan` or the circumstances do not allow to go on; the checkpoint
            directory holds a run of another length.
          Preempted: after SIGTERM, at the next step's end, and the state was saved.
          KeyboardInterrupt: after the state was saved.
        """
        abstract = jax.tree.map(_abstract, state)
        self.checkpoints.prepare(abstract)
        start = self.checkpoints.latest_step()
        if start is not None:
            jax.tree.map(lambda x: x.delete(), state)  # the caller may keep it, and the memory is for the restored one
            state, meta = self._restore(abstract, start)
            self._earlier, self.train_seconds, self.divergences = (
                meta["seconds"],
                meta["train_seconds"],
                meta["divergences"],
            )
            if start < self.num_steps:
                self.metrics.note(f"resuming at step {start:,} of {self.num_steps:,}")
        start = start or 0
        with Preemption() as preemption:
            # After a save at the same step too: whoever stopped behind it may not have come to the evaluation.
            due = [e for e in self.evaluators if (self._due(e, start) if start else e.at_start)]
            evaluating = time.perf_counter()
            for evaluator in due:
                self._run_evaluator(evaluator, start, state["params"])
            if due:
                self.startup["evaluation"] = time.perf_counter() - evaluating
            try:
                while True:
                    try:
                        state = self._steps(state, start, preemption)
                        break
                    except Diverged as error:
                        diverged = error.with_traceback(None)  # which would keep the state, and its memory
                    state, start = self._go_back(abstract, diverged)
            finally:
                self.checkpoints.wait()  # whatever ends the training: with the program a save that was begun would end
        return state

    def _restore(self, abstract: State, step: int) -> tuple[State, dict]:
        state, position, meta = self.checkpoints.restore(abstract, step)
        check(
            meta["num_steps"] == self.num_steps,
            f"{self.checkpoints.directory} is of {meta['num_steps']} steps, not {self.num_steps}: the data or the "
            "settings have changed; use the old ones, or --fresh to begin anew",
        )
        self.source.set_state(position)
        self.tokens, self._watch = meta["tokens"], LossWatch(meta["recent_losses"])
        return state, meta

    def _go_back(self, abstract: State, diverged: Diverged) -> tuple[State, int]:
        """The state of the newest checkpoint and its step, with the data behind the batch that did the harm.

        As for PaLM (Chowdhery et al. 2022, section 5.1): a spike comes of batches that meet a certain state, so those
        before it are left out too.
        """
        step = self.checkpoints.latest_step()
        advice = "a lower lr-fraction, in another --run-dir"
        check(step is not None, f"{diverged}, before the first checkpoint: begin again with {advice}")
        folder = self.checkpoints.directory / str(step)
        check(
            self.on_nan == "skip",
            f"{diverged}: the last good checkpoint is {folder}; go on from there without the batches since then by "
            f"--on-nan=skip, or begin again with {advice}",
        )
        self._returns[step] += 1
        check(
            self._returns[step] <= MAX_RETURNS,
            f"{diverged}, after {MAX_RETURNS} times of other batches from {folder} on: begin again with {advice}",
        )
        state, _ = self._restore(abstract, step)
        self.source.set_state(diverged.position)
        batches = diverged.step + 1 - step
        event = {"step": diverged.step, "back_to": step, "batches": batches, "why": str(diverged)}
        self.divergences = [*self.divergences, event]
        self.metrics.log(diverged.step, skipped_batches=batches, back_to=step)
        self.metrics.note(f"{diverged}: back to step {step:,}, without the {batches:,} batches since then")
        return state, step

    def _steps(self, state: State, start: int, preemption: Preemption) -> State:
        """Trains from step `start` on."""
        # `state`, `step` and `position` belong together, except while `moving` from one step to the next. What
        # `pending` holds is dispatched and not yet logged.
        step, position, moving = start, self.source.get_state(), False
        pending: deque[_Dispatched] = deque()
        before, stopping = time.perf_counter(), False
        try:
            while step < self.num_steps:
                asked, preemption.waiting = time.perf_counter(), True
                batch, extra = self.source.next_batch(step, state["params"])
                preemption.waiting = False
                extra = {**extra, "input_seconds": time.perf_counter() - asked}
                moving = True
                state, result = self.step_fn(state, batch)
                position = self.source.get_state()
                result = {**result, STOP: preemption.flag()}
                pending.append(_Dispatched(step, batch["inputs"].size, result, extra, position))
                step, moving = step + 1, False
                done = step == self.num_steps
                save = done or (self.save_every and step % self.save_every == 0)
                due = [e for e in self.evaluators if self._due(e, step)]
                stopping = stopping or preemption.noted
                # Sampling waits for the step's end too, and takes long.
                left = 0 if done or due or stopping or self.source.samples else 1
                before, stopping = self._settle(pending, left, before, stopping)
                if save and pending and self._started:  # what a step needs beside the copy is known from one
                    copy = self.checkpoints.copy(state)
                    pending[-1], save = pending[-1]._replace(copy=copy), copy is None
                if save or stopping:  # first save, then evaluate: a failing evaluation loses nothing
                    before, stopping = self._settle(pending, 0, before, stopping)
                    self.save(state, step, position)
                if stopping:
                    self.checkpoints.wait()
                    raise Preempted(f"stopped by SIGTERM, step {step:,} saved; the same command goes on from there")
                for evaluator in due:
                    self._run_evaluator(evaluator, step, state["params"])
                if save or due:
                    before = time.perf_counter()
        except KeyboardInterrupt:
            # Of several processes, one alone cannot save: this is somebody's second Ctrl-C.
            if not active():
                try:
                    if not moving or _any_copy(pending):
                        before, _ = self._settle(pending, 0, before)
                except Diverged as diverged:  # the state is of no use; the checkpoint before is
                    raise KeyboardInterrupt from diverged
                if not moving and step > start:
                    self.metrics.note(f"interrupted: saving step {step:,}; the same command goes on from here")
                    self.save(state, step, position)
                self.checkpoints.wait()
            if preemption.noted:
                raise Preempted(f"stopped by SIGTERM at step {step:,}; the same command goes on from there") from None
            raise
        except Diverged:
            raise
        except Exception:  # bad text, for example: a save that was due is not lost
            if _any_copy(pending):
                with contextlib.suppress(Diverged):
                    self._settle(pending, 0, before)
            raise
        finally:
            preemption.waiting = False
        return state

    def _settle(
        self, pending: deque[_Dispatched], left: int, before: float, stopping: bool = False
    ) -> tuple[float, bool]:
        """Logs steps until so many are `left`, or none where the training is to stop, and saves the copies that come
        with them; returns as `_log`.

        Raises:
          Diverged: a step, which stays pending.
        """
        while len(pending) > (0 if stopping else left):
            before, told = self._log(pending[0], before)
            logged = pending.popleft()  # only now: an interruption above leaves it to be logged again
            stopping = stopping or told
            if logged.copy is not None:
                self.save(logged.copy, logged.step + 1, logged.position, is_copy=True)
        return before, stopping

    def _due(self, evaluator: Evaluator, step: int) -> bool:
        return step == self.num_steps or (evaluator.every > 0 and step % evaluator.every == 0)

    def _run_evaluator(self, evaluator: Evaluator, step: int, params) -> None:
        values = dict(evaluator.run(step, params))
        if values:
            self.metrics.log(step, **values)
        for name, sign in WORTH.items():
            if name in values and np.isfinite(values[name]):
                self.checkpoints.note_worth(step, sign * float(values[name]))

    def _log(self, dispatched: _Dispatched, before: float) -> tuple[float, bool]:
        """Waits for the metrics of a step and writes them; returns when they were there, and whether to stop."""
        step, batch_tokens, result, extra, position, _ = dispatched
        result = {name: float(value) for name, value in jax.device_get(result).items()}
        now = time.perf_counter()
        elapsed = now - before
        fault = self._watch.fault(result["loss"], result["grad_norm"])
        if fault is not None:
            raise Diverged(fault, step, position)
        values = {
            "loss": result["loss"],
            "grad_norm": result["grad_norm"],
            **self.schedule_values(step),
            "tokens": self.tokens + batch_tokens,
            "tokens_per_second": batch_tokens / elapsed,
            "step_seconds": elapsed,
            **extra,
        }
        peak = device_peak_flops(jax.devices()[0].device_kind)
        if peak:
            values["mfu"] = batch_tokens / elapsed * self.flops_per_token / (peak * jax.device_count())
        self.metrics.log(step, **values)
        # Last: an interruption above leaves the step unlogged as a whole, and it is logged again.
        self.train_seconds += elapsed
        self.tokens += batch_tokens
        if not self._started:
            self._started = True
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.startup.items())
            self.metrics.note(f"first step after {now - self.began:.1f} s{': ' if parts else ''}{parts}")
        self.metrics.live(step + 1, **values)
        return now, result[STOP] > 0


def _any_copy(pending: Iterable[_Dispatched]) -> bool:
    return any(dispatched.copy is not None for dispatched in pending)


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
