"""The report of a run: what was trained, on what and for how long, what it can do, and how to talk to it.

`write_report` reads what the stages left (`config.json`, `metrics.jsonl`, `STAGE/stage.json`) and writes `report.json`
for programs, `report.md` for people, and `plots/*.png`. The report leaves out what a run does not have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import statistics
import textwrap
from pathlib import Path
from typing import Any

from etils import epath

from jaxchat.config import STAGES, CostConfig, model_width
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.metrics import read_metrics
from jaxchat.runs.plots import Curve, all_plots, curves
from jaxchat.runs.progress import format_count, format_duration
from jaxchat.verbatim import without_controls

_CAPTIONS = {
    "evaluation.png": "Held-out questions answered correctly after each stage, in percent.",
    "loss.png": "Training loss: measured (thin) and its trend (thick). The first steps of pretraining are cut off.",
    "bpb.png": "Bits per byte on validation text; lower is better.",
    "reward.png": "Mean reward during reinforcement learning.",
    "learning_rates.png": "Learning rates of the parameter groups.",
}
_TOOL_CALL = re.compile(
    r"<\|python_start\|>(.*?)<\|python_end\|>(?:<\|output_start\|>(.*?)<\|output_end\|>)?", re.DOTALL
)
_DONE = {
    "tokenizer": "learned the vocabulary",
    "pretrain": "read text",
    "midtrain": "learned to hold a conversation",
    "sft": "learned to answer",
    "rl": "practiced on questions with checkable answers",
    "evaluate": "answered held-out questions",
}


def write_report(directory: RunDirectory, *, vocab_size: int, parameters: int) -> None:
    """Writes `report.json`, `report.md` and `plots/*.png` into a run directory.

    Args:
      vocab_size: the size of the run's vocabulary.
      parameters: the number of the model's parameters.

    Raises:
      UserError: it is not a run directory, or a file in it is damaged.
    """
    run_dir, records = directory.path, read_metrics(directory.path)
    report = build_report(directory, records, vocab_size, parameters)
    plots = all_plots(records, _scores(report["evaluation"]))
    (run_dir / "plots").mkdir(parents=True, exist_ok=True)
    for name, png in plots.items():
        (run_dir / "plots" / name).write_bytes(png)
    (run_dir / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    (run_dir / "report.md").write_text(_markdown(report, list(plots), _shown_path(run_dir)))


def build_report(
    directory: RunDirectory, records: list[dict[str, Any]], vocab_size: int, parameters: int
) -> dict[str, Any]:
    """The contents of `report.json`, from a run directory, its `read_metrics`, and the arguments of `write_report`.

    Each entry of `stages` is the stage's record with its `cost`, its median speed, the last value of each of its
    `metrics` and its last `samples`. `seconds` are wall-clock seconds. `cost` is in dollars at the experiment's price
    of a device-hour; None on a CPU, which that price is not for. `evaluation` has each stage's `bpb` and the share of
    each task answered correctly, `rl` the reward before and after if it was evaluated.
    """
    experiment = directory.read_config()
    stages = {stage: record for stage in STAGES if (record := directory.read_record(stage)) is not None}
    by_stage = curves(records)
    for stage, entry in stages.items():
        own = [record for record in records if record["stage"] == stage]
        last = {name: float(values[-1]) for name, (_, values) in by_stage.get(stage, {}).items()}
        entry["metrics"] = {**last, **entry.get("metrics", {})}
        entry["samples"] = entry.get("samples") or _last_samples(own)
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
        "rl": _reward(by_stage.get("rl", {})),
        "stages": stages,
        "machine": longest.get("machine", {}),
        "config": dataclasses.asdict(experiment),
    }


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


def _last_samples(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    samples = [record for record in records if "sample" in record and "prompt" in record]
    last = max((record["step"] for record in samples), default=0)
    return [{"prompt": r["prompt"], "completion": r["sample"]} for r in samples if r["step"] == last]


def _evaluation(stages: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for stage, entry in stages.items():
        if "bpb" in entry["metrics"]:
            results[stage]["bpb"] = entry["metrics"]["bpb"]
    for record in records:
        for name, value in record.items():
            if "of" in record and name.startswith("score/") and value is not None:
                results.setdefault(record["of"], {})[name.removeprefix("score/")] = value
    return {stage: found for stage, found in results.items() if found}


def _reward(rl: dict[str, Curve]) -> dict[str, float]:
    _, rewards = rl.get("reward_eval", ((), ()))
    return {"reward_before": float(rewards[0]), "reward_after": float(rewards[-1])} if len(rewards) > 1 else {}


def _scores(evaluation: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    scores = {stage: {k: v for k, v in found.items() if k != "bpb"} for stage, found in evaluation.items()}
    return {stage: found for stage, found in scores.items() if found}


# --- report.md -----------------------------------------------------------------------------------------------------


def _markdown(report: dict[str, Any], plots: list[str], shown_path: str) -> str:
    sections = [
        f"# {report['name'] or 'A run'}",
        _story(report),
        _how_to_talk(report, shown_path),
        _can_do(report, plots),
        _samples(report),
        _road(report),
        *(_plot(name) for name in ("loss.png", "bpb.png", "reward.png", "learning_rates.png") if name in plots),
        _settings(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _shown_path(run_dir: epath.Path) -> str:
    """The path as one would type it: relative if the run is below the working directory."""
    return os.fspath(run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir)


def _story(report: dict[str, Any]) -> str:
    config, stages = report["config"], report["stages"]
    depth = config["model"]["depth"]
    size = f"{format_count(report['parameters'])} parameters ({depth} layers, {model_width(depth)} wide)"
    sentences = [f"A chatbot trained from nothing: {size}."]
    path, sets = config["data"]["path"], config["data"]["download"]
    source = f"text from the folder `{Path(path).name}`" if path else "stories of a small world that jaxchat made up"
    if sets:
        source = f"text ({sets[0].partition(':')[0]})"
    read = stages.get("pretrain", {}).get("tokens")
    heard = sum(stages.get(stage, {}).get("tokens") or 0 for stage in ("midtrain", "sft"))
    if read:
        then = f", then {format_count(heard)} tokens of conversations" if heard else ""
        sentences.append(f"It has read {format_count(read)} tokens of {source}{then}.")
    scores = _scores(report["evaluation"])
    if scores:
        stage, found = list(scores.items())[-1]
        results = ", ".join(f"{task.replace('_', ' ')} {score:.0%}" for task, score in found.items())
        sentences.append(f"After {stage} it answers these shares of held-out questions correctly: {results}.")
    if stages:
        sentences.append(
            f"All of it took {format_duration(report['seconds'])}{_on(report['machine'])}{_for(report['cost'])}."
        )
    return textwrap.fill(" ".join(sentences), 120)


def _on(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    return f" on {_device(machine)}"


def _device(machine: dict[str, Any]) -> str:
    if machine["platform"] == "cpu":
        return f"{machine['cores']} CPU cores" if machine["cores"] > 1 else "one CPU core"
    return f"{machine['device_count']} × {machine['device_kind']}"


def _for(cost: float | None) -> str:
    return f" and cost ${cost:,.2f}" if cost else ""


def _how_to_talk(report: dict[str, Any], shown_path: str) -> str:
    if not any(report["stages"].get(stage, {}).get("steps") for stage in ("midtrain", "sft", "rl")):
        return ""
    return f"Talk to it:\n\n    jaxchat chat --run {shlex.quote(shown_path)}"


def _can_do(report: dict[str, Any], plots: list[str]) -> str:
    scores = _scores(report["evaluation"])
    parts = []
    if scores:
        tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
        rows = [[task.replace("_", " "), *(_percent(found.get(task)) for found in scores.values())] for task in tasks]
        parts.append(_table([["held-out questions", *(f"after {stage}" for stage in scores)], *rows]))
    if "evaluation.png" in plots:
        parts.append(_plot("evaluation.png"))
    bpb = {stage: found["bpb"] for stage, found in report["evaluation"].items() if "bpb" in found}
    if bpb:
        values = ", ".join(f"{value:.3f} after {stage}" for stage, value in bpb.items())
        parts.append(f"Bits per byte on each stage's validation text: {values}.")
    if report["rl"]:
        before, after = report["rl"]["reward_before"], report["rl"]["reward_after"]
        parts.append(
            f"Mean reward on evaluation questions: {before:.3f} before reinforcement learning, {after:.3f} after it."
        )
    return "\n\n".join(["## What it can do", *parts]) if parts else ""


def _samples(report: dict[str, Any]) -> str:
    parts = []
    for stage, entry in report["stages"].items():
        texts = [_sample_text(stage, sample) for sample in entry.get("samples") or []]
        if texts:
            parts.append(f"After {stage}:\n\n" + "\n\n".join(texts))
    return "\n\n".join(["## What it says", *parts]) if parts else ""


def _sample_text(stage: str, sample: dict[str, str]) -> str:
    """The sample as a fenced block, since a model's text is not Markdown."""
    prompt, completion = sample["prompt"], _TOOL_CALL.sub(_tool_call, sample["completion"])
    text = without_controls(prompt + completion if stage == "pretrain" else f"> {prompt}\n{completion}")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _tool_call(match: re.Match[str]) -> str:
    call, output = match.groups()
    return f"[python: {call}{'' if output is None else f' → {output}'}] "


