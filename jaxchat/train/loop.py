"""The only training loop: pretraining, midtraining, SFT and RL all run through `train`.

The next step is dispatched before the last one's metrics are read, so that the device never waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import UserError, check
from jaxchat.metrics import Metrics, device_peak_flops
from jaxchat.train.step import Batch, State

Values = Iterable[tuple[str, Any]]


@runtime_checkable
class Source(Protocol):
    """Where batches come from. Supervised sources ignore the parameters; RL samples with them."""

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        """The batch of this step, on the devices, and metrics to log with it."""
        ...

    def get_state(self) -> dict:
        """The position behind the last batch, as JSON; `set_state` goes on from there exactly."""
        ...

    def set_state(self, state: dict) -> None: ...


@dataclass(frozen=True)
class Evaluator:
    """Runs every `every` steps, at the end, and, unless told otherwise, before step 0; yields (metric name, value)."""

    every: int
    run: Callable[[int, Any], Values]
    at_start: bool = True


@dataclass
class Loop:
    """What one stage's training consists of.

    `flops_per_token` gives the MFU, over `devices` of a known peak. Checkpoints are written every `save_every` steps
    (0: only at the end) and when the run is interrupted.
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
    meta: dict = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)  # the stage, in this sitting
    startup: dict[str, float] = field(default_factory=dict)  # what the first step had to wait for, in seconds
    train_seconds: float = 0.0  # of steps alone, over all sittings
    tokens: int = 0
    _earlier: float = 0.0  # seconds of earlier sittings
    _started: bool = False

    @property
    def seconds(self) -> float:
        """Of the stage, over all sittings: steps, compilation, evaluation, samples and checkpoints."""
        return self._earlier + time.perf_counter() - self.began

    def save(self, state: State, step: int, position: dict) -> None:
        """Writes the state behind `step` steps, with the data position that belongs to it."""
        spent = {"seconds": self.seconds, "train_seconds": self.train_seconds, "tokens": self.tokens}
        meta = {**self.meta, **spent, "num_steps": self.num_steps}
        self.checkpoints.save(step, state, data=position, meta=meta)

    def train(self, state: State) -> State:
        """Trains until `num_steps`, from the newest checkpoint if there is one; returns the final state.

        Raises:
          UserError: the loss is not a number; the checkpoint directory holds a run of another length.
          KeyboardInterrupt: after the state was saved.
        """
        start = self.checkpoints.latest_step()
        if start is not None:
            abstract = jax.tree.map(_abstract, state)
            jax.tree.map(lambda x: x.delete(), state)  # the caller may keep it, and the memory is for the restored one
            state, data, meta = self.checkpoints.restore(abstract, start)
            check(
                meta["num_steps"] == self.num_steps,
                f"{self.checkpoints.directory} is of {meta['num_steps']} steps, not {self.num_steps}: the data or the "
                "settings have changed; use the old ones, or --fresh to begin anew",
            )
            self.source.set_state(data)
            self._earlier, self.train_seconds, self.tokens = meta["seconds"], meta["train_seconds"], meta["tokens"]
            if start < self.num_steps:
                self.metrics.note(f"resuming at step {start:,} of {self.num_steps:,}")
        start = start or 0
        # `state`, `step` and `position` belong together, except while `moving` from one step to the next. What
        # `pending` holds is dispatched and not yet logged.
        step, position, moving = start, self.source.get_state(), False
        pending, before = [], time.perf_counter()
        try:
            if start in (0, self.num_steps):  # the latter: stopped after the last step, before the evaluation
                evaluating = time.perf_counter()
                for evaluator in self.evaluators:
                    if start or evaluator.at_start:
                        self._run_evaluator(evaluator, start, state["params"])
                self.startup["evaluation"] = time.perf_counter() - evaluating
            before = time.perf_counter()
            while step < self.num_steps:
                batch, extra = self.source.next_batch(step, state["params"])
                moving = True
                state, result = self.step_fn(state, batch)
                pending.append((step, batch["inputs"].size, result, extra))
                step, position, moving = step + 1, self.source.get_state(), False
                done = step == self.num_steps
                save = done or (self.save_every and step % self.save_every == 0)
                due = [e for e in self.evaluators if done or (e.every and step % e.every == 0)]
                while len(pending) > (0 if save or due else 1):
                    before = self._log(*pending[0], before)
                    pending.pop(0)
                if save or due:
                    if save:  # first save, then evaluate: a failing evaluation loses nothing
                        self.save(state, step, position)
                    for evaluator in due:
                        self._run_evaluator(evaluator, step, state["params"])
                    before = time.perf_counter()
        except KeyboardInterrupt:
            if not moving and step > start:
                for dispatched in pending:
                    before = self._log(*dispatched, before)
                self.metrics.note(f"interrupted: saving step {step:,}; the same command goes on from here")
                self.save(state, step, position)
                self.checkpoints.wait()
            raise
        self.checkpoints.wait()
        return state

    def _run_evaluator(self, evaluator: Evaluator, step: int, params) -> None:
        values = dict(evaluator.run(step, params))
        if values:
            self.metrics.log(step, **values)

    def _log(self, step: int, batch_tokens: int, result, extra: dict[str, float], before: float) -> float:
        """Waits for the metrics of `step`, writes them; returns the time at which they were there."""
        result = {name: float(value) for name, value in jax.device_get(result).items()}
        now = time.perf_counter()
        elapsed = now - before
        bad = next((name for name in ("loss", "grad_norm") if not np.isfinite(result[name])), None)
        if bad is not None:
            folder = self.checkpoints.directory.parent
            raise UserError(
                f"{bad} is {result[bad]} at step {step}: move {folder} away and start again with a lower lr-fraction"
            )
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
        return now


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
