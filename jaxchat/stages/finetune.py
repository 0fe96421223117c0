"""Midtraining and SFT: the model learns to converse. The two stages differ only in their settings."""

from __future__ import annotations

import json
import math
from typing import Any

import grain.python as grain

from jaxchat.data.chat.fingerprint import fingerprint as fingerprint_of_chats
from jaxchat.data.chat.packing import RenderedConversations
from jaxchat.data.chat.targets import count_targets, trainable
from jaxchat.data.loader import chat_batches, count_rows, mixed_batches
from jaxchat.data.positions import Json, text_position
from jaxchat.data.text.fingerprint import fingerprint, what_changed
from jaxchat.data.text.reading import Findings
from jaxchat.devices.mesh import batch_share
from jaxchat.devices.processes import on_process_zero
from jaxchat.errors import UserError
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.model.config import GPTConfig
from jaxchat.runs.directory import TRAINED
from jaxchat.runs.progress import format_number
from jaxchat.runs.time_budget import LEAST
from jaxchat.stages.pacing import CHAT_PASSES, horizon_of
from jaxchat.stages.preflight import can_be_asked, check_targets
from jaxchat.stages.pretrain import text_batches
from jaxchat.stages.samples import prompts_of_chats
from jaxchat.stages.scores import task_scores
from jaxchat.stages.training import Batches, Training
from jaxchat.stages.validation import in_batches, keep_rows, smallest_share
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Conversation, Mixture, Task
from jaxchat.tasks.items import spread
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.horizon import LEAST as FEW_STEPS
from jaxchat.train.loop import Evaluator

SAMPLES = 3
COUNTED = 2000  # conversations whose length is measured, of all
SLOWER = 1.2  # than a step of pretraining is one of as many tokens of conversations, at most
CHARACTERS = 4  # of a conversation as JSON, of a token