def _road(report: dict[str, Any]) -> str:
    stages = report["stages"]
    if not stages:
        return ""
    header = ["stage", "what it did", "steps", "tokens", "time", "tokens/s", "MFU", "peak memory so far", "cost"]
    rows = []
    for stage, entry in stages.items():
        memory = entry.get("peak_memory_bytes")
        rows.append([
            stage,
            "skipped" if entry.get("skipped") else _DONE.get(stage, ""),
            f"{entry['steps']:,}" if entry.get("steps") else "",
            format_count(entry["tokens"]) if entry.get("tokens") else "",
            format_duration(entry.get("seconds") or 0),
            format_count(entry["tokens_per_second"]) if "tokens_per_second" in entry else "",
            f"{entry['mfu']:.0%}" if "mfu" in entry else "",
            f"{memory / 2**30:.1f} GiB" if memory else "",
            f"${entry['cost']:,.2f}" if entry["cost"] else "",
        ])  # fmt: skip
    total = ["**all**", "", "", "", f"**{format_duration(report['seconds'])}**", "", "", ""]
    rows.append([*total, f"**${report['cost']:,.2f}**" if report["cost"] else ""])
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    table = _table([[row[i] for i in used] for row in [header, *rows]], left=2)
    price = report["config"]["cost"]["dollars_per_device_hour"]
    note = f"\n\nCost at ${price:,.2f} per device-hour." if report["cost"] else ""
    waited = ", ".join(
        f"{stage} {entry['input_share']:.1%}" for stage, entry in stages.items() if "input_share" in entry
    )
    waits = (
        f"\n\nShare of the steps' time spent waiting for batches (in rl: sampling them): {waited}." if waited else ""
    )
    missing = [s for s in report["config"]["stages"] if s not in stages and s != "report"]
    unfinished = f"\n\nNot finished: {', '.join(missing)}." if missing else ""
    diverged = "".join(
        f"\n\n{stage}: {_went_back(entry)}" for stage, entry in stages.items() if entry.get("divergences")
    )
    lines = [f"- {stage}: {line}." for stage, entry in stages.items() if (line := describe_data(entry))]
    data = "\n\nIts data:\n\n" + "\n".join(lines) if lines else ""
    return f"## How it got there\n\n{table}{note}{waits}{unfinished}{diverged}{data}"


