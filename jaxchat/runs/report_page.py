"""The report of a run as a page of Markdown, `report.md`, made of what `report.json` has."""

from __future__ import annotations

import itertools
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

from jaxchat.config import model_width
from jaxchat.runs.comparison import changes_table, scores_table, validation_table
from jaxchat.runs.progress import format_count, format_duration, format_left_out
from jaxchat.runs.tables import core_means, core_table, table
from jaxchat.runs.time_budget import describe as describe_budget
from jaxchat.verbatim import without_controls

SHORT = 160  # characters of a text that is a line among others
_CAPTIONS = {
    "evaluation.png": "Held-out questions answered correctly after each stage, in percent, with 95 % intervals.",
    "loss.png": "Training loss: measured (thin) and its trend (thick). The first steps of pretraining are cut off.",
    "bpb.png": "Bits per byte on validation text; lower is better.",
    "core.png": "CORE on a sample of its tasks during pretraining: 0 is guessing, 1 is everything right.",
    "task_scores.png": "A sample of held-out questions answered correctly during training, in percent; bands are 95 % "
    "intervals.",
    "reward.png": "Mean reward during reinforcement learning.",
    "validation.png": "Validation questions during reinforcement learning: answered right greedily (greedy) and by at "
    "least one of k sampled answers (pass@k), in percent; bands are 95 % intervals.",
    "rollouts.png": "The answers that reinforcement learning sampled: measured (thin) and the trend (thick).",
    "learning_rates.png": "Learning rates of the parameter groups.",
}
_COURSE = ("loss.png", "bpb.png", "core.png", "task_scores.png", "learning_rates.png")
_OF_RL = ("reward.png", "validation.png", "rollouts.png")
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


