"""Scores side by side in the report: of the stages, and before and after training, on the same questions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.runs.tables import interval, table

_MEASURE = re.compile(r"(greedy|pass_\d+)(?:/(.+))?")
_FACTS = ("low", "high")
_Z = "z says by how many standard errors it has changed: beyond 2 or -2 it does by chance once in twenty times."


def validation_of(rl: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, dict[str, float]]]:
    """What the first and the last evaluation of reinforcement learning measured; {} if there were not two.

    By part (`all`, a task, or `TASK/N` for its questions whose right answers have N calculations) and measure
    (`greedy`, `pass_1`, ...): `asked`, `before`, `after` with `before_low`, `before_high`, `after_low`, `after_high`,
    and as far as they are known `gained`, `lost` and `z`.

    Args:
      rl: the metrics of the stage by name, each its steps and values.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (_, values) in rl.items():
        match = _MEASURE.fullmatch(name)
        if match is None or len(values) < 2:
            continue
        measure, task = match.groups()
        part = f"/{task}" if task else ""
        facts = {"before": values[0], "after": values[-1]}
        for fact in _FACTS:
            ends = rl[f"{measure}_{fact}{part}"][1]
            facts |= {f"before_{fact}": ends[0], f"after_{fact}": ends[-1]}
        last = {"asked": f"asked{part}", **{fact: f"{measure}_{fact}{part}" for fact in ("gained", "lost", "z")}}
        facts |= {fact: rl[metric][1][-1] for fact, metric in last.items() if metric in rl}
        found.setdefault(task or "all", {})[measure] = {fact: float(value) for fact, value in facts.items()}
    return found


def measures(names: Iterable[str]) -> list[str]:
    """Those of some metrics that are measures of all questions of an evaluation: greedy, then pass_K by K."""
    found = [match[1] for name in names if (match := _MEASURE.fullmatch(name)) and match[2] is None]
    return sorted(found, key=lambda name: int(name.partition("_")[2] or 0))


def measure_name(measure: str) -> str:
    """`pass_8` as pass@8."""
    return measure.replace("_", "@")


def validation_table(validation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each measure of each part of `validation_of`."""
    rows = []
    if sum("/" not in part for part in validation) == 2:  # all questions are those of one task
        validation = {part: found for part, found in validation.items() if part != "all"}
    for part, found in validation.items():
        for number, measure in enumerate(measures(found)):
            facts = found[measure]
            asked = f"{facts['asked']:,.0f}" if "asked" in facts and number == 0 else ""
            rows.append([_part_name(part) if number == 0 else "", measure_name(measure), asked, *_before_after(facts)])
    header = ["validation questions", "", "asked", "before", "after", "wrong → right", "right → wrong", "z"]
    note = "greedy: right with the likeliest token at each place; pass@k: at least one of k sampled answers is right."
    return f"{table(header, rows)}\n\n{note} In parentheses: intervals of 95 %. {_Z}"


def changes_table(tasks: Mapping[str, Any], before: str, after: str) -> str:
    """What became of the test's answers, by task and its calculations.

    Args:
      tasks: of `jaxchat.eval.changes.changes`.
      before, after: when the two models answered, in words such as "after sft".
    """
    rows = []
    for task, change in tasks.items():
        rows.append([_part_name(task), f"{change['count']:,}", *_before_after(change)])
        for number, own in change.get("calculations", {}).items():
            rows.append([_part_name(f"{task}/{number}"), f"{own['count']:,}", *_before_after(own)])
    header = ["held-out questions", "asked", before, after, "wrong → right", "right → wrong", "z"]
    return f"Question by question, {before} and {after}:\n\n{table(header, rows)}\n\n{_Z}"


def scores_table(
    scores: Mapping[str, Mapping[str, float]], facts: Mapping[str, Mapping[str, Any]], moments: Sequence[str]
) -> str:
    """The scores of each task by stage: a row for each way in which it was asked, so that those in one row compare.

    Args:
      scores: of the stages, by task.
      facts: what else is known of a stage's score, by task: `count`, `low` and `high`, `cut` and so on.
      moments: when each stage's model answered, in words such as "after sft".
    """
    tasks = dict.fromkeys(task for found in scores.values() for task in found)
    rows = [row for task in tasks for row in _score_rows(task, scores, facts)]
    return table(["held-out questions", *moments, "asked", "cut", "longest answer"], rows)


def _score_rows(task: str, scores: Mapping[str, Any], facts: Mapping[str, Any]) -> list[list[str]]:
    ways: dict[tuple, dict[str, Any]] = {}
    for stage in scores:
        if task in scores[stage]:
            entry = {"score": scores[stage][task], **facts.get(stage, {}).get(task, {})}
            way = tuple(entry.get(name) for name in ("count", "questions", "max_new_tokens", "temperature"))
            ways.setdefault(way, {})[stage] = entry
    rows = []
    for (count, _, longest, _), entries in ways.items():
        shares = [_share(entries[stage]) if stage in entries else "" for stage in scores]
        cut = ", ".join(f"{entries[stage].get('cut') or 0:,}" for stage in entries)
        cut = cut if any(entry.get("cut") for entry in entries.values()) else ""
        asked = f"{count:,}" if count is not None else ""
        rows.append([task.replace("_", " "), *shares, asked, cut, f"{longest:,} tokens" if longest else ""])
    return rows


def _share(entry: dict[str, Any]) -> str:
    """A score in percent, with its interval where that is known."""
    ends = interval(entry.get("low"), entry.get("high"))
    return f"{entry['score']:.1%}" + (f" ({ends})" if ends else "")


def _part_name(part: str) -> str:
    task, _, number = part.partition("/")
    name = "all of them" if task == "all" else task.replace("_", " ")
    return f"{name}, {number} {'calculation' if number == '1' else 'calculations'}" if number else name


def _before_after(facts: Mapping[str, float]) -> list[str]:
    shares = [
        f"{facts[when]:.1%} ({interval(facts[f'{when}_low'], facts[f'{when}_high'])})" for when in ("before", "after")
    ]
    counts = [f"{facts[name]:,.0f}" if name in facts else "" for name in ("gained", "lost")]
    return [*shares, *counts, f"{facts['z']:.1f}" if "z" in facts else ""]
