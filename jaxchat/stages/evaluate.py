"""The evaluate stage: every stage's model answers the same questions."""

from __future__ import annotations

import time

from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.chat import evaluate_task
from jaxchat.infer.engine import Engine
from jaxchat.runs.metrics import read_metrics
from jaxchat.stages.workspace import Workspace


def run(workspace: Workspace) -> None:
    """Scores the experiment's tasks with the model of each stage that it names; scores in metrics.jsonl are kept."""
    config, tokenizer, began = workspace.experiment.evaluate, workspace.tokenizer(), time.time()
    model = workspace.model_config(tokenizer)
    tasks = workspace.load_tasks("evaluate", config.tasks, "test")
    lines = on_process_zero(lambda: [line for line in read_metrics(workspace.directory.path) if "of" in line])
    trained = workspace.stages_with_model()
    scored = {(line["of"], name) for line in lines for name in line}
    with workspace.metrics("evaluate", len(tasks) * len(config.of)) as metrics:
        for stage in config.of:
            if stage not in trained:
                workspace.say(f"evaluate  {stage} left no model: not evaluated")
                continue
            params, step = workspace.load_params(stage, model)
            engine = Engine(model, params, tokenizer, dtype=workspace.compute.dtype)
            for task in tasks:
                if (stage, f"score/{task.name}") in scored:
                    continue
                result = evaluate_task(
                    engine,
                    task,
                    limit=config.limit,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.batch_rows,
                )
                metrics.log(step, of=stage, **{f"score/{task.name}": result.score, f"count/{task.name}": result.count})
                workspace.say(f"evaluate  {stage:<9} {task.name:<14} {result.score:7.1%} of {result.count:,}")
    workspace.finish("evaluate", parent=None, seconds=time.time() - began, started=began)
