"""Midtraining and SFT: the model learns to converse. The same stage twice, with another mixture and other rates."""

from __future__ import annotations

from jaxchat.data.chat.packing import RenderedConversations
from jaxchat.data.loader import chat_batches, count_rows
from jaxchat.devices.mesh import batch_share
from jaxchat.errors import UserError
from jaxchat.eval.bpb import evaluate_bpb
from jaxchat.stages.training import Batches, Training, plan_batch, prompts_of_chats, take
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Mixture
from jaxchat.train.loop import Evaluator

SAMPLES = 3


def run(workspace: Workspace, stage: str) -> None:
    """Fine-tunes the parent's parameters on `stage`'s mixture; only what the assistant writes is trained on.

    Raises:
      UserError: no task of the mixture is in the data.
    """
    experiment, tokenizer = workspace.experiment, workspace.tokenizer()
    config, model = getattr(experiment, stage), workspace.model_config(tokenizer)
    plan = plan_batch(workspace, stage, config)
    tasks = workspace.load_tasks(stage, config.mixture, "train")
    if not tasks:
        raise UserError(f"{stage}: none of its tasks ({', '.join(config.mixture)}) is in the data folder")
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
        validation = take(source, max(1, config.eval_tokens // (plan.rows * model.sequence_len)))

    def validate(step, params):
        if validation:
            bpb = evaluate_bpb(
                params, model, validation, tokenizer.token_bytes(), compute=workspace.compute
            )
            yield "bpb", bpb

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
