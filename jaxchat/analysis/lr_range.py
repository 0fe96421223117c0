"""The learning-rate range test: the rate of one parameter group rises until the loss suffers.

The groups are tested in turn, from the same fresh parameters and on the same batches of pretraining text: the rate of
one group rises from `low` to `high` by a constant factor per step, while the others stay at their configured rates. The
results are `lr_range.json` and `lr_range.png` in the run directory, and a tokenizer if there was none.

Source: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), arXiv:1506.01186, section 3.3.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxchat import stopping
from jaxchat.config import ScheduleConfig
from jaxchat.errors import check
from jaxchat.model.parameters import Group, groups_of
from jaxchat.runs.plots import RangeCurve, lr_range_plot
from jaxchat.runs.progress import LiveLine
from jaxchat.stages import tokenizer
from jaxchat.stages.pretrain import training_batches
from jaxchat.stages.training import Training, fresh_params
from jaxchat.stages.workspace import Workspace
from jaxchat.train.step import State, init_state

GROUPS: tuple[Group, ...] = ("matrix", "embedding", "head")  # that are tested; the others keep their rates
MIN_STEPS = 20
SPAN = 1000.0  # by default, rates from the configured one divided by this to the configured one times this
DIVERGED = 4.0  # times the lowest smoothed loss: a loss above that ends the test
RISEN = 1.1  # times the lowest smoothed loss: a smoothed loss above that has risen
START = 0.25  # of the steps: there the loss falls because of the other groups
JSON_NAME, PLOT_NAME = "lr_range.json", "lr_range.png"


class Factors(NamedTuple):
    """The number of updates so far, the factors that multiply each group's updates, and the optimizer's state."""

    count: Array
    table: Float[Array, "steps groups"]
    inner: Any


def with_factors(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
    """`optimizer` with each group's rate multiplied by a factor from the state, one per update, initially 1.

    A group's update is proportional to its rate, weight decay included. The factors are data, not code, so that one
    compiled step tests all groups.
    """

    def init(params):
        return Factors(jnp.zeros((), jnp.int32), jnp.ones((steps, len(GROUPS))), optimizer.init(params))

    def update(updates, state, params=None):
        updates, inner = optimizer.update(updates, state.inner, params)
        factors = dict(zip(GROUPS, state.table[state.count], strict=True))
        updates = jax.tree.map(lambda update, group: factors.get(group, 1.0) * update, updates, groups_of(updates))
        return updates, Factors(state.count + 1, state.table, inner)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Suggestion:
    """The rate to try, or None, and why; the rates where the loss is `lowest` and falls `steepest`, if any."""

    value: float | None
    why: str
    lowest: float | None = None
    steepest: float | None = None


@dataclass
class RangeTest:
    """The test of one group: `losses` (nats per token) at the first of `rates`, and why it stopped early, if it did."""

    group: str
    configured: float
    rates: np.ndarray
    losses: list[float] = field(default_factory=list)
    stopped: str | None = None

    @property
    def option(self) -> str:
        return f"--optimizer.{self.group}-lr"

    @property
    def diverged(self) -> bool:
        return self.stopped is not None and self.stopped != "interrupted"

    def suggest(self) -> Suggestion:
        if self.stopped == "interrupted":
            return Suggestion(None, "the test was interrupted")
        return suggest(self.rates, self.losses, diverged=self.diverged)

    def record(self) -> dict[str, Any]:
        """The test's entry in lr_range.json."""
        done, found = len(self.losses), self.suggest()
        return {
            "option": self.option,
            "configured": self.configured,
            "suggested": found.value,
            "why": found.why,
            "lowest_at": found.lowest,
            "steepest_at": found.steepest,
            "stopped": self.stopped,
            "rates": self.rates[:done].tolist(),
            "loss": self.losses,
            "smoothed": smooth(self.losses, len(self.rates)).tolist(),
        }


def smooth(losses: Sequence[float], steps: int) -> np.ndarray:
    """The exponential moving average over about a twentieth of `steps`, corrected for starting at 0.

    Source of the correction: Kingma and Ba, "Adam" (2014), section 3.
    """
    decay = 1 - MIN_STEPS / steps
    averages, average = [], 0.0
    for i, loss in enumerate(losses):
        average = decay * average + (1 - decay) * loss
        averages.append(average / (1 - decay ** (i + 1)))
    return np.array(averages)


