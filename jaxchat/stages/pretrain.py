"""Pretraining: the base model learns to predict the next token of plain text."""

from __future__ import annotations

import itertools

import grain.python as grain

from jaxchat.data.loader import pretrain_batches
from jaxchat.data.text.describe import text_record
from jaxchat.data.text.fingerprint import fingerprint, what_changed
from jaxchat.data.text.folder import TextSplits
from jaxchat.data.text.shards import iterate_texts
from jaxchat.devices.mesh import batch_share
from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.stages.phases import PhasedBatches
from jaxchat.stages.samples import fixed_prompts, is_english, prompts_of_texts
from jaxchat.stages.scores import core_scores
from jaxchat.stages.training import Batches, Training, fresh_params
from jaxchat.stages.validation import Rows, in_batches, keep_rows, smallest_share
from jaxchat.stages.workspace import Workspace
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.budget import training_length
from jaxchat.train.loop import Evaluator
from jaxchat.train.phases import Phases

SAMPLES = 2


def run(workspace: Workspace) -> None:
    """Trains fresh parameters on the experiment's text."""
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = experiment.pretrain, workspace.model_config(tokenizer)
    text = workspace.text()
    on_process_zero(lambda: _say_if_changed(workspace, text))
    steps = training_length(config, model)
    phases = Phases(config, steps) if config.phases.change else None
    training = Training(workspace, "pretrain", config, model, tokenizer, steps, phases=phases)
    batches = training_batches(workspace, tokenizer, text, phases)
    validation, count = validation_rows(workspace, tokenizer, text), batch_share(workspace.mesh)[1]

    def validate(step, params):
        at_once = in_batches(validation, batches.plan.rows // count)
        yield "bpb", evaluate_bpb(params, model, at_once, tokenizer.token_bytes(), compute=workspace.compute)

    texts = list(itertools.islice(iterate_texts(text.val), SAMPLES))
    prompts = prompts_of_texts(tokenizer, texts)
    prompts += fixed_prompts(tokenizer, generated=experiment.data.folder is None, english=is_english(texts))
    training.train(
        lambda: fresh_params(workspace, model),
        batches,
        lambda metrics: (
            Evaluator(config.eval_every, validate),
            *core_scores(training, metrics),
            training.sampler(metrics, prompts),
        ),
        text=text_record(text),
    )


def training_batches(
    workspace: Workspace, tokenizer: BaseTokenizer, text: TextSplits, phases: Phases | None = None
) -> Batches:
    """The batches of pretraining, from the first one on; without `phases` as those of the last one."""
    config = workspace.experiment.pretrain
    plans = workspace.batch_plans(config)
    tokens = config.batch_tokens if phases is None else config.unit_tokens
    index, count = batch_share(workspace.mesh)
    rows = tokens // workspace.experiment.model.sequence_len // count
    batches = text_batches(workspace, tokenizer, text, rows, process_index=index, process_count=count)
    return Batches(workspace, plans, batches) if phases is None else PhasedBatches(workspace, plans, batches, phases)


def text_batches(
    workspace: Workspace,
    tokenizer: BaseTokenizer,
    text: TextSplits,
    rows: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """The training text as the experiment reads it, `rows` rows a batch, from its beginning; see `pretrain_batches`."""
    experiment = workspace.experiment
    return pretrain_batches(
        text.train,
        tokenizer,
        rows=rows,
        sequence_len=experiment.model.sequence_len,
        seed=experiment.seed,
        shuffle=experiment.data.shuffle,
        packing=experiment.data.packing,
        mask_borders=experiment.data.mask_borders in ("loss", "both"),
        lanes=experiment.data.lanes,
        process_index=process_index,
        process_count=process_count,
        fingerprint=fingerprint(text),
    )


def validation_rows(workspace: Workspace, tokenizer: BaseTokenizer, text: TextSplits) -> Rows:
    """This process's rows of the text for validation that each evaluation of pretraining uses."""
    experiment = workspace.experiment
    index, count = batch_share(workspace.mesh)
    held_out = pretrain_batches(
        text.val,
        tokenizer,
        rows=smallest_share(workspace.mesh),
        sequence_len=experiment.model.sequence_len,
        seed=experiment.seed,
        repeat=False,
        process_index=index,
        process_count=count,
    )
    return keep_rows(held_out, experiment.pretrain.eval_tokens // count)


def _say_if_changed(workspace: Workspace, text: TextSplits) -> None:
    """Says whether the tokenizer was trained on other text, which is no reason to stop: it fits any."""
    record = workspace.directory.read_record("tokenizer") or {}
    before, now = record.get("fingerprint"), fingerprint(text)
    if before and now and (changed := what_changed(before, now)):
        workspace.say(f"pretrain  the text has changed since the tokenizer was made: {changed}")
