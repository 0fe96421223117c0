"""A run's budget: how fast the devices train is measured before it, and sizes and lengths follow from the time."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxchat.checkpoint import Checkpoints
from jaxchat.config import LENGTHS, Experiment
from jaxchat.config.amount import Amount
from jaxchat.devices.mesh import data_shards, make_mesh
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import check
from jaxchat.planning.known_text import find_amount
from jaxchat.planning.settle import Say, replace_fields, settle, training_speed
from jaxchat.planning.text_amount import TextAmount
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.time_budget import TimeBudget, read_record, resumed
from jaxchat.stages.pacing import Paced
from jaxchat.stages.training import Training, fresh_params, random_batches
from jaxchat.stages.workspace import Workspace, planned_model
from jaxchat.train.budget import flops_per_token
from jaxchat.train.horizon import UNKNOWN

STEPS_OF = 0.85  # of a training stage's time; the rest goes to compiling, evaluations, samples and saves
MEASURED = 0.01  # of the budget, that measuring may take after the first step
MEASURED_STEPS = 8
EVALUATIONS = 5  # of a stage that trains, besides those before and after it
EVALUATED = 50  # tokens of training for each token of an evaluation
PASS_K = 2  # samples of each question of an evaluation in reinforcement learning, at most
LEAST_QUESTIONS = 16  # of such an evaluation, which otherwise asks for one answer for each of the stage's seconds
TOKENIZER_CHARS = 2e6  # characters a second, at least, that a tokenizer is trained on
STEPS = tuple(f"{stage}.num_iterations" for stage in LENGTHS)
# What the budget decides of a new run's settings, besides its sizes: first what decides what the stages make, to which
# the run keeps; then what is measured on the way, to which it keeps as long as it has a budget.
KEPT = (*STEPS, "tokenizer.max_chars")
FITTED = (
    *(f"{stage}.{name}" for stage in ("pretrain", "midtrain", "sft") for name in ("eval_tokens", "eval_every")),
    *("pretrain.core_every", "midtrain.tasks", "sft.tasks", "rl.eval_questions", "rl.pass_k"),
    *("evaluate.core", "evaluate.limit"),
)


def keep_lengths(experiment: Experiment, begun: RunDirectory, given: Collection[str], *, budgeted: bool) -> Experiment:
    """`experiment` with what a budget has decided for a run that goes on; as it is if the run never had a budget.

    Args:
      given: the fields that the user has set, such as `sft.epochs`, which stay.
      budgeted: whether it goes on with a budget.

    Raises:
      UserError: as `read_record` and `RunDirectory.read_config`.
    """
    if read_record(begun.path) is None or not begun.config_file.exists():
        return experiment
    before = dataclasses.asdict(begun.read_config())
    fixed = {f"{stage}.num_iterations" for stage in stages_with_length(given)}
    names = [name for name in (*KEPT, *(FITTED if budgeted else ())) if name not in {*given, *fixed}]
    split = ((name, *name.split(".")) for name in names)
    kept = {name: before[section][field] for name, section, field in split}
    if not budgeted:
        kept |= {name: steps for name, steps in _steps_begun(begun).items() if name in kept}
    return replace_fields(experiment, kept)


def _steps_begun(run: RunDirectory) -> dict[str, int]:
    """The steps that unfinished stages were to have when they were stopped, which are no longer those of the estimate.

    What has had a part of its learning rates must end as it was begun.
    """
    found = {}
    for stage in LENGTHS:
        meta = None if run.finished(stage) else Checkpoints(run.checkpoints(stage)).read_meta()
        steps = (meta or {}).get("num_steps", UNKNOWN)
        if steps != UNKNOWN:  # before the pace was measured, the estimate was better
            found[f"{stage}.num_iterations"] = steps
    return found


def stages_with_length(given: Collection[str]) -> frozenset[str]:
    """The stages whose length the user has set."""
    return frozenset(s for s, names in LENGTHS.items() if not {f"{s}.{name}" for name in names}.isdisjoint(given))


def open_budget(
    experiment: Experiment,
    amount: Amount,
    begun: RunDirectory | None,
    *,
    given: Collection[str] = (),
    redo: Collection[str] = (),
    began: float,
) -> TimeBudget:
    """The budget of a start: the whole of it for a new run, what is left of it for one that goes on.

    All processes must call it.

    Args:
      given: the fields that the user has set, such as `sft.epochs`.
      redo: stages that are to be done again.
      began: when this process began, by `time.monotonic`.

    Raises:
      UserError: it is too short for the stages; it is a price, but the devices cost nothing.
    """
    cost = experiment.cost
    seconds = amount.seconds_on(jax.device_count(), cost.dollars_per_device_hour)

    def done() -> list[str]:
        again = [] if begun is None else begun.following(redo)
        return [s for s in experiment.stages if begun is not None and s not in again and begun.finished(s)]

    finished = set(on_process_zero(done)) - {"report"}
    budget = TimeBudget(
        amount.text,
        seconds,
        [stage for stage in experiment.stages if stage not in finished],
        began=began,
        fixed=stages_with_length(given),
    )
    record = on_process_zero(lambda: None if begun is None else read_record(begun.path))
    budget = resumed(budget, record)
    check(
        not experiment.pretrain.phases.change or "pretrain" in budget.fixed or "pretrain" not in budget.stages,
        "pretrain.phases are shares of a known number of steps, which a budget of time does not have; set "
        "--pretrain.num-iterations, or leave out --budget",
    )
    on_process_zero(budget.check_enough)
    return budget


def settle_in_time(
    experiment: Experiment,
    begun: RunDirectory | None,
    budget: TimeBudget,
    *,
    given: Collection[str] = (),
    starts_from_model: bool = False,
    say: Say = print,
) -> Experiment:
    """As `settle`, with sizes and lengths that the budget allows on these devices, whose speed is measured.

    A run that goes on has what was decided when it began (`keep_lengths`), and one that starts from another's model has
    its sizes. All processes must call it.

    Raises:
      UserError: as `settle`; the experiment does not suit the devices.
    """
    shards = data_shards(make_mesh(experiment.mesh))
    if begun is not None and not starts_from_model:
        if on_process_zero(lambda: read_record(begun.path)) is None:  # it was begun without a budget
            looks = {name: value for name, value in _lengths(experiment, budget, None, given).items() if name in FITTED}
            experiment = replace_fields(experiment, looks)
        return settle(experiment, begun, given=given, shards=shards, say=say)
    if starts_from_model or "pretrain" not in experiment.stages:
        return replace_fields(experiment, _lengths(experiment, budget, None, given))
    amounts: list[TextAmount | None] = []  # on process 0
    on_process_zero(lambda: amounts.append(find_amount(experiment, None, say)))
    known: dict[str, Any] = {"given": given, "shards": shards, "amount": amounts[0] if amounts else None}
    if experiment.sizes == "auto":
        speed, depth, settled = training_speed()[0], None, experiment
        for _ in range(2):  # a larger model uses a device better, or fills it
            flops = STEPS_OF * budget.planned("pretrain") * speed
            settled = settle(experiment, None, flops=flops, say=lambda line: None, **known)
            if settled.model.depth == depth:
                break
            depth = settled.model.depth
            speed = measure(settled, budget, say).flops
        flops = STEPS_OF * budget.planned("pretrain") * speed
        settled = settle(experiment, None, flops=flops, say=say, **known)
        pace = Pace.of(settled, speed)
        budget.tokens_per_second = pace.tokens
        return replace_fields(settled, _lengths(settled, budget, pace, given))
    pace = measure(experiment, budget, say)
    budget.tokens_per_second = pace.tokens
    fitted = replace_fields(experiment, _lengths(experiment, budget, pace, given))
    return settle(fitted, None, say=say, **known)


class Pace(NamedTuple):
    """How fast pretraining goes on all devices together: tokens and FLOPs in a second."""

    tokens: float
    flops: float

    @classmethod
    def of(cls, experiment: Experiment, flops: float) -> Pace:
        return cls(flops / flops_per_token(planned_model(experiment)), flops)


def measure(experiment: Experiment, budget: TimeBudget, say: Say) -> Pace:
    """Trains a few steps on random tokens, with the very program that pretraining will run and need not compile again.

    Raises:
      UserError: the experiment's batch or mesh does not match the devices; no step fits into memory.
    """
    began = time.perf_counter()
    data = dataclasses.replace(experiment.data, path=None, download=(), generate=True)  # never read
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(
            dataclasses.replace(experiment, data=data), Path(folder) / "run", say=lambda line: None, budget=budget
        )
        model = planned_model(experiment)
        training = Training(workspace, "pretrain", experiment.pretrain, model, None, 1)  # pyright: ignore[reportArgumentType]
        source: Any = random_batches(workspace, model)
        if training.horizon is not None:
            training.horizon.rates = dict.fromkeys(range(1 + MEASURED_STEPS), 1.0)
            source = Paced(source, training.horizon, workspace, 1.0)
        state, step = training.compiled(lambda: fresh_params(workspace, model), source)
        times = []
        for number in range(1 + MEASURED_STEPS):
            then = time.perf_counter()
            state, metrics = step(state, source.next_batch(number, state["params"])[0])
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - then)
            if on_process_zero(lambda: sum(times[1:]) >= MEASURED * budget.seconds):
                break
        jax.tree.map(lambda x: x.delete(), state)
    seconds = on_process_zero(lambda: sum(times[1:]) / (len(times) - 1))
    tokens = experiment.pretrain.batch_tokens / seconds
    if jax.process_index() == 0:
        took = time.perf_counter() - began
        say(f"budget    depth {model.depth} trains on {tokens:,.0f} tokens/s here; measured in {took:.0f} s")
    return Pace(tokens, tokens * flops_per_token(model))


def _lengths(experiment: Experiment, budget: TimeBudget, pace: Pace | None, given: Collection[str]) -> dict[str, Any]:
    """The settings that follow from the time, as far as the user has not set them.

    The steps are about as many as there will be; training finds the exact number. What is only measured on the way is
    cut to what there is time for, and the evaluate stage asks what is left.
    """
    changes: dict[str, Any] = {
        "tokenizer.max_chars": min(
            experiment.tokenizer.max_chars, max(1, int(TOKENIZER_CHARS * budget.share("tokenizer")))
        ),
        "pretrain.core_every": 0,
        "midtrain.tasks": (),
        "sft.tasks": (),
        "rl.eval_questions": min(
            experiment.rl.eval_questions, max(LEAST_QUESTIONS, int(budget.share("rl") / (1 + PASS_K)))
        ),
        "rl.pass_k": min(experiment.rl.pass_k, PASS_K),
        "evaluate.core": (),
        "evaluate.limit": None,
    }
    for stage in ("pretrain", "midtrain", "sft"):
        if pace is None or stage in budget.fixed or stage not in budget.stages:
            continue
        config = getattr(experiment, stage)
        tokens = STEPS_OF * budget.planned(stage) * pace.tokens
        steps = max(1, int(tokens // config.batch_tokens))
        changes |= {
            f"{stage}.num_iterations": steps,
            f"{stage}.eval_every": max(1, min(config.eval_every or steps, steps // EVALUATIONS)),
            f"{stage}.eval_tokens": max(config.batch_tokens, min(config.eval_tokens, int(tokens // EVALUATED))),
        }
    if not {"evaluate.core_per_task", "evaluate.core"}.isdisjoint(given):
        del changes["evaluate.core"]
    return {name: value for name, value in changes.items() if name not in given}
