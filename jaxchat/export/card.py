"""The model card: the README.md of an exported model, for people and for the hub."""

from __future__ import annotations

import textwrap
from typing import Any

from jaxchat.errors import UserError
from jaxchat.eval.statistics import wilson_interval
from jaxchat.infer.trained import TrainedModel
from jaxchat.model.parameters import count_parameters
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.progress import format_count
from jaxchat.runs.records import result_step
from jaxchat.runs.report import build_report

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # this folder, or the name of its repository on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
{inputs}
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""
_CHAT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
_BASE = 'inputs = tokenizer("The capital of France is", return_tensors="pt")  # begins with <|bos|>'


def model_card(model: TrainedModel, directory: RunDirectory, step: int | None, *, title: str, dtype: str) -> str:
    """The model card of a run's model, Markdown.

    Args:
      step: the step of its checkpoint, None if unknown. What was measured is of the stage's result, and is left out for
        another step.
    """
    config, base = model.model, model.stage == "pretrain"
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nanochat", "- jaxchat"]
    at = f", after {step:,} steps" if step else ""
    what = (
        "a base model, which continues text: it has not learned to answer"
        if base
        else "a chat model; roles alternate, and a system message is joined to the first question"
    )
    chain = _chain(directory, model.stage)
    imported = any("imported" in record for _, record in chain)
    origin = "of nanochat's architecture, imported into jaxchat" if imported else "trained from nothing with jaxchat"
    made = "" if "imported" in chain[-1][1] else f" It is what the stage {model.stage} made{at}."
    about = f"A language model {origin}: {what}.{made}"
    heads = f"{config.num_heads} of {config.head_dim}"
    heads += "" if config.kv_heads == config.num_heads else f", {config.kv_heads} of them with keys and values"
    facts = [
        ("parameters", format_count(exported_parameters(model))),
        ("layers, width", f"{config.depth}, {config.width:,}"),
        ("heads", heads),
        ("context", f"{config.sequence_len:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("weights", dtype),
    ]
    records = [(stage, _steps(record), _count(record.get("tokens"))) for stage, record in chain if record.get("steps")]
    measured = step in (None, result_step(chain[-1][1]))
    sections = [
        "\n".join(["---", *header, "---"]),
        f"# {title}",
        textwrap.fill(about, 100),
        _table([("", ""), *facts]),
        "## Use",
        "transformers 5.0 or later has the architecture as NanoChat.",
        _USE.format(inputs=_BASE if base else _CHAT),
        "Tools that the model was taught to call, such as the calculator, are part of jaxchat, not of the model.",
        *(["## Training", _table([("stage", "steps", "tokens"), *records])] if records else []),
        *(_measured(model, directory) if measured else []),
    ]
    return "\n\n".join(sections) + "\n"


def exported_parameters(model: TrainedModel) -> int:
    """The number of parameters, without those that only pad the vocabulary."""
    config = model.model
    padding = 2 * (config.padded_vocab_size - config.vocab_size) * config.width
    return count_parameters(config).total - padding


def _chain(directory: RunDirectory, stage: str) -> list[tuple[str, dict[str, Any]]]:
    """The stages that led to this one, in order, and their records."""
    record = directory.read_record(stage) or {}
    parent = (record.get("parent") or {}).get("stage")
    return [*(_chain(directory, parent) if parent else []), (stage, record)]


def _steps(record: dict[str, Any]) -> str:
    """Those that were done, and the one whose model is used if that is another."""
    used = f"{_count(result_step(record))} of " if "turned" in record else ""
    return used + _count(record["steps"])


def _count(number: int | None) -> str:
    return format_count(number) if number else ""


def _measured(model: TrainedModel, directory: RunDirectory) -> list[str]:
    try:
        parameters = count_parameters(model.model).total
        report = build_report(directory, directory.read_metrics(), model.model.vocab_size, parameters)
    except UserError:  # a damaged file of metrics or answers, which a model card is no reason to refuse
        return []
    bpb = report["evaluation"].get(model.stage, {}).get("bpb")
    rows = []
    for task, facts in report["scores"].get(model.stage, {}).items():
        count, score = facts.get("count"), facts["score"]
        interval = ""
        if count:
            low, high = wilson_interval(score, count)
            interval = f"{low:.1%} to {high:.1%}"
        rows.append((task, f"{score:.1%}", interval, "" if count is None else f"{count:,}"))
    found = []
    if rows:
        found.append(_table([("held-out questions", "right", "95 % interval", "number"), *rows]))
        found.append(
            "They were asked as docs/evaluation.md of jaxchat says: do not compare with other programs' scores."
        )
    if bpb is not None:
        found.append(f"Bits per byte of held-out text: {bpb:.3f}.")
    return ["## Evaluation", *found] if found else []


def _table(rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
