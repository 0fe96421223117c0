"""The report of a run: what was trained, on what and for how long, what it can do, and how to talk to it.

`write_report` reads what the stages left (`config.json`, `metrics.jsonl`, the records and answers of the stages) and
writes `report.json` for programs, `report.md` for people, and `plots/*.png`. The report leaves out what a run does not
have, and what was made from something that has been made again since.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from etils import epath

from jaxchat.config import STAGES, CostConfig, Experiment
from jaxchat.runs.comparison import validation_of
from jaxchat.runs.directory import TRAINED, RunDirectory
from jaxchat.runs.files import Object, read_lines, write_bytes, write_json
from jaxchat.runs.plots import Curve, all_plots, curves
from jaxchat.runs.records import turned_at
from jaxchat.runs.report_page import page
from jaxchat.runs.rl_plots import rl_plots
from jaxchat.runs.tables import VERSIONS, core_means
from jaxchat.runs.time_budget import read_record as read_budget

EXAMPLES = 3  # answers of each task that the report shows
_ANSWER = Object({"question": str, "answer": str, "right": str, "score": float, "cut": bool})


def write_report(
    directory: RunDirectory,
    *,
    vocab_size: int,
    parameters: int,
    changes: Mapping[str, Any] = MappingProxyType({}),
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes `report.json`, `report.md` and `plots/*.png` into a run directory.

    Args:
      vocab_size: the size of the run's vocabulary.
      parameters: the number of the model's parameters.
      changes: what became of the test's answers from stage to stage (`jaxchat.eval.changes`).
      say: takes lines for the user.

    Raises:
      UserError: it is not a run directory, or a file in it is damaged or cannot be written.
    """
    run_dir, records = directory.path, directory.read_metrics(say)
    report = {**build_report(directory, records, vocab_size, parameters), "changes": dict(changes)}
    turned = {stage: step for stage, entry in report["stages"].items() if (step := turned_at(entry)) is not None}
    plots = all_plots(records, _asked_alike(records, report["scores"]), turned) | rl_plots(records)
    for name, png in plots.items():
        write_bytes(run_dir / "plots" / name, png)
    write_json(run_dir / "report.json", report)
    write_bytes(run_dir / "report.md", page(report, list(plots), _shown_path(run_dir)).encode())


def build_report(
    directory: RunDirectory, records: list[dict[str, Any]], vocab_size: int, parameters: int
) -> dict[str, Any]:
    """The contents of `report.json`, from a run directory, its metrics, and the arguments of `write_report`.

    Each entry of `stages` is the stage's record with its `cost`, its median speed, the last value of each of its
    `metrics` and the last `samples` up to its result. `seconds` are wall-clock seconds. `cost` is in dollars at the
    experiment's price of a device-hour; None on a CPU, which that price is not for. `evaluation` has the `bpb` of each
    stage's result and the share of each task answered correctly, `scores` the same shares with their intervals and the
    settings they were measured with, `chat_core` ChatCORE by stage, `core` for each stage that was measured by it the
    means and the tasks of CORE, `answers` a few answers of the last stage that was scored, `rl` the reward before and
    after, and `validation` (`comparison.validation_of`), if it was evaluated. `stale` has the stages that are left out,
    with what was made again since they were made from it. `budget` is what `RUN/budget.json` had when the report was
    written; None without one.
    """
    experiment = directory.read_config()
    records_of = {stage: record for stage in STAGES if (record := directory.read_record(stage)) is not None}
    stale = {stage: older for stage in records_of if (older := directory.stale(stage)) is not None}
    stages = {stage: record for stage, record in records_of.items() if stage not in stale}
    by_stage = curves(records)
    for stage, entry in stages.items():
        own = [record for record in records if record["stage"] == stage]
        last = {name: float(values[-1]) for name, (_, values) in by_stage.get(stage, {}).items()}
        entry["metrics"] = {**last, **entry.get("metrics", {})}
        entry["samples"] = entry.get("samples") or _last_samples(own, turned_at(entry))
        entry["cost"] = _cost(experiment.cost, entry)
        entry.update(_speed(own))
    costs = [entry["cost"] for entry in stages.values() if entry["cost"] is not None]
    longest = max(stages.values(), key=lambda entry: entry.get("seconds") or 0, default={})
    return {
        "name": experiment.name,
        "vocab_size": vocab_size,
        "parameters": parameters,
        "seconds": sum(entry.get("seconds") or 0 for entry in stages.values()),
        "cost": sum(costs) if costs else None,
        "evaluation": _evaluation(stages, records),
        "scores": (scores := _scores_with_settings(records)),
        "chat_core": {record["of"]: record["chat_core"] for record in records if "chat_core" in record},
        "core": _core(records),
        "answers": _answers(directory, scores),
        "rl": _rl(by_stage.get("rl", {})),
        "stages": stages,
        "stale": stale,
        "budget": read_budget(directory.path),
        "machine": longest.get("machine", {}),
        "config": _config_as_made(directory, experiment, list(stages)),
    }


def _config_as_made(directory: RunDirectory, experiment: Experiment, stages: list[str]) -> dict[str, Any]:
    """The experiment with the settings that each stage was made with, which later starts need not repeat."""
    config = dataclasses.asdict(experiment)
    for stage in stages:
        before = directory.config_of(stage)
        if before is None or stage not in ("tokenizer", *TRAINED):
            continue
        made = dataclasses.asdict(before)
        config[stage] = made[stage]
        if stage == "pretrain":
            config |= {name: made[name] for name in ("data", "seed", "precision", "model", "optimizer")}
    return config