def page(report: dict[str, Any], plots: list[str], shown_path: str) -> str:
    sections = [
        f"# {report['name'] or 'A run'}",
        _story(report),
        _how_to_talk(report, shown_path),
        _can_do(report, plots),
        _rl(report, plots),
        _answers(report),
        _samples(report),
        _road(report),
        *(_plot(name) for name in _COURSE if name in plots),
        _settings(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _story(report: dict[str, Any]) -> str:
    config, stages = report["config"], report["stages"]
    depth = config["model"]["depth"]
    layers = f"{depth} {'layer' if depth == 1 else 'layers'}"
    size = f"{format_count(report['parameters'])} parameters ({layers}, {model_width(depth)} wide)"
    origin = _origin(next((entry for stage, entry in stages.items() if stage != "tokenizer"), {}))
    sentences = [f"A chatbot {f'that began as {origin}' if origin else 'trained from nothing'}: {size}."]
    path, sets = config["data"]["path"], config["data"]["download"]
    source = f"text from the folder `{Path(path).name}`" if path else "stories of a small world that jaxchat made up"
    if sets:
        source = f"text ({sets[0].partition(':')[0]})"
    read = stages.get("pretrain", {}).get("tokens")
    later = [stages.get(stage, {}) for stage in ("midtrain", "sft")]
    heard = round(sum((entry.get("tokens") or 0) * (1 - entry.get("text_fraction", 0)) for entry in later))
    if read:
        then = f", then {format_count(heard)} tokens of conversations" if heard else ""
        sentences.append(f"It has read {format_count(read)} tokens of {source}{then}.")
    scores = _scores(report["evaluation"])
    if scores:
        stage, found = list(scores.items())[-1]
        facts = report.get("scores", {}).get(stage, {})
        asked = {task: f" of {facts[task]['count']:,}" if "count" in facts.get(task, {}) else "" for task in found}
        results = ", ".join(f"{task.replace('_', ' ')} {score:.0%}{asked[task]}" for task, score in found.items())
        when = _after(stage, report).capitalize()
        sentences.append(f"{when} it answers these shares of held-out questions correctly: {results}.")
    if stages:
        sentences.append(
            f"All of it took {format_duration(report['seconds'])}{_on(report['machine'])}{_for(report['cost'])}."
        )
    return textwrap.fill(" ".join(sentences), 120)


def _origin(entry: dict[str, Any]) -> str:
    """What a stage was imported from, in words; empty for one that was made here."""
    imported = entry.get("imported")
    if not imported:
        return ""
    if "run" in imported:
        return f"the {imported['stage']} model of {Path(imported['run']).name}"
    program = {"hf": "transformers"}.get(imported["from"], imported["from"])
    return f"a model of {program} ({Path(imported.get('file') or '').name})"


def _after(stage: str, report: dict[str, Any]) -> str:
    """When the model of a stage answered, in words: one that was imported in the stage's place was there before."""
    return "at the start" if report["stages"].get(stage, {}).get("imported") else f"after {stage}"


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
        moments = [_after(stage, report) for stage in scores]
        parts.append(scores_table(scores, report.get("scores", {}), moments))
        if any("low" in facts for found in report.get("scores", {}).values() for facts in found.values()):
            parts.append("In parentheses: the interval that holds the score of such questions with 95 % confidence.")
    elif report["stages"].get("evaluate", {}).get("skipped"):
        parts.append("No questions were asked: nothing was taught whose answers can be checked.")
    if changes := report.get("changes"):
        stage, found = list(changes.items())[-1]
        parts.append(changes_table(found["tasks"], _after(found["before"], report), _after(stage, report)))
    if chat_core := report.get("chat_core"):
        values = ", ".join(f"{value:.4f} {_after(stage, report)}" for stage, value in chat_core.items())
        parts.append(f"ChatCORE, the mean of how far above chance nanochat's five tasks are: {values}.")
    if "evaluation.png" in plots:
        parts.append(_plot("evaluation.png"))
    parts += [f"CORE, {_after(stage, report)}:\n\n{core_table(core)}" for stage, core in report.get("core", {}).items()]
    # Two sentences: a byte of what the assistant says is far easier to predict than one of a book.
    for stages, what in ((("pretrain",), "text"), (("midtrain", "sft"), "what the assistant says in conversations")):
        bpb = {stage: report["evaluation"].get(stage, {}).get("bpb") for stage in stages}
        values = ", ".join(f"{value:.3f} {_after(stage, report)}" for stage, value in bpb.items() if value is not None)
        if values:
            parts.append(f"Bits per byte of {what}, held out: {values}.")
    measured = report["stages"].get("pretrain", {}).get("metrics", {})
    if means := core_means(measured):
        values = "; ".join(f"{core_name(name)}, {measured[name]:.4f}" for name in means)
        parts.append(f"CORE on a sample of its tasks, at the end of pretraining: {values} (0 is guessing).")
    return "\n\n".join(["## What it can do", *parts]) if parts else ""


def _rl(report: dict[str, Any], plots: list[str]) -> str:
    """What reinforcement learning changed, if it has trained."""
    parts, rewards = [], report["rl"]
    if "reward_before" in rewards:
        before, after = rewards["reward_before"], rewards["reward_after"]
        parts.append(
            f"Mean reward on validation questions: {before:.3f} before reinforcement learning, {after:.3f} after it."
        )
    if validation := rewards.get("validation"):
        parts.append(validation_table(validation))
    parts += _rl_facts(report["stages"].get("rl", {}), report["config"]["rl"])
    parts += [_plot(name) for name in _OF_RL if name in plots]
    return "\n\n".join(["## What reinforcement learning changed", *parts]) if parts else ""


def core_name(metric: str) -> str:
    """`core_v1` and `centered_mean_v1_of_18` in words."""
    version, _, count = metric.partition("_v")[2].partition("_of_")
    return f"mean of {count} tasks, baselines v{version}" if count else f"CORE, baselines v{version}"


def _rl_facts(entry: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What the answers sampled in reinforcement learning had to teach, where its record tells."""
    idle, cut = entry.get("groups_without_signal"), entry.get("cut")
    sentences = []
    if idle == 1:
        result = "learnt nothing from rewards" if config["kl"] or config["entropy"] else "changed nothing"
        sentences.append(f"Reinforcement learning {result}: all answers to a question were always worth the same.")
    elif idle is not None:
        sentences.append(f"In reinforcement learning, {idle:.1%} of the questions taught nothing: all answers to one "
                         "were worth the same.")  # fmt: skip
    if cut:
        sentences.append(f"{cut:.1%} of its answers had no room to end.")
    if retired := entry.get("questions_retired"):
        sentences.append(f"{retired:.1%} of all its questions were solved, and not asked again.")
    return [" ".join(sentences)] if sentences else []


def _answers(report: dict[str, Any]) -> str:
    parts = []
    for stage, tasks in report.get("answers", {}).items():
        for task, answers in tasks.items():
            shown = "\n\n".join(_answer_text(answer) for answer in answers)
            parts.append(f"{task.replace('_', ' ').capitalize()}, {_after(stage, report)}:\n\n{shown}")
    return "\n\n".join(["## What it answers", *parts]) if parts else ""


def _answer_text(answer: dict[str, Any]) -> str:
    marks = [f"score {answer['score']:g}", *(["cut"] if answer["cut"] else [])]
    right = f"; right: {answer['right']}" if answer["score"] < 1 and answer["right"] else ""
    return _fenced(f"> {answer['question']}\n{_spoken(answer['answer'])}\n({', '.join(marks)}{right})")


def _samples(report: dict[str, Any]) -> str:
    parts = []
    for stage, entry in report["stages"].items():
        texts = [_sample_text(stage, sample) for sample in entry.get("samples") or []]
        if texts:
            parts.append(f"After {stage}:\n\n" + "\n\n".join(map(_fenced, _in_blocks(texts))))
    return "\n\n".join(["## What it says", *parts]) if parts else ""


def _sample_text(stage: str, sample: dict[str, str]) -> str:
    prompt, completion = sample["prompt"], _spoken(sample["completion"])
    return prompt + completion if stage == "pretrain" else f"> {prompt}\n{completion}"


def _in_blocks(texts: list[str]) -> list[str]:
    """Texts that are a short line each, such as sentences that end with a fact, are lines of one block."""
    blocks = []
    for is_line, group in itertools.groupby(texts, lambda text: len(text) <= SHORT and "\n" not in text):
        together = list(group)
        blocks += ["\n".join(together)] if is_line else together
    return blocks


def _fenced(text: str) -> str:
    """A fenced block, since a model's text is not Markdown."""
    text = without_controls(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _spoken(completion: str) -> str:
    """A completion with its calls of tools as one reads them."""
    return _TOOL_CALL.sub(_tool_call, completion)


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
            "skipped" if entry.get("skipped") else _origin(entry) or _DONE.get(stage, ""),
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
    price = report["config"]["cost"]["dollars_per_device_hour"]
    note = f"\n\nCost at ${price:,.2f} per device-hour." if report["cost"] else ""
    waited = ", ".join(
        f"{stage} {entry['input_share']:.1%}" for stage, entry in stages.items() if "input_share" in entry
    )
    waits = (
        f"\n\nShare of the steps' time spent waiting for batches (in rl: sampling them): {waited}." if waited else ""
    )
    missing = [s for s in report["config"]["stages"] if s not in stages and s != "report"]
    stale = report.get("stale", {})
    missing = [stage for stage in missing if stage not in stale]
    unfinished = f"\n\nNot finished: {', '.join(missing)}." if missing else ""
    for stage, older in stale.items():
        unfinished += f"\n\nLeft out: {stage}, which was made from an earlier {older}."
    diverged = "".join(
        f"\n\n{stage}: {_went_back(entry)}" for stage, entry in stages.items() if entry.get("divergences")
    )
    turned = "".join(f"\n\n{stage}: {describe_turn(entry)}." for stage, entry in stages.items() if "turned" in entry)
    described = [(stage, describe(entry)) for stage, entry in stages.items() for describe in (_text, describe_data)]
    lines = [f"- {stage}: {line}." for stage, line in described if line]
    data = "\n\nIts data:\n\n" + "\n".join(lines) if lines else ""
    budget = f"\n\nOf its budget, {describe_budget(report['budget'])}." if report.get("budget") else ""
    road = table(header, rows, left=2)
    return f"## How it got there\n\n{road}{note}{budget}{waits}{unfinished}{diverged}{turned}{data}"


def _text(entry: dict[str, Any]) -> str:
    """Which text was read to train on and which for validation, and why, from a stage's record."""
    text = entry.get("text") or {}
    train, held_out = ", ".join(text.get("train_files", [])), ", ".join(text.get("val_files", []))
    if not train:
        return ""
    parts = [f"trained on {train}", f"validated on {held_out} ({text.get('how_split', '')})"]
    parts += [f"txt: {text['cut']}"] if text.get("cut") else []
    parts += [f"not read: {'; '.join(text['left_out'])}"] if text.get("left_out") else []
    return "; ".join(parts)


def describe_data(entry: dict[str, Any]) -> str:
    """Describes how full a stage's rows were and what was left out of its text, from its record."""
    parts = []
    packing = entry.get("packing", {})
    if "utilisation" in packing:
        parts.append(f"rows {packing['utilisation']:.1%} full")
        if packing.get("documents"):
            cut = packing.get("cut", 0) / packing["documents"]
            parts.append(f"0 tokens cropped, {cut:.1%} of documents cut into pieces")
    if share := entry.get("text_fraction"):
        parts.append(f"{share:.1%} of the rows are text of pretraining")
    if left_out := entry.get("left_out"):
        parts.append(f"left out: {format_left_out(left_out)}")
    return "; ".join(parts)


def describe_turn(entry: dict[str, Any]) -> str:
    """Says from a stage's record where validation turned, if it did, and what follows."""
    turned, step = entry["turned"], f"step {entry['result_step']:,}"
    measured = f"{turned['bpb']:.3f} bits per byte; {turned['bpb_at_end']:.3f} at the end"
    return f"validation turned at {step} ({measured}): the result is {step}"


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
    return "## Settings\n\n" + table(["", ""], rows, left=2) + "\n\n`config.json` has all settings."


def _plot(name: str) -> str:
    return f"![{name.removesuffix('.png').replace('_', ' ')}](plots/{name})\n\n*{_CAPTIONS[name]}*"


def _scores(evaluation: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    scores = {stage: {k: v for k, v in found.items() if k != "bpb"} for stage, found in evaluation.items()}
    return {stage: found for stage, found in scores.items() if found}
