"""Scores of a model while it is trained, on samples: the same questions each time, and nothing drawn at random."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxchat.config import FinetuneConfig
from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.chat import evaluate_task
from jaxchat.eval.core import evaluate_core, find_bundle, load_bundle
from jaxchat.runs.metrics import Metrics
from jaxchat.stages.training import Training
from jaxchat.tasks import Task
from jaxchat.train.loop import Evaluator


def core_scores(training: Training, metrics: Metrics) -> tuple[Evaluator, ...]:
    """Measures CORE every `core_every` steps and at the end, on at most `core_per_task` items of each task.

    Yields the means as `CoreResult.scores` names them, and for each task `core/LABEL`, its accuracy, with the ends of
    its interval of 95 % `core_low/LABEL` and `core_high/LABEL`, and `core_count/LABEL`. Yields nothing while the data
    folder does not have the tasks.
    """
    workspace = training.workspace
    config, data = workspace.experiment.pretrain, workspace.experiment.data.folder
    if not config.core_every or data is None:
        return ()
    load = functools.cache(load_bundle)

    def measure(step: int, params):
        # Where it is still being downloaded, it may be there the next time.
        there = on_process_zero(lambda: "" if workspace.is_downloading("core") else str(find_bundle(data) or ""))
        if not there:
            return
        result = evaluate_core(
            training.model,
            params,
            training.tokenizer,
            load(there),
            compute=workspace.compute,
            max_per_task=config.core_per_task,
            progress=lambda done, total, label: metrics.progress("CORE", done, total),
        )
        means = result.scores()
        told = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        metrics.note(f"step {step:,}: {told} on {config.core_per_task:,} items a task")
        yield from means.items()
        for label, score in result.tasks.items():
            yield f"core/{label}", score.accuracy
            yield f"core_low/{label}", score.low
            yield f"core_high/{label}", score.high
            yield f"core_count/{label}", score.count

    return (Evaluator(config.core_every, measure, at_start=False),)


def task_scores(
    training: Training, metrics: Metrics, config: FinetuneConfig, tasks: Sequence[Task]
) -> tuple[Evaluator, ...]:
    """Scores chat tasks as the evaluate stage does, on at most `task_questions` questions of each.

    Yields `sample_score/TASK`, the ends of its interval of 95 % `sample_low/TASK` and `sample_high/TASK`, and
    `sample_count/TASK`.
    """
    how = training.workspace.experiment.evaluate

    def measure(step: int, params):
        engine = training.engine(params)
        for task in tasks:
            result = evaluate_task(
                engine,
                task,
                limit=config.task_questions,
                max_new_tokens=how.max_new_tokens,
                batch_size=how.batch_rows,
                temperature=0.0,
                progress=functools.partial(metrics.progress, f"asking {task.name}"),
            )
            metrics.note(f"step {step:,}: {task.name} {str(result).strip()}")
            facts = {"score": result.score, "low": result.low, "high": result.high, "count": result.count}
            yield from ((f"sample_{name}/{task.name}", value) for name, value in facts.items())

    return (Evaluator(config.tasks_every, measure),) if tasks else ()
