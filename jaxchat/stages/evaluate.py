"""The evaluate stage: the same questions to every stage's model."""

from __future__ import annotations

import time

from jaxchat.devices.processes import agreed
from jaxchat.eval.chat import evaluate_task
from jaxchat.infer.engine import Engine
from jaxchat.runs.metrics import read_metrics
from jaxchat.stages.run import Run


def run(run: Run) -> None:
    """Scores the experiment's tasks on each finished stage it names; scores already in metrics.jsonl stay."""
    config, tokenizer, began = run.experiment.evaluate, run.tokenizer(), time.time()
    model = run.model_config(tokenizer)
    tasks = run.load_tasks("evaluate", config.tasks, "test")
    lines = agreed(lambda: [line for line in read_metrics(run.directory) if "of" in line])
    scored = {(line["of"], name) for line in lines for name in line}
    with run.metrics("evaluate", len(tasks) * len(config.of)) as metrics:
        for stage in config.of:
            if not (run.record(stage) or {}).get("steps"):
                run.say(f"evaluate  {stage} left no model, and is not evaluated")
                continue
            params, step = run.load_params(stage, model)
            engine = Engine(model, params, tokenizer, dtype=run.dtype)
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
                run.say(f"evaluate  {stage:<9} {task.name:<14} {result.score:7.1%} of {result.count:,}")
    run.finish("evaluate", parent=None, seconds=time.time() - began, started=began)
