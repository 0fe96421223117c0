"""Pretraining: the base model learns to predict the next token of plain text."""

from __future__ import annotations

import itertools

from jaxchat.data.loader import pretrain_batches
from jaxchat.data.text.shards import TextSplit, iterate_texts
from jaxchat.devices.mesh import batch_share
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.stages.run import Run
from jaxchat.stages.training import Batches, Training, fresh_params, plan_batch, prompts_of_texts, take
from jaxchat.tokenizer import BaseTokenizer
from jaxchat.train.budget import training_length
from jaxchat.train.loop import Evaluator

SAMPLES = 2


def run(run: Run) -> None:
    """Trains from fresh parameters over the experiment's text."""
    experiment, tokenizer = run.experiment, run.tokenizer()
    config, model = experiment.pretrain, run.model_config(tokenizer)
    plan = plan_batch(run, "pretrain", config)
    text = run.text()
    training = Training(run, "pretrain", config, model, tokenizer, training_length(config, model))
    batches = training_batches(run, tokenizer, text)
    index, count = batch_share(run.mesh)
    validation = take(
        pretrain_batches(
            text.val,
            tokenizer,
            rows=plan.rows // count,
            sequence_len=model.sequence_len,
            seed=experiment.seed,
            repeat=False,
            process_index=index,
            process_count=count,
        ),
        max(1, config.eval_tokens // (plan.rows * model.sequence_len)),
    )

    def validate(step, params):
        yield "bpb", evaluate_bpb(params, model, validation, tokenizer.token_bytes(), dtype=run.dtype, mesh=run.mesh)

    prompts = prompts_of_texts(tokenizer, list(itertools.islice(iterate_texts(text.val), SAMPLES)))
    training.train(
        lambda: fresh_params(run, model),
        batches,
        lambda metrics: (Evaluator(config.eval_every, validate), training.sampler(metrics, prompts)),
    )


def training_batches(run: Run, tokenizer: BaseTokenizer, text: TextSplit) -> Batches:
    """The batches that pretraining sees, from the first."""
    experiment = run.experiment
    plan = plan_batch(run, "pretrain", experiment.pretrain)
    index, count = batch_share(run.mesh)
    batches = pretrain_batches(
        text.train,
        tokenizer,
        rows=plan.rows * plan.accumulation // count,
        sequence_len=experiment.model.sequence_len,
        seed=experiment.seed,
        shuffle=experiment.data.shuffle,
        packing=experiment.data.packing,
        mask_borders=experiment.data.mask_borders in ("loss", "both"),
        lanes=experiment.data.lanes,
        process_index=index,
        process_count=count,
    )
    return Batches(run, plan, batches)
