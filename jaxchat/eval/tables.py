"""Evaluation results as tables of Markdown, each figure with its 95 % interval.

The results are what `jaxchat eval` writes as `report.json`; docs/formats.md has its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxchat.runs.progress import format_number
from jaxchat.runs.tables import core_table, interval, table

SHOWN_SOURCES = 20  # of the texts, those with the most bytes


def tables(report: Mapping[str, Any]) -> str:
    """All results of a report, a table for each kind."""
    parts = [model_line(report), _tasks(report["tasks"], report["chat_core"])]
    parts += [core_table(report["core"])] if report["core"] else []
    return "\n\n".join(part for part in [*parts, _text(report["text"])] if part)


def model_line(report: Mapping[str, Any]) -> str:
    """Which model it was, and where it ran."""
    model, machine = report["model"], report["machine"]
    return (
        f"{model['run']}, {model['stage']} at step {model['step']:,}: {model['parameters'] / 1e6:,.1f} M parameters, "
        f"vocabulary {model['vocab_size']:,}, context {model['sequence_len']:,}; {machine['device_count']} x "
        f"{machine['device_kind']}, JAX {machine['jax']}"
    )


# --- tasks ------------------------------------------------------------------------------------------------------------


def _tasks(tasks: Mapping[str, Mapping[str, Any]], chat_core: float | None) -> str:
    if not tasks:
        return ""
    ks = sorted({int(k) for entry in tasks.values() for k in entry["pass_at"]})
    header = ["task", "right", "95 % interval", "asked", "samples", *(f"pass@{k}" for k in ks), "cut", "too long",
              "longest answer", "temperature", "dtype"]  # fmt: skip
    rows = []
    for name, entry in tasks.items():
        passed = {int(k): value for k, value in entry["pass_at"].items()}
        rows.append([
            name,
            f"{entry['score']:.1%}",
            interval(entry["low"], entry["high"]),
            f"{entry['count']:,}",
            f"{entry['samples']}" if entry["samples"] > 1 else "",
            *(f"{passed[k]:.1%}" if k in passed else "" for k in ks),
            f"{entry['cut']:,}" if entry["cut"] else "",
            f"{entry['too_long']:,}" if entry["too_long"] else "",
            f"{entry['max_new_tokens']:,} tokens" if entry["max_new_tokens"] > 1 else "",
            f"{entry['temperature']:g}" if entry["temperature"] else "",
            entry["dtype"],
        ])  # fmt: skip
    lines = [table(header, rows)]
    if any(entry["samples"] > 1 and name.startswith("nanochat_") for name, entry in tasks.items()):
        lines.append("Of several samples, any right one counts in nanochat's tasks, and their mean in the others.")
    if chat_core is not None:
        lines.append(f"ChatCORE: {chat_core:.4f}, the mean of how far above chance nanochat's five tasks are.")
    return "\n\n".join(lines)


# --- text -------------------------------------------------------------------------------------------------------------


def _text(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return ""
    sources = sorted(text["sources"].items(), key=lambda item: -item[1]["bytes"])
    rows = [_source(name, entry) for name, entry in sources[:SHOWN_SOURCES]]
    if len(sources) > SHOWN_SOURCES:
        rows.append([f"{format_number(len(sources) - SHOWN_SOURCES, 'smaller source')}", *[""] * 6])
    if len(sources) > 1:
        rows.append(_source("all", text["total"]))
    header = ["text", "bits per byte", "95 % interval", "documents", "bytes", "tokens", "bytes a token"]
    return f"{table(header, rows)}\n\nBits per byte in {text['dtype']}; lower is better."


def _source(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['bits_per_byte']:.4f}",
        interval(entry["low"], entry["high"], scale=1, digits=4),
        f"{entry['documents']:,}",
        f"{entry['bytes']:,}",
        f"{entry['tokens']:,}",
        f"{entry['bytes'] / entry['tokens']:.2f}",
    ]
