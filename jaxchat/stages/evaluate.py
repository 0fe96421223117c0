"""The evaluate stage: every stage's model answers the same questions.

A score belongs to a model and to the settings it was made with: the questions, and the longest answer. It is measured
again when one of them has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from typing import Any

from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.chat import TaskResult, evaluate_task
from jaxchat.infer.engine import Engine
from jaxchat.runs.files import write_bytes
from jaxchat.stages.workspace import Workspace
from jaxchat.tasks import Task

TEMPERATURE = 0.0


def complete(workspace: Workspace) -> bool:
    """Whether the stage is finished, and has all scores that the experiment asks for."""
    return workspace.finished("evaluate") and not any(_missing(workspace, _load_tasks(workspace, quiet=True)).values())


def run(workspace: Workspace) -> None:
    """Scores the experiment's tasks with the model of each stage that it names; scores that are there are kept.

    Leaves the answers in `RUN/evaluate/STAGE/TASK.jsonl`.
    """
    config, tokenizer, began = workspace.experiment.evaluate, workspace.tokenizer(), time.time()
    model = workspace.model_config(tokenizer)
    tasks = _load_tasks(workspace)
    missing = _missing(workspace, tasks)
    with workspace.metrics("evaluate", len(tasks) * len(config.of)) as metrics:
        for stage in config.of:
            if stage not in missing:
                older = on_process_zero(lambda: workspace.directory.stale(stage))  # noqa: B023 (called at once)
                why = f"was made from an earlier {older}" if older else "left no model"
                workspace.say(f"evaluate  {stage} {why}: not evaluated")
                continue
            if not missing[stage]:
                continue
            params, step = workspace.load_params(stage, model)
            engine = Engine(model, params, tokenizer, dtype=workspace.compute.dtype)
            for task, settings in missing[stage]:
                result = evaluate_task(
                    engine,
                    task,
                    limit=config.limit,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.batch_rows,
                    temperature=TEMPERATURE,
                )
                on_process_zero(lambda: _keep_answers(workspace, stage, result))  # noqa: B023 (called at once)
                facts = {"score": result.score, "count": result.count, "cut": result.cut, "too_long": result.too_long}
                metrics.log(step, of=stage, **{f"{name}/{task.name}": fact for name, fact in facts.items()}, **settings)
                workspace.say(f"evaluate  {stage:<9} {task.name:<14} {result}")
    workspace.finish("evaluate", parent=None, seconds=time.time() - began, started=began)


def _load_tasks(workspace: Workspace, quiet: bool = False) -> list[Task]:
    return workspace.load_tasks("evaluate", workspace.experiment.evaluate.tasks, "test", quiet=quiet)


def _missing(workspace: Workspace, tasks: list[Task]) -> dict[str, list[tuple[Task, dict[str, Any]]]]:
    """For each stage with a model, the tasks that it has no score of with the settings of now, and these settings."""
    lines = on_process_zero(lambda: [line for line in workspace.directory.read_metrics() if "of" in line])
    before = on_process_zero(lambda: _longest_answer_before(workspace))
    scores = {(line["of"], name): line for line in lines for name in line if name.startswith("score/")}
    missing = {}
    trained = workspace.stages_with_model()
    asked = [(task, _how_asked(workspace, task)) for task in tasks]
    for stage in workspace.experiment.evaluate.of:
        if stage in trained:
            missing[stage] = []
            model = on_process_zero(lambda: workspace.directory.id_of(stage))  # noqa: B023 (called at once)
            for task, how in asked:
                score, settings = scores.get((stage, f"score/{task.name}")), {"model": model, **how}
                if score is None or not _fits(workspace, score, task, settings, before):
                    missing[stage].append((task, settings))
    return missing


def _how_asked(workspace: Workspace, task: Task) -> dict[str, Any]:
    """What a score depends on besides the model: the questions, and how it may answer them."""
    config = workspace.experiment.evaluate
    digest = hashlib.sha256()
    for i in task.subset(config.limit):
        digest.update(json.dumps(task[i], sort_keys=True, default=str).encode())
    settings = {
        "questions": digest.hexdigest()[:16],
        "temperature": TEMPERATURE,
        "max_new_tokens": task.mode.max_new_tokens if task.mode else config.max_new_tokens,
    }
    return settings if task.kind != "multiple_choice" else {**settings, "max_new_tokens": 1}


def _longest_answer_before(workspace: Workspace) -> int | None:
    """The longest answer in the scores of an earlier version of jaxchat, whose lines do not have it."""
    before = workspace.directory.config_of("evaluate")
    return before.evaluate.max_new_tokens if before else None


def _fits(
    workspace: Workspace, score: dict[str, Any], task: Task, settings: dict[str, Any], before: int | None
) -> bool:
    """Whether a line of the metrics is the score of `task` with `settings`, and its answers are still there."""
    if "questions" in score:
        answers = workspace.directory.answers(score["of"], task.name)
        same = all(score.get(name) == value for name, value in settings.items())
        return same and on_process_zero(answers.exists)
    if not workspace.finished("evaluate"):
        return False
    same_count = score.get(f"count/{task.name}") == len(task.subset(workspace.experiment.evaluate.limit))
    return same_count and (task.kind == "multiple_choice" or before == settings["max_new_tokens"])


def _keep_answers(workspace: Workspace, stage: str, result: TaskResult) -> None:
    lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in result.answers]
    write_bytes(workspace.directory.answers(stage, result.name), "".join(lines).encode())