def suggest(rates: np.ndarray, losses: Sequence[float], *, diverged: bool = False) -> Suggestion:
    """The rate to try, from the `losses` at the first of `rates` (which rise by a constant factor).

    It is a tenth of the rate at which the smoothed loss is lowest before it rises by a tenth (or diverges), or the rate
    at which the loss falls most steeply if that is smaller. These are the two usual readings of Smith's curve, and
    either alone is wrong here. A tenth of the lowest is far too high for the head, because nothing is learned until its
    rate is nearly right. For the other groups the steepest fall is the start of every training, which their test
    repeats while their rate is still close to zero: the first quarter of the steps is therefore ignored, and so is a
    fall that merely continues from there. If the loss does not rise, there is no suggestion: no rate in the range is
    too high.
    """
    smoothed, reach = smooth(losses, len(rates)), max(1, len(rates) // 30)
    lowest, risen = 0, diverged
    for i, loss in enumerate(smoothed):
        if loss < smoothed[lowest]:
            lowest = i
        elif loss > RISEN * smoothed[lowest]:
            risen = True
            break
    if not risen:
        return Suggestion(None, f"the loss does not rise up to {_rounded(rates[-1]):g}; keep the rate, or raise --max")
    if lowest == 0:
        return Suggestion(None, f"the loss does not fall above {_rounded(rates[0]):g}; try a lower --min")
    value, steepest = rates[lowest] / 10, None
    why = f"a tenth of {_rounded(rates[lowest]):g}, where the loss is lowest before it rises"
    # falls[j] is the fall over 2 * reach steps around step first + j.
    first = round(START * len(rates))
    around = smoothed[first - reach : lowest + 1]
    falls = around[: -2 * reach] - around[2 * reach :]
    if len(falls) and falls.max() > 0 and falls.argmax() > reach:
        steepest = rates[first + falls.argmax()]
        if steepest < value:
            value, why = steepest, "where the loss falls most steeply"
    if value < rates[0]:
        why += f"; it is below the range: try a --min lower than {_rounded(rates[0]):g}"
    return Suggestion(_rounded(value), why, _rounded(rates[lowest]), steepest and _rounded(steepest))


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def run(
    workspace: Workspace, steps: int, low: float | None, high: float | None, groups: Sequence[str]
) -> list[RangeTest]:
    """Tests `groups`, writes the results to the run directory and prints the suggestions.

    Args:
      low, high: the first and last rate; by default the configured rate divided by 1000 and times 1000.

    Raises:
      UserError: there are too few steps, or the rates are not above 0 or do not rise; as the tokenizer stage.
      KeyboardInterrupt: once the measurements so far are written.
    """
    check(steps >= MIN_STEPS, f"--steps is {steps}; it must be at least {MIN_STEPS}")
    tests = [_planned(workspace, group, steps, low, high) for group in groups]
    if not workspace.finished("tokenizer"):
        workspace.begin("tokenizer")
        tokenizer.run(workspace)
    device = jax.devices()[0]
    tokens = workspace.experiment.pretrain.batch_tokens
    workspace.say(
        f"lr-range  {', '.join(groups)}: {steps:,} steps each of {tokens:,} tokens on "
        f"{jax.device_count()} x {device.device_kind}"
    )
    done: list[RangeTest] = []
    line = LiveLine("lr-range", steps * len(tests)) if jax.process_index() == 0 else None
    try:
        fresh_state, step_fn, source = _prepare(workspace, steps)
        start = source.get_state()
        with stopping.deferred(alone=jax.process_count() == 1):
            for i, test in enumerate(tests):
                source.set_state(start)
                done.append(test)
                measure(test, fresh_state(_table(test)), step_fn, source, _shower(line, i * steps))
                _write(workspace, done)
                if line:
                    line.show_note(f"{test.group}: {_outcome(test)}")
    except KeyboardInterrupt:
        for test in done:
            if test.stopped is None and len(test.losses) < steps:
                test.stopped = "interrupted"
        done = [test for test in done if test.losses]
        if done:
            _write(workspace, done)
            workspace.say(
                f"lr-range  interrupted; the measurements so far are in {workspace.directory.path / JSON_NAME}"
            )
        raise
    finally:
        if line:
            line.close()
    _say(workspace, done)
    return done


def _planned(workspace: Workspace, group: str, steps: int, low: float | None, high: float | None) -> RangeTest:
    configured = getattr(workspace.experiment.optimizer, f"{group}_lr")
    first: float = configured / SPAN if low is None else low
    last: float = configured * SPAN if high is None else high
    check(0 < first < math.inf, f"--min is {first:g}; a learning rate must be above 0")
    check(first < last < math.inf, f"the {group} rate cannot rise from --min {first:g} to --max {last:g}")
    return RangeTest(group, configured, np.geomspace(first, last, steps))


def _prepare(workspace: Workspace, steps: int):
    """A function from a table of factors to a state at step 0, the compiled step, and the batches of pretraining."""
    experiment, tokens = workspace.experiment, workspace.tokenizer()
    model = workspace.model_config(tokens)
    constant = dataclasses.replace(experiment.pretrain, schedule=ScheduleConfig(warmup_ratio=0.0, decay_ratio=0.0))
    training = Training(workspace, "pretrain", constant, model, tokens, steps)
    training.optimizer = optimizer = with_factors(training.optimizer, steps)
    batches = training_batches(workspace, tokens, workspace.text())
    state, step_fn = training.compiled(lambda: fresh_params(workspace, model), batches)
    placed = jax.tree.map(lambda x: x.sharding, state)
    del state  # the step donates its state, so that each test needs a new one
    init = jax.jit(lambda params: init_state(params, optimizer), out_shardings=placed)

    def fresh_state(table: np.ndarray) -> State:
        state = init(fresh_params(workspace, model))
        table = jax.device_put(table.astype(np.float32), placed["opt_state"].table)
        return {**state, "opt_state": state["opt_state"]._replace(table=table)}

    return fresh_state, step_fn, batches


def _table(test: RangeTest) -> np.ndarray:
    table = np.ones((len(test.rates), len(GROUPS)))
    table[:, GROUPS.index(test.group)] = test.rates / test.configured
    return table


def measure(test: RangeTest, state: State, step_fn, source, show: Callable[[int, RangeTest], None]) -> None:
    """Trains through the rates of `test` and records the losses until one diverges."""
    steps, waiting = len(test.rates), None
    for step in range(steps + 1):
        dispatched = None
        stopping.raise_if_asked()
        if step < steps:  # before the previous loss is read, so that the device never waits
            with stopping.interruptible():
                batch, _ = source.next_batch(step, state["params"])
            state, metrics = step_fn(state, batch)
            dispatched = metrics["loss"]
        if waiting is not None:
            loss = float(waiting)
            if not math.isfinite(loss):
                test.stopped = f"loss {loss} at a rate of {_rounded(test.rates[step - 1]):g}"
                return
            best = min(smooth(test.losses, steps), default=math.inf)
            test.losses.append(loss)
            show(step, test)
            if loss > DIVERGED * best:
                test.stopped = (
                    f"loss above {DIVERGED:g} times the lowest at a rate of {_rounded(test.rates[step - 1]):g}"
                )
                return
        waiting = dispatched


def _shower(line: LiveLine | None, before: int) -> Callable[[int, RangeTest], None]:
    """A function that shows a step of a test; `before` is the number of steps of earlier tests."""

    def show(step: int, test: RangeTest) -> None:
        if line:
            line.update(before + step, {"loss": test.losses[-1]})

    return show


def _outcome(test: RangeTest) -> str:
    smoothed = smooth(test.losses, len(test.rates))
    if not len(smoothed):
        return test.stopped or "nothing measured"
    lowest = f"lowest loss {smoothed.min():.3f} at {_rounded(test.rates[smoothed.argmin()]):g}"
    return f"{lowest}; stopped: {test.stopped}" if test.stopped else lowest


def _write(workspace: Workspace, tests: list[RangeTest]) -> None:
    if jax.process_index() != 0:
        return
    experiment = workspace.experiment
    record = {
        "experiment": experiment.name,
        "steps": len(tests[0].rates),
        "batch_tokens": experiment.pretrain.batch_tokens,
        "optimizer": dataclasses.asdict(experiment.optimizer),
        "model": dataclasses.asdict(experiment.model),
        "groups": {test.group: test.record() for test in tests},
    }
    (workspace.directory.path / JSON_NAME).write_text(json.dumps(record, indent=2) + "\n")
    curves = []
    for test in tests:
        smoothed = smooth(test.losses, len(test.rates))
        value = test.suggest().value
        curves.append(RangeCurve(test.group, test.rates, test.losses, smoothed, test.configured, value))
    (workspace.directory.path / PLOT_NAME).write_bytes(lr_range_plot(curves))


def _say(workspace: Workspace, tests: list[RangeTest]) -> None:
    """Prints the table of suggestions and the options to pass."""
    workspace.say(f"\n{'group':<11}{'configured':>11}{'suggested':>11}  why")
    options = []
    for test in tests:
        found = test.suggest()
        value = "none" if found.value is None else f"{found.value:g}"
        workspace.say(f"{test.group:<11}{test.configured:>11g}{value:>11}  {found.why}")
        if found.value is not None:
            options.append(f"{test.option}={found.value:g}")
    if options:
        workspace.say(f"\nto train with them: {' '.join(options)}")
    workspace.say(f"curves:             {workspace.directory.path / PLOT_NAME}")