def _cost(price: CostConfig, entry: dict[str, Any]) -> float | None:
    machine = entry.get("machine", {})
    if machine.get("platform") == "cpu":
        return None
    hours = (entry.get("seconds") or 0) / 3600
    return price.dollars(hours, machine.get("device_count", price.devices))


def _speed(records: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the stage's steps, which exclude compilation and evaluations.

    `input_share` is the share of the steps' time spent waiting for batches (in RL: sampling them).
    """
    medians = {}
    for name in ("tokens_per_second", "mfu", "step_seconds"):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            medians[name] = statistics.median(values)
    pairs = [(r["input_seconds"], r["step_seconds"]) for r in records if r.get("input_seconds") is not None]
    if pairs:
        waited, taken = map(sum, zip(*pairs, strict=True))
        medians["input_share"] = waited / taken
    return medians


def _last_samples(records: list[dict[str, Any]], up_to: int | None) -> list[dict[str, str]]:
    samples = [record for record in records if "sample" in record and "prompt" in record]
    samples = [record for record in samples if up_to is None or record["step"] <= up_to]
    last = max((record["step"] for record in samples), default=0)
    return [{"prompt": r["prompt"], "completion": r["sample"]} for r in samples if r["step"] == last]


def _evaluation(stages: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for stage, entry in stages.items():
        if "bpb" in entry["metrics"]:
            results[stage]["bpb"] = entry.get("turned", entry["metrics"])["bpb"]
    for record in records:
        for name, value in record.items():
            if "of" in record and name.startswith("score/") and value is not None:
                results.setdefault(record["of"], {})[name.removeprefix("score/")] = value
    return {stage: found for stage, found in results.items() if found}


def _scores_with_settings(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """For each stage and task its last score: `score`, `count`, and what else is known of how it was measured."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in records:
        for name in record:
            if "of" in record and name.startswith("score/") and record[name] is not None:
                task = name.removeprefix("score/")
                facts = {
                    fact: record.get(f"{fact}/{task}") for fact in ("score", "low", "high", "count", "cut", "too_long")
                }
                facts |= {fact: record.get(fact) for fact in ("max_new_tokens", "temperature", "questions")}
                known = {fact: value for fact, value in facts.items() if value is not None}
                found.setdefault(record["of"], {})[task] = known
    return {stage: found[stage] for stage in STAGES if stage in found}


def _core(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each stage its last CORE, in the form of `tables.core_table`."""
    found = {}
    for record in records:
        labels = [name.removeprefix("core/") for name in record if name.startswith("core/")]
        if "of" not in record or not labels:
            continue
        tasks = {
            label: {
                "accuracy": record[f"core/{label}"],
                **{fact: record.get(f"core_{fact}/{label}") for fact in ("low", "high", "count")},
                "centered": {
                    version: value
                    for version in VERSIONS
                    if (value := record.get(f"{version.replace('core', 'core_centered')}/{label}")) is not None
                },
            }
            for label in labels
        }
        found[record["of"]] = {
            **{name: record[name] for name in core_means(record)},
            "tasks": tasks,
            "missing": [label for label in (record.get("core_missing") or "").split(", ") if label],
            "max_per_task": record.get("core_per_task"),
            "dtype": record.get("dtype"),
        }
    return {stage: found[stage] for stage in STAGES if stage in found}


_FACTS = ("score", "low", "high", "count", "cut", "too_long")
_WAY = ("count", "questions", "max_new_tokens", "temperature")


def _asked_alike(records: list[dict[str, Any]], scores: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The `scores` that can stand in one picture: of each task those asked in the way in which it was asked last."""
    asked = [(record["of"], name.partition("/")[2]) for record in records if "of" in record for name in record
             if name.startswith("score/")]  # fmt: skip
    last = {task: scores[stage][task] for stage, task in asked if task in scores.get(stage, {})}
    alike = {
        stage: {
            task: entry
            for task, entry in found.items()
            if all(entry.get(fact) == last[task].get(fact) for fact in _WAY)
        }
        for stage, found in scores.items()
    }
    return {stage: found for stage, found in alike.items() if found}


def _answers(directory: RunDirectory, scores: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """A few answers to each task of the last stage that was scored."""
    if not scores:
        return {}
    stage = list(scores)[-1]
    found = {}
    for task in scores[stage]:
        kept, _ = read_lines(directory.answers(stage, task), _ANSWER, "delete it")
        if kept:
            found[task] = [kept[i * len(kept) // EXAMPLES] for i in range(min(EXAMPLES, len(kept)))]
    return {stage: found} if found else {}


def _rl(rl: dict[str, Curve]) -> dict[str, Any]:
    _, rewards = rl.get("reward_eval", ((), ()))
    found: dict[str, Any] = {}
    if len(rewards) > 1:
        found = {"reward_before": float(rewards[0]), "reward_after": float(rewards[-1])}
    validation = validation_of(rl)
    return {**found, "validation": validation} if validation else found


def _shown_path(run_dir: epath.Path) -> str:
    """The path as one would type it: relative if the run is below the working directory."""
    return os.fspath(run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir)