def describe_data(entry: dict[str, Any]) -> str:
    """Describes how full a stage's rows were and what was left out of its text, from its record."""
    parts = []
    if packing := entry.get("packing"):
        parts.append(f"rows {packing['utilisation']:.1%} full")
        if packing.get("documents"):
            cut = packing["cut"] / packing["documents"]
            parts.append(f"0 tokens cropped, {cut:.1%} of documents cut into pieces")
    if left_out := entry.get("left_out"):
        counts = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in sorted(left_out.items()))
        parts.append(f"left out of the text: {counts}")
    return "; ".join(parts)


def _went_back(entry: dict[str, Any]) -> str:
    events = entry["divergences"]
    batches = sum(event["batches"] for event in events)
    reasons = "; ".join(f"{event['why']}, back to {event['back_to']:,}" for event in events)
    times = "once" if len(events) == 1 else f"{len(events)} times"
    return f"went back to a checkpoint {times}, skipping {batches:,} batches ({reasons})."


def _settings(report: dict[str, Any]) -> str:
    config, machine = report["config"], report["machine"]
    model, optimizer = config["model"], config["optimizer"]
    rows = [
        ["model", f"depth {model['depth']}, width {model_width(model['depth'])}, "
                  f"context {model['sequence_len']:,} tokens"],
        ["tokenizer", f"{report['vocab_size']:,} tokens"],
        ["optimizer", f"Muon {optimizer['matrix_lr']:g}; AdamW {optimizer['embedding_lr']:g} (embedding), "
                      f"{optimizer['head_lr']:g} (head)"],
        *([f"batch, {stage}", f"{config[stage]['batch_tokens']:,} tokens"]
          for stage in ("pretrain", "midtrain", "sft") if stage in report["stages"]),
        ["seed", f"{config['seed']}"],
    ]  # fmt: skip
    if "rl" in report["stages"]:
        rl = config["rl"]
        shape = f"{rl['questions_per_step']} questions × {rl['samples_per_question']} samples a step"
        rows.append(["rl", f"{rl['method'].replace('_', ' ')}, {shape}"])
    if machine:
        host = "" if machine["platform"] == "cpu" else f"; host with {machine['cores']} CPU cores"
        rows.append(["machine", f"{_device(machine)}{host}, {machine['memory_bytes'] / 2**30:.0f} GiB of memory"])
        rows.append(["software", f"JAX {machine['jax']}, Python {machine['python']}"])
    return "## Settings\n\n" + _table([["", ""], *rows], left=2) + "\n\n`config.json` has all settings."


def _plot(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}](plots/{name})\n\n*{_CAPTIONS[name]}*"


def _table(rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table. The first row is the header; all but the first `left` columns are right-aligned."""
    header, *body = rows
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *body])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
