"""Midtraining and SFT: the model learns to converse. The two stages differ only in their mixture and learning rates."""

from __future__ import annotations

import itertools

from jaxchat.data.chat.packing import RenderedConversations
from jaxchat.data.loader import chat_batches, count_rows
from jaxchat.devices.mesh import batch_share
from jaxchat.errors import UserError
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.stages.samples import prompts_of_chats
from jaxchat.stages.training import Batches, Training
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Mixture
from jaxchat.train.loop import Evaluator

SAMPLES = 3


def run(workspace: Workspace, stage: str) -> None:
    """Fine-tunes the parent's parameters on the mixture of `stage`; only what the assistant writes is trained on.

    Raises:
      UserError: the data has no task of the mixture.
    """
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = getattr(experiment, stage), workspace.model_config(tokenizer)
    plan = workspace.batch_plan(config)
    tasks = workspace.load_tasks(stage, config.mixture, "train")
    if not tasks:
        raise UserError(f"{stage}: the data folder has none of its tasks ({', '.join(config.mixture)})")
    rendered = RenderedConversations(Mixture(tasks), tokenizer, model.sequence_len)
    parent = workspace.parent_of(stage)
    common = {"tokenizer": tokenizer, "sequence_len": model.sequence_len, "seed": experiment.seed}
    steps = config.num_iterations
    if steps is None:
        rows = count_rows(rendered, **common)
        steps = max(1, round(config.epochs * rows / (plan.rows * plan.accumulation)))
    index, count = batch_share(workspace.mesh)
    part = {"process_index": index, "process_count": count}
    batches = chat_batches(rendered, rows=plan.rows * plan.accumulation // count, **part, **common)
    held_out = [task for task in workspace.load_tasks(stage, config.mixture, "val", quiet=True) if len(task)]
    validation = []
    if held_out:
        source = chat_batches(Mixture(held_out), rows=plan.rows // count, epochs=1, **part, **common)
        count = max(1, config.eval_tokens // (plan.rows * model.sequence_len))
        validation = list(itertools.islice(source, count))

    def validate(step, params):
        if validation:
            yield "bpb", evaluate_bpb(params, model, validation, tokenizer.token_bytes(), compute=workspace.compute)

    params, step = workspace.load_params(parent, model)
    training = Training(workspace, stage, config, model, tokenizer, steps, parent={"stage": parent, "step": step})
    source = Mixture(held_out or tasks)
    spread = [source[i * len(source) // SAMPLES] for i in range(SAMPLES)]
    training.train(
        lambda: params,
        Batches(workspace, plan, batches),
        lambda metrics: (
            Evaluator(config.eval_every, validate),
            training.sampler(metrics, prompts_of_chats(tokenizer, spread)),
        ),
        mixture={task.name: len(task) for task in tasks},
    )
