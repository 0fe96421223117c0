"""The evaluate stage: every stage's model answers the same questions; a base model is measured by CORE.

A score belongs to a model and to the settings it was made with: the questions, and the longest answer. It is measured
again when one of them has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from jaxchat.devices.processes import on_process_zero
from jaxchat.eval.changes import changes, describe
from jaxchat.eval.chat import Progress, TaskResult, evaluate_task
from jaxchat.eval.core import Bundle, evaluate_core, find_bundle, load_bundle
from jaxchat.eval.statistics import CHANCE, chat_core
from jaxchat.infer.engine import Engine
from jaxchat.model.config import GPTConfig
from jaxchat.runs.files import write_bytes
from jaxchat.runs.metrics import Metrics
from jaxchat.runs.progress import format_number
from jaxchat.runs.time_budget import LEAST
from jaxchat.stages.question_count import find_count
from jaxchat.stages.workspace import Workspace
from jaxchat.storage import size_of, to_path
from jaxchat.tasks import Task

TEMPERATURE = 0.0
ANSWER_SECONDS = 0.05  # of a slow machine, many at once; two CPU cores take about that for a small model


def complete(workspace: Workspace) -> bool:
    """Whether the stage is finished, and has all scores that the experiment asks for."""
    if not workspace.finished("evaluate"):
        return False
    missing = _missing(workspace, _load_tasks(workspace, quiet=True))
    return not any(missing.values()) and not _missing_core(workspace, _load_bundle(workspace))


def run(workspace: Workspace) -> None:
    """Scores the experiment's tasks with the model of each stage that it names; scores that are there are kept.

    The same for CORE, where the data folder has its bundle; skipped if there is nothing to ask. Leaves the answers in
    `RUN/evaluate/STAGE/TASK.jsonl`, and the decisions of CORE in `RUN/evaluate/STAGE/core/TASK.jsonl`.
    """
    config, tokenizer, began = workspace.experiment.evaluate, workspace.tokenizer(), time.time()
    model = workspace.model_config(tokenizer)
    tasks, bundle = _load_tasks(workspace), _load_bundle(workspace)
    if not tasks and bundle is None:
        workspace.say("evaluate  skipped: nothing is taught here whose answers can be checked")
        workspace.finish("evaluate", parent=None, seconds=0.0, started=began, skipped=True)
        return
    if workspace.budget is not None and workspace.budget.questions is None and tasks:
        _fit_questions(workspace, tasks)
    missing, missing_core = _missing(workspace, tasks), _missing_core(workspace, bundle)
    count = len(tasks) * len(config.of) + (len(config.core) if bundle else 0)
    with workspace.metrics("evaluate", count) as metrics:
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
            scores: dict[str, float] = {}
            for task, settings in missing[stage]:
                progress = functools.partial(metrics.progress, f"{stage} {task.name}")
                result = _ask(workspace, engine, task, _limit(workspace), progress)
                on_process_zero(lambda: _keep_answers(workspace, stage, result))  # noqa: B023 (called at once)
                facts = {name: getattr(result, name) for name in ("score", "low", "high", "count", "cut", "too_long")}
                metrics.log(step, of=stage, **{f"{name}/{task.name}": fact for name, fact in facts.items()}, **settings)
                scores[task.name] = result.score
                workspace.say(f"evaluate  {stage:<9} {task.name:<14} {result}")
            _log_chat_core(workspace, metrics, stage, step, scores)
        if bundle is not None:  # last: on a CPU it takes hours
            for stage, settings in missing_core.items():
                _measure_core(workspace, model, stage, bundle, settings, metrics)
    asked = {(stage, task.name) for stage, of_stage in missing.items() for task, _ in of_stage}
    for line in on_process_zero(lambda: _changes(workspace, asked)):
        workspace.say(line)
    workspace.finish("evaluate", parent=None, seconds=time.time() - began, started=began)


def _ask(workspace: Workspace, engine: Engine, task: Task, limit: int | None, progress: Progress | None) -> TaskResult:
    config = workspace.experiment.evaluate
    return evaluate_task(
        engine,
        task,
        limit=limit,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_rows,
        temperature=TEMPERATURE,
        progress=progress,
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


def _load_tasks(workspace: Workspace, quiet: bool = False) -> list[Task]:
    return workspace.load_tasks("evaluate", workspace.experiment.evaluate.tasks, "test", quiet=quiet)


def longest(workspace: Workspace) -> float:
    """Seconds that asking all questions takes at most; infinite where the tasks are still to be downloaded."""
    config = workspace.experiment.evaluate
    if workspace.experiment.data.download or "evaluate" not in workspace.experiment.stages:
        return math.inf
    tasks = _load_tasks(workspace, quiet=True)
    if not tasks and _load_bundle(workspace) is None:
        return 0.0
    answers = sum(len(task.subset(config.limit)) for task in tasks) * len(config.of)
    return LEAST["evaluate"] + ANSWER_SECONDS * answers


def _limit(workspace: Workspace) -> int | None:
    """Questions of each task, at most: as many as are set or, with a budget, as there was time for."""
    limit, budget = workspace.experiment.evaluate.limit, workspace.budget
    return limit if budget is None or budget.questions is None else budget.questions


def _fit_questions(workspace: Workspace, tasks: list[Task]) -> None:
    """Finds out for how many questions the budget has time."""
    budget, config, tokenizer = workspace.budget, workspace.experiment.evaluate, workspace.tokenizer()
    assert budget is not None, "the caller has one"
    model, trained = workspace.model_config(tokenizer), workspace.stages_with_model()
    most = config.limit or max(map(len, tasks))

    def ask(count: int) -> None:
        for stage in config.of:
            if stage in trained:
                params, _ = workspace.load_params(stage, model)
                engine = Engine(model, params, tokenizer, dtype=workspace.compute.dtype)
                for task in tasks:
                    _ask(workspace, engine, task, count, None)

    budget.questions = find_count(most, ask, lambda: budget.left_of("evaluate"), budget.now)
    workspace.say(f"evaluate  {format_number(budget.questions, 'question')} of each task, for which there is time")


def _missing(workspace: Workspace, tasks: list[Task]) -> dict[str, list[tuple[Task, dict[str, Any]]]]:
    """For each stage with a model, the tasks that it has no score of with the settings of now, and these settings."""
    config = workspace.experiment.evaluate
    lines = on_process_zero(lambda: [line for line in workspace.directory.read_metrics() if "of" in line])
    before = on_process_zero(lambda: _longest_answer_before(workspace))
    scores = {(line["of"], name): line for line in lines for name in line if name.startswith("score/")}
    missing = {}
    trained = workspace.stages_with_model()
    asked = [
        (task, how_asked(task, _limit(workspace), max_new_tokens=config.max_new_tokens, temperature=TEMPERATURE))
        for task in tasks
    ]
    for stage in config.of:
        if stage in trained:
            missing[stage] = []
            model = on_process_zero(lambda: workspace.directory.id_of(stage))  # noqa: B023 (called at once)
            for task, how in asked:
                score, settings = scores.get((stage, f"score/{task.name}")), {"model": model, **how}
                if score is None or not _fits(workspace, score, task, settings, before):
                    missing[stage].append((task, settings))
    return missing


def how_asked(task: Task, limit: int | None, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """What a score depends on besides the model: the questions, and how it may answer them.

    Args:
      limit: the most questions to ask.
      max_new_tokens, temperature: of an answer, where the task leaves that open.
    """
    digest = hashlib.sha256()
    for i in task.subset(limit):
        digest.update(json.dumps(task[i], sort_keys=True, default=str).encode())
    longest = task.mode.max_new_tokens if task.mode else max_new_tokens
    return {
        "questions": digest.hexdigest()[:16],
        "temperature": temperature,
        "max_new_tokens": 1 if task.kind == "multiple_choice" else longest,
    }


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
    same_count = score.get(f"count/{task.name}") == len(task.subset(_limit(workspace)))
    return same_count and (task.kind == "multiple_choice" or before == settings["max_new_tokens"])


def _keep_answers(workspace: Workspace, stage: str, result: TaskResult) -> None:
    lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n" for answer in result.answers]
    write_bytes(workspace.directory.answers(stage, result.name), "".join(lines).encode())


def _changes(workspace: Workspace, asked: Collection[tuple[str, str]]) -> list[str]:
    """What became of the answers from the model of one stage to that of the next, where one of them was asked now."""
    return [
        f"evaluate  {stage:<9} {task:<14} since {found['before']} {describe(change)}"
        for stage, found in changes(workspace.directory).items()
        for task, change in found["tasks"].items()
        if not {(stage, task), (found["before"], task)}.isdisjoint(asked)
    ]


def _log_chat_core(workspace: Workspace, metrics: Metrics, stage: str, step: int, scores: dict[str, float]) -> None:
    """Logs ChatCORE of the new scores and those from before, if all that it takes are there and one of them is new."""
    if CHANCE.keys().isdisjoint(scores):
        return
    lines = on_process_zero(lambda: [line for line in workspace.directory.read_metrics() if line.get("of") == stage])
    before = {name.removeprefix("score/"): line[name] for line in lines for name in line if name.startswith("score/")}
    value = chat_core({**before, **scores})
    if value is not None:
        metrics.log(step, of=stage, chat_core=value)
        workspace.say(f"evaluate  {stage:<9} ChatCORE {value:.4f}")


# --- CORE -------------------------------------------------------------------------------------------------------------


def _load_bundle(workspace: Workspace) -> Bundle | None:
    """The tasks of CORE, if the data folder has them and a model is to be measured by them."""
    folder = workspace.experiment.data.folder
    if folder is None or not workspace.experiment.evaluate.core:
        return None
    found = on_process_zero(lambda: str(find_bundle(folder) or ""))
    return load_bundle(found) if found else None


def _missing_core(workspace: Workspace, bundle: Bundle | None) -> dict[str, dict[str, Any]]:
    """The stages with a model that CORE is not known of with the settings of now, and these settings."""
    if bundle is None:
        return {}
    config, trained = workspace.experiment.evaluate, workspace.stages_with_model()
    lines = on_process_zero(lambda: [line for line in workspace.directory.read_metrics() if "of" in line])
    known = {line["of"]: line for line in lines if "core_per_task" in line}
    facts = [[task.label, task.shots, len(task.items), size_of(to_path(task.path))] for task in bundle.tasks]
    items = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    missing = {}
    for stage in config.core:
        if stage in trained:
            model = on_process_zero(lambda: workspace.directory.id_of(stage))  # noqa: B023 (called at once)
            settings = {"model": model, "items": items, "core_per_task": config.core_per_task}
            if any(known.get(stage, {}).get(name, "") != value for name, value in settings.items()):
                missing[stage] = settings
    return missing


def _measure_core(
    workspace: Workspace,
    model: GPTConfig,
    stage: str,
    bundle: Bundle,
    settings: dict[str, Any],
    metrics: Metrics,
) -> None:
    limit: int | None = settings["core_per_task"]
    count = sum(len(task.items) if limit is None else min(limit, len(task.items)) for task in bundle.tasks)
    fewer = "" if limit else "; --evaluate.core-per-task=500 asks fewer"
    workspace.say(f"evaluate  {stage:<9} CORE: {count:,} items of {format_number(len(bundle.tasks), 'task')}{fewer}")
    params, step = workspace.load_params(stage, model)
    result = evaluate_core(
        model,
        params,
        workspace.tokenizer(),
        bundle,
        compute=workspace.compute,
        max_per_task=limit,
        keep=workspace.directory.path / "evaluate" / stage / "core",
        progress=lambda done, total, _: metrics.progress(f"{stage} CORE", done, total),
    )
    facts = {"core": "accuracy", "core_low": "low", "core_high": "high", "core_count": "count"}
    by_task = {
        f"{name}/{label}": getattr(task, fact) for label, task in result.tasks.items() for name, fact in facts.items()
    }
    centered = {
        f"{version.replace('core', 'core_centered')}/{label}": value
        for label, task in result.tasks.items()
        for version, value in task.centered.items()
    }
    means, dtype = result.scores(), jnp.dtype(workspace.compute.dtype).name
    missing = ", ".join(result.missing)
    metrics.log(step, of=stage, **means, **by_task, **centered, core_missing=missing, dtype=dtype, **settings)
    lacking = f"; not in the bundle: {missing}" if missing else ""
    shown = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()) or "none of CORE's own tasks"
    workspace.say(f"evaluate  {stage:<9} {shown}{lacking}")
