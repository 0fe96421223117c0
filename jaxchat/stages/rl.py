"""Reinforcement learning on questions whose answers can be checked, in the same loop as all training."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxchat.errors import check
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import Params, hidden_states
from jaxchat.ops.compute import Compute
from jaxchat.rl.evaluation import Validation, describe, hold_out_questions, spread_over_tasks
from jaxchat.rl.objectives import PolicyObjective
from jaxchat.rl.record import Record
from jaxchat.rl.reward import SECONDS, OwnReward, own_reward
from jaxchat.rl.rollouts import Question, Rollouts, questions_of
from jaxchat.rl.signal import TOLD
from jaxchat.stages.samples import prompts_of_chats
from jaxchat.stages.training import Training
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Task, parse_mixture
from jaxchat.tasks.items import spread
from jaxchat.train.loop import Evaluator
from jaxchat.train.loss import LossConfig, token_nll
from jaxchat.train.step import MICRO_BATCH_SPEC, Batch, micro_batch

SAMPLES = 3
LOOKED_AT = 200  # questions, for how much room the context leaves for their answers
MOST_DIFFERENCE = 0.01  # between the probabilities of a token in sampling and training; below 0.005 is rounding


def run(workspace: Workspace) -> None:
    """Trains the parent's parameters on the rewards of their own samples; skipped if the data has none of the tasks.

    Raises:
      UserError: no question fits into the context; the user's own reward cannot be imported.
    """
    config = workspace.experiment.rl
    tasks = workspace.load_tasks("rl", config.tasks, "train")
    if not tasks:
        workspace.say(f"rl        skipped: the data folder has none of its tasks ({', '.join(config.tasks)})")
        workspace.finish("rl", parent=None, steps=0, tokens=0, seconds=0.0, skipped=True)
        return
    with own_reward(config.reward, workspace.say) as own:
        if own is not None:
            workspace.say(
                f"rl        answers are rewarded by {own.where}: {own.number} at once, within {SECONDS:g} s each"
            )
        _train(workspace, tasks, own)


def _train(workspace: Workspace, tasks: list[Task], own: OwnReward | None) -> None:
    """The same with the tasks at hand; `own` rewards in their place."""
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = experiment.rl, workspace.model_config(tokenizer)
    fitting = questions_of(tasks, tokenizer, model.sequence_len)
    check(
        bool(fitting),
        f"rl: none of its tasks' questions fits into model.sequence-len {model.sequence_len}; name rl.tasks with "
        "shorter ones",
    )
    questions, asked = _split(workspace, fitting, model.sequence_len)
    parent = workspace.parent_of("rl")
    params, step = workspace.load_params(parent, model)
    steps = config.num_iterations or max(1, len(questions) // config.questions_per_step) * config.updates_per_batch
    drawn = tokenizer.without_output  # what a tool answers is forced in, and never sampled
    training = Training(
        workspace,
        "rl",
        config,
        model,
        tokenizer,
        steps,
        parent={"stage": parent, "step": step},
        objective=PolicyObjective.of(config, drawn),
    )
    record = Record(workspace.directory.rollouts, tokenizer, enabled=jax.process_index() == 0)
    source = Rollouts(
        config,
        questions,
        training.engine(params, drawn),
        mesh=workspace.mesh,
        seed=experiment.seed,
        reference=reference_of(model, params, training.compute, config.temperature, drawn) if config.kl else None,
        own=own,
        record=record,
    )
    left_out = sum(map(len, tasks)) - len(fitting)
    if left_out:
        workspace.say(f"rl        {left_out:,} of its questions fill model.sequence-len {model.sequence_len}: left out")
    folder = workspace.directory.path / "rl" / "validation"
    validation = Validation(config, asked, tokenizer, folder, own)

    def validate(metrics):
        def measure(step, params):
            progress = functools.partial(metrics.progress, "validating")
            values = validation.measure(step, training.engine(params, drawn), progress)
            metrics.note(f"step {step:,}: {describe(values)}")
            return values.items()

        return Evaluator(config.eval_every, measure)

    some = spread(questions, LOOKED_AT)
    lengths = [len(tokenizer.render_for_completion(conversation)) for _, conversation in some]
    room = model.sequence_len - int(np.median(lengths))
    if room < config.max_new_tokens:
        workspace.say(
            f"rl        model.sequence-len {model.sequence_len} leaves most answers {room:,} tokens, fewer than the "
            f"{config.max_new_tokens:,} of rl.max-new-tokens"
        )
    warned = False

    def watch(metrics, values):
        nonlocal warned
        if "reward" in values and (line := source.signal.warning(config, room)):
            metrics.note(line)
        difference = values["probability_difference"]
        # In later updates of the same answers the parameters have moved on, as they should.
        if "reward" in values and difference > MOST_DIFFERENCE and not warned:
            warned = True
            metrics.note(
                f"a token's probability differs by {difference:.3f} on average between sampling and training: up to "
                f"0.005 is rounding, but beyond {MOST_DIFFERENCE} the gradient is no longer the model's own; try "
                "--precision=float32"
            )

    prompts = prompts_of_chats(tokenizer, [conversation for _, conversation in spread(asked, SAMPLES)])

    def evaluators(metrics):
        source.progress = functools.partial(metrics.progress, "scoring answers")
        if own is not None:
            own.note, own.progress = metrics.note, source.progress
        return (
            validate(metrics),
            training.sampler(metrics, prompts),
        )

    training.train(
        lambda: params,
        source,
        evaluators,
        watch=watch,
        at_end=source.facts,
        method=config.method,
    )
    record.close()
    workspace.say(f"rl        a page to read its answers in: jaxchat rollouts --run {workspace.directory}")
    if source.chooser.rounds > 1:
        workspace.say("rl        all questions were solved, so they were asked again: name harder --rl.tasks")
    if unscored := source.signal.unscored:
        answers = source.signal.answers + unscored
        workspace.say(f"rl        {unscored:,} of {answers:,} answers had no reward, and were left out")
    if source.signal.absent:
        when = "in every step" if source.signal.answers else "in any step"
        why = f"{source.signal.lack} {when} {source.signal.advice(config, room)}"
        # KL divergence and entropy concern all answers, whatever they earn.
        result = "learnt nothing from rewards" if config.kl or config.entropy else "changed nothing"
        workspace.say(f"rl {result}: {why}; then start again with --redo=rl")
    elif (quiet := source.signal.quiet).steps >= TOLD[0]:
        updates = quiet.steps * config.updates_per_batch
        why = f"{quiet.lack} {quiet.advice(config, room)}"
        workspace.say(f"rl        learnt nothing from the answers of its last {updates:,} steps: {why}")


def _split(workspace: Workspace, fitting: list[Question], context: int) -> tuple[list[Question], list[Question]]:
    """The questions to train on, of those that fit into the context, and those of an evaluation."""
    most = workspace.experiment.rl.eval_questions
    names = tuple(dict.fromkeys(name for name, _ in parse_mixture(workspace.experiment.rl.tasks)))
    own = questions_of(workspace.load_tasks("rl", names, "val", quiet=True), workspace.tokenizer(), context)
    questions, held_out = hold_out_questions(fitting, own)
    if not held_out:
        workspace.say("rl        its tasks have no questions besides those of training: it is validated on these")
        return questions, spread_over_tasks(questions, most)
    asked = spread_over_tasks(held_out, most)
    counts = Counter(task.name for task, _ in asked)
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    workspace.say(f"rl        validated on questions that are held out from training: {shown}")
    return questions, asked


def reference_of(
    model: GPTConfig, params: Params, compute: Compute, temperature: float, drawn: int | None = None
) -> Callable[[Batch], jax.Array]:
    """The log-probabilities `[accumulation, rows, T]` of a batch's targets for a copy of `params`.

    Temperature and the ids that can be drawn are those of `PolicyObjective`.
    """
    kept = jax.tree.map(jnp.copy, params)
    config = LossConfig(drawn or model.vocab_size, model.logit_cap / temperature, compute.mesh)

    place = None if compute.mesh is None else NamedSharding(compute.mesh, MICRO_BATCH_SPEC)

    @functools.partial(jax.jit, out_shardings=place)
    def log_probabilities(params, batch, computed):
        def add(number, found):
            micro = micro_batch(batch, number)
            hidden = hidden_states(model, params, micro["inputs"], compute, micro["documents"]) / temperature
            return found.at[number].set(-token_nll(hidden, params["head"]["kernel"], micro["targets"], config))

        return jax.lax.fori_loop(0, computed, add, jnp.zeros(batch["targets"].shape))

    names = ("inputs", "targets", "documents")
    return lambda batch: log_probabilities(kept, {name: batch[name] for name in names}, batch["micro_batches"])
