"""What the stages that train share: their batches on the mesh, the optimizer, the loop, and the record."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from jaxchat.config import SupervisedConfig, TrainConfig
from jaxchat.data.positions import epoch, join_positions, totals
from jaxchat.devices.mesh import batch_share, put_batch
from jaxchat.devices.processes import exchange
from jaxchat.errors import check
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, init_params
from jaxchat.model.parameters import shardings
from jaxchat.ops.compute import for_training
from jaxchat.optim.optimizer import learning_rates, make_optimizer
from jaxchat.optim.schedules import matrix_decay, momentum_follows_length, multiplier, muon_momentum
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.report_page import describe_data, describe_turn
from jaxchat.stages.pacing import Paced, horizon_of, timed
from jaxchat.stages.samples import Prompt, continuations
from jaxchat.stages.step_choice import choose_plan, keep_choice
from jaxchat.stages.workspace import Workspace
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.budget import BatchPlan, flops_per_token
from jaxchat.train.choice import Choice
from jaxchat.train.horizon import Horizon
from jaxchat.train.loop import Evaluator, Loop, Source
from jaxchat.train.loss import Objective
from jaxchat.train.memory import (
    CompiledStep,
    PlannedStep,
    TrainStep,
    bytes_per_device,
    levels,
    plan_step,
    usable_memory,
)
from jaxchat.train.phases import Phases
from jaxchat.train.selection import find_turn
from jaxchat.train.step import MICRO_BATCH_SPEC, AbstractBatch, Batch, State, abstract_batch, init_state

StepFunction = Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]


class Batches(Source):
    """The batches of a loader, put on the mesh as `[accumulation, rows, T]`."""

    def __init__(self, workspace: Workspace, plans: tuple[BatchPlan, ...], iterator: Iterator[dict[str, np.ndarray]]):
        self.workspace, self.plans, self.plan, self.iterator = workspace, plans, plans[0], iterator

    def next_batch(self, step: int, params) -> tuple[Batch, dict[str, float]]:
        rows = next(self.iterator)
        return {name: self._put(array) for name, array in rows.items()}, {}

    def _put(self, array: np.ndarray) -> jax.Array:
        # Successive rows go to different micro-batches, which makes each micro-batch the same for any number of
        # processes that read a part of it.
        parts = array.reshape(-1, self.plan.accumulation, array.shape[-1]).swapaxes(0, 1)
        return put_batch(self.workspace.mesh, parts, MICRO_BATCH_SPEC)

    def abstract(self, plan: BatchPlan) -> AbstractBatch:
        """What `next_batch` returns with `plan`, as ShapeDtypeStructs."""
        length = self.workspace.experiment.model.sequence_len
        return abstract_batch(self.workspace.mesh, (plan.accumulation, plan.rows, length))

    def get_state(self) -> dict:
        return self.iterator.get_state()  # pyright: ignore[reportAttributeAccessIssue]

    def set_state(self, state: dict) -> None:
        self.iterator.set_state(state)  # pyright: ignore[reportAttributeAccessIssue]

    def whole_state(self, state: dict) -> dict:
        return join_positions([json.loads(own) for own in exchange(json.dumps(state))])


@dataclass
class Training:
    """The training of one stage.

    It has `num_steps` steps, unless the run has a budget of time: then `horizon` finds their number while it trains.
    `parent` is the stage and step whose parameters it starts from, as stage.json records it; None for fresh ones.
    `knows_data` tells that the parent was trained on some of this stage's data. `objective` is that of the step; None
    for cross-entropy. `phases` of pretraining change what its steps do. With a `horizon` of the caller's, rates,
    momentum and decay come with the batches, so that trainings that differ in these alone run the same program.
    """

    workspace: Workspace
    stage: str
    config: TrainConfig
    model: GPTConfig
    tokenizer: BaseTokenizer
    num_steps: int
    parent: dict | None = None
    knows_data: bool = False
    objective: Objective | None = None
    phases: Phases | None = None
    horizon: Horizon | None = None

    def __post_init__(self):
        workspace, phases = self.workspace, self.phases
        self.horizon = self.horizon or horizon_of(workspace, self.stage, self.config.schedule)
        schedules = self._schedules(self.num_steps) if self.horizon is None else {}
        self.schedule: Any = multiplier(self.config.schedule, self.num_steps)
        if phases is not None and phases.grows:
            self.schedule = lambda step: phases(step).rate  # of Python ints: the rates come with the batches
        # Whether rates come with the batches, the stage's fraction included.
        with_batches = self.horizon is not None or (phases is not None and phases.grows)
        self.optimizer: optax.GradientTransformation = make_optimizer(
            workspace.experiment.optimizer,
            self.model,
            optax.constant_schedule(1.0) if with_batches else self.schedule,
            lr_fraction=1.0 if with_batches else self.config.lr_fraction,
            momentum=schedules.get("muon_momentum"),
            decay=schedules.get("muon_decay"),
            mesh=workspace.mesh,
            newton_schulz_dtype=workspace.compute.dtype,
        )
        self.compute = for_training(workspace.experiment, workspace.mesh)
        if self.objective is not None:  # its samples come from an engine, which does not compute in fp8
            self.compute = dataclasses.replace(self.compute, fp8=False)
        self.startup: dict[str, float] = {}  # seconds of tracing and compiling the step
        self.choice: Choice | None = None  # of the step that was compiled last

    def engine(self, params, drawn: int | None = None) -> Engine:
        return Engine(self.model, params, self.tokenizer, dtype=self.workspace.compute.dtype, drawn=drawn)

    def sampler(self, metrics: Metrics, prompts: list[Prompt]) -> Evaluator:
        """Logs what the model writes after `prompts`, every `sample_every` steps and at the end."""

        def write_samples(step: int, params):
            for prompt, text in continuations(self.engine(params), prompts):
                metrics.sample(step, prompt.text, text, seed=prompt.seed)
            return ()

        return Evaluator(self.config.sample_every, write_samples, at_start=False)

    def paced(self, source: Source, horizon: Horizon) -> Paced:
        """The batches of `source` with what follows from the number of steps: rates, momentum, decay."""
        return Paced(source, horizon, self.workspace, self.config.lr_fraction, self._schedules)

    def prepare(self, start: Callable[[], Any]) -> tuple[State, StepFunction]:
        """The state at step 0, laid out on the mesh, and the jitted step.

        With `remat` "auto" nothing is recomputed: only `compiled` knows what fits into memory.
        """
        planned, remat = self._planned(start), self.workspace.experiment.remat
        return self.begin(start, planned.state), planned.make("none" if remat == "auto" else remat)

    def compiled(self, start: Callable[[], Any], source: Source) -> tuple[State, TrainStep]:
        """The state at step 0, laid out on the mesh, and the step that fits into memory.

        `start` returns the parameters, which are taken over. The step is compiled first, while no arrays take up
        memory, for as many of the source's rows at once as fit.

        Raises:
          UserError: no step fits into memory.
        """
        planned, remat = self._planned(start), self.workspace.experiment.remat
        limit = usable_memory(self.config.device_rows == "auto", bytes_per_device(planned.state["params"]))
        limit = self.workspace.within(limit)
        step = TrainStep(planned, levels(remat, self.workspace.mesh), limit, self._accept)
        choose_plan(self.workspace, self.stage, step, source)
        chosen = self.choice
        for batch in source.others():
            step.compile(batch)
        self.choice = chosen  # it says the rows of all, and is the one that a later start compiles first
        return self.begin(start, planned.state), step

    def begin(self, start: Callable[[], Any], abstract: State) -> State:
        """The state at step 0, laid out on the mesh as `abstract` is."""
        # The parameters are donated, not copied: a copy would keep the parent's parameters until the stage ends.
        placed = jax.tree.map(lambda x: x.sharding, abstract)
        return jax.jit(lambda params: init_state(params, self.optimizer), out_shardings=placed, donate_argnums=0)(
            start()
        )

    def _planned(self, start: Callable[[], Any]) -> PlannedStep:
        params = jax.eval_shape(start)
        return plan_step(self.model, self.optimizer, params, self.compute, self.objective)

    def _accept(self, step: CompiledStep) -> None:
        """Tells the user what was chosen, if anything was; explicit settings are used even if they do not fit."""
        for name, spent in step.seconds.items():
            self.startup[name] = self.startup.get(name, 0.0) + spent
        auto = "auto" in (self.workspace.experiment.remat, self.config.device_rows)
        if auto and step.limit is not None:
            check(step.fits, step.too_large(self.stage))
            self.workspace.say_once(f"{self.stage:<9} {step}")
        self.choice = step.choice

    def train(
        self,
        start: Callable[[], Any],
        source: Source,
        evaluators: Callable[[Metrics], tuple[Evaluator, ...]],
        *,
        watch: Callable[[Metrics, dict[str, float]], None] = lambda metrics, values: None,
        at_end: Callable[[], dict[str, Any]] = dict,
        **facts,
    ) -> None:
        """Runs the loop to its end and marks the stage as finished.

        Args:
          start: returns the parameters of step 0, which are taken over.
          evaluators: from the stage's log to what is evaluated on the way.
          watch: is given the metrics of each step when they are logged.
          at_end: gives facts that are known when the training has ended.
          facts: more for stage.json.

        Raises:
          UserError: as `Loop.train` and `compiled`.
        """
        workspace, began, clock = self.workspace, time.time(), time.perf_counter()
        schedule: Any = self.schedule
        horizon = self.horizon
        if horizon is not None:
            source, schedule = self.paced(source, horizon), horizon.rates.__getitem__
        state, step_fn = self.compiled(start, source)
        if self.choice is not None:
            keep_choice(workspace, self.stage, self.choice)
        optimizer, flops = workspace.experiment.optimizer, functools.cache(flops_per_token)
        rates = learning_rates(optimizer, self.model, schedule, lr_fraction=self.config.lr_fraction)
        with workspace.metrics(self.stage, self.num_steps if horizon is None else None) as metrics:
            evaluated = evaluators(metrics)
            if horizon is not None:
                evaluated, horizon.on_change = timed(evaluated, horizon), metrics.expect
            loop = Loop(
                step_fn=step_fn,
                source=source,
                num_steps=self.num_steps,
                metrics=metrics,
                checkpoints=workspace.checkpoints(self.stage),
                schedule_values=lambda step: {name: float(rate) for name, rate in rates(step).items()},
                flops_per_token=lambda step: flops(self._model_at(step)),
                save_every=self.config.save_every,
                evaluators=evaluated,
                watch=lambda values: watch(metrics, values),
                on_nan=workspace.experiment.on_nan,
                startup=self.startup,
                rereads=lambda position: self.knows_data or epoch(position) > 0,
                same_course=self._same_course,
                horizon=horizon,
                began=clock,
                meta={"stage": self.stage, "parent": self.parent, "config": dataclasses.asdict(workspace.experiment)},
            )
            loop.train(state)
            facts |= self._result(loop)
            loop.checkpoints.close()
        facts |= self._data_facts(source.whole_state(source.get_state())) | at_end()
        if horizon is not None and horizon.steps == horizon.most:
            why = "to read its data more often would teach nothing"
            workspace.say(f"{self.stage:<9} ends before its time is up: {why}")
        if line := describe_data(facts):
            workspace.say(f"{self.stage:<9} {line}")
        workspace.finish(
            self.stage,
            parent=self.parent,
            steps=loop.num_steps,
            tokens=loop.tokens,
            seconds=loop.seconds,
            train_seconds=loop.train_seconds,
            started=began,
            divergences=loop.divergences,
            **self._how(),
            **facts,
        )

    def _result(self, loop: Loop) -> dict[str, Any]:
        """Which step is the stage's result, with a line for the user if it is not the last.

        In RL it is: rewards of a few hundred sampled answers differ by chance more than neighbouring steps do.
        """
        supervised = isinstance(self.config, SupervisedConfig)
        turn = find_turn(loop.checkpoints, loop.num_steps) if supervised else None
        if turn is None:
            return {"result_step": loop.num_steps}
        facts = {"result_step": turn.step, "turned": {"bpb": turn.bpb, "bpb_at_end": turn.bpb_at_end}}
        more = "more conversations"
        if self.stage == "pretrain":
            more = "more text, --sizes=auto" if self.workspace.experiment.sizes == "fixed" else "more text"
        remedy = f"{more} or --{self.stage}.num-iterations={turn.step} would do better"
        self.workspace.say(f"{self.stage:<9} {describe_turn(facts)}; {remedy}")
        return facts

    def _schedules(self, num_steps: int) -> dict[str, optax.Schedule]:
        """Muon's momentum and weight decay in a training of so many steps, as far as they depend on these."""
        optimizer = self.workspace.experiment.optimizer
        schedules: dict[str, optax.Schedule] = {}
        if momentum_follows_length(optimizer):
            schedules["muon_momentum"] = muon_momentum(optimizer, self.config.schedule, num_steps)
        if optimizer.matrix_weight_decay:
            schedules["muon_decay"] = matrix_decay(optimizer, num_steps)
        return schedules

    def _model_at(self, step: int) -> GPTConfig:
        return self.model if self.phases is None else dataclasses.replace(self.model, reach=self.phases(step).reach)

    def _same_course(self, done: int, num_steps: int) -> bool:
        """Whether the first `done` of `num_steps` steps go as in this training: rates, momentum, decay, phases."""

        def course(total: int) -> list[np.ndarray]:
            schedules = multiplier(self.config.schedule, total), *self._schedules(total).values()
            return [np.asarray(schedule(np.arange(done))) for schedule in schedules]

        if self.phases is not None:
            other = dataclasses.replace(self.phases, num_steps=num_steps)
            if done > self.num_steps or any(other(step) != self.phases(step) for step in range(done)):
                return False
        here = zip(course(num_steps), course(self.num_steps), strict=True)
        return done <= self.num_steps and all(np.array_equal(before, now) for before, now in here)

    def _how(self) -> dict[str, Any]:
        """How the steps were computed, for stage.json."""
        return {} if self.choice is None else {"device_rows": self.choice.device_rows, "remat": self.choice.remat}

    def _data_facts(self, state: dict) -> dict[str, Any]:
        """From the loader's position: how full the rows were, and what was left out of the text."""
        counts = totals(state)
        packed = counts["packed"]
        facts: dict[str, Any] = {"left_out": counts["left_out"]} if counts["left_out"] else {}
        if packed.get("rows"):
            facts["packing"] = {**packed, "utilisation": packed["targets"] / packed["rows"] / self.model.sequence_len}
        return facts


def fresh_params(workspace: Workspace, model: GPTConfig) -> Params:
    """New parameters drawn from the experiment's seed, laid out on the mesh."""
    params = init_params(model, jax.random.key(workspace.experiment.seed))
    return jax.device_put(params, shardings(workspace.mesh, params))


def random_batches(workspace: Workspace, model: GPTConfig) -> Batches:
    """Batches of pretraining's shape with uniformly random tokens, for measurements that need no text."""
    plans = workspace.batch_plans(workspace.experiment.pretrain)
    draw = np.random.default_rng(workspace.experiment.seed)
    shape = (plans[0].rows * plans[0].accumulation // batch_share(workspace.mesh)[1], model.sequence_len + 1)

    def rows():
        while True:
            tokens = draw.integers(0, model.vocab_size, shape, np.int32)
            yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    return Batches(workspace, plans, rows())