def run(workspace: Workspace, stage: str) -> None:
    """Fine-tunes the parent's parameters on the mixture of `stage`, and on text among it if the stage has any.

    Validation is on what the assistant writes, whatever is trained on: the same measure for all.

    Raises:
      UserError: the data has no task of the mixture.
    """
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = getattr(experiment, stage), workspace.model_config(tokenizer)
    plans = workspace.batch_plans(config)
    step_rows = plans[0].rows * plans[0].accumulation
    text_rows = config.text_rows(step_rows, experiment.data.lanes)
    chat_rows = step_rows - text_rows
    findings = Findings(experiment.data.on_bad, lambda line: None)
    tasks = workspace.load_tasks(stage, config.mixture, "train", findings=findings)
    if not tasks:
        raise UserError(f"{stage}: the data folder has none of its tasks ({', '.join(config.mixture)})")
    targets = count_targets(Mixture(tasks), tokenizer, model.sequence_len, config.targets)
    check_targets(stage, targets, model.sequence_len, workspace.say_once)
    masked = experiment.data.mask_borders in ("loss", "both")
    rendered = RenderedConversations(
        Mixture(tasks), tokenizer, model.sequence_len, trained=config.targets, mask_borders=masked
    )
    parent = workspace.parent_of(stage)
    common = {"tokenizer": tokenizer, "sequence_len": model.sequence_len, "seed": experiment.seed}
    # With a budget of time, training itself finds out how many.
    steps = 1 if horizon_of(workspace, stage, config.schedule) else config.num_iterations
    if steps is None:
        exact = config.epochs * count_rows(rendered, **common) / chat_rows
        steps = max(1, round(exact))
        if steps < FEW_STEPS:
            workspace.say_once(
                f"{stage:<9} {format_number(steps, 'step')} only, which changes little: {config.epochs:g} epochs are "
                f"{exact * config.batch_tokens:,.0f} tokens, and a step takes {config.batch_tokens:,}; "
                f"--{stage}.epochs={math.ceil(config.epochs * FEW_STEPS / exact)} makes {FEW_STEPS} steps, and a "
                f"smaller --{stage}.batch-tokens more of them"
            )
    index, count = batch_share(workspace.mesh)
    part = {"process_index": index, "process_count": count}
    known = fingerprint_of_chats([(task.name, task) for task in tasks])
    if text_rows:
        source = mixed_batches(
            chat_batches(rendered, rows=chat_rows, fingerprint=known, **common),
            _text(workspace, stage, tokenizer, text_rows),
            text_rows=text_rows,
            rows=step_rows // count,
            **part,
        )
    else:
        source = chat_batches(rendered, rows=step_rows // count, fingerprint=known, **part, **common)
    batches = Batches(workspace, plans, source)
    held_out = _with_targets(workspace.load_tasks(stage, config.mixture, "val", quiet=True), tokenizer, model)
    validation = {}
    if held_out:
        rows = chat_batches(held_out, rows=smallest_share(workspace.mesh), epochs=1, **part, **common)
        validation = keep_rows(rows, config.eval_tokens // count)

    def validate(step, params):
        if validation:
            at_once = in_batches(validation, batches.plan.rows // count)
            yield "bpb", evaluate_bpb(params, model, at_once, tokenizer.token_bytes(), compute=workspace.compute)

    params, step = workspace.load_params(parent, model)
    facts: dict[str, Any] = {"mixture": {task.name: len(task) for task in tasks}}
    if text_rows:
        facts["text_fraction"] = text_rows / step_rows
    before = on_process_zero(lambda: workspace.directory.read_record(parent) or {}).get("mixture", {})
    training = Training(
        workspace,
        stage,
        config,
        model,
        tokenizer,
        steps,
        parent={"stage": parent, "step": step},
        knows_data=not before.keys().isdisjoint(facts["mixture"]),
    )
    if findings.left_out:
        facts["left_out"] = dict(findings.left_out)
    asked = workspace.load_tasks(stage, config.tasks, "test", quiet=True)
    asked = [task for task in asked if can_be_asked(task, tokenizer, model.sequence_len)]
    shown = spread(held_out or [chat for chat in Mixture(tasks) if chat["messages"]], SAMPLES)
    training.train(
        lambda: params,
        batches,
        lambda metrics: (
            Evaluator(config.eval_every, validate),
            *task_scores(training, metrics, config, asked),
            training.sampler(metrics, prompts_of_chats(tokenizer, list(shown))),
        ),
        **facts,
    )


def longest(workspace: Workspace) -> dict[str, float]:
    """Seconds that each of the stages takes at most, since a budget lets it read its conversations but a few times.

    Empty where the speed or the conversations are not known yet.
    """
    experiment, budget, seconds = workspace.experiment, workspace.budget, {}
    if budget is None or budget.tokens_per_second is None or experiment.data.download:
        return seconds
    for stage in ("midtrain", "sft"):
        if stage in budget.stages and stage not in budget.fixed:
            config = getattr(experiment, stage)
            chats = Mixture(workspace.load_tasks(stage, config.mixture, "train", quiet=True))
            some = spread(chats, COUNTED)
            characters = sum(len(json.dumps(chat["messages"], ensure_ascii=False)) for chat in some)
            tokens = characters / CHARACTERS * len(chats) / max(1, len(some)) / (1 - config.text_fraction)
            seconds[stage] = LEAST[stage] + SLOWER * CHAT_PASSES * tokens / budget.tokens_per_second
    return seconds


def _text(workspace: Workspace, stage: str, tokenizer: BaseTokenizer, rows: int) -> grain.DatasetIterator:
    """Whole batches of pretraining's text, from where the stage before stopped if it has read the same."""
    text = workspace.text()
    batches, now = text_batches(workspace, tokenizer, text, rows), fingerprint(text)
    where = "from its beginning"
    if position := on_process_zero(lambda: _read_up_to(workspace, stage)):
        changed = what_changed(position["fingerprint"], now) if now and position.get("fingerprint") else None
        if changed is None:
            batches.set_state(position)
            where = "on from where it was read up to"
        else:
            where += f", since it is not what was read before: {changed}"
    workspace.say_once(f"{stage:<9} {format_number(rows, 'row')} of a step are text, read {where}")
    return batches


def _read_up_to(workspace: Workspace, stage: str) -> Json | None:
    """The position in the text after the last stage that has read of it; None if none has."""
    for earlier in reversed(TRAINED[: TRAINED.index(stage)]):
        if workspace.directory.leaves_model(earlier):
            checkpoints = workspace.checkpoints(earlier)
            position = text_position(checkpoints.read_position())
            checkpoints.close()
            if position:
                return position
    return None


def _with_targets(tasks: list[Task], tokenizer: BaseTokenizer, model: GPTConfig) -> list[Conversation]:
    """The conversations with something to predict: a batch without would have no bits per byte."""
    chats = [chat for chat in Mixture(tasks) if chat["messages"]]
    return [chat for chat, useful in zip(chats, trainable(chats, tokenizer, model.sequence_len), strict=True) if useful]
