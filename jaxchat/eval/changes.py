"""What became of the answers to the test's questions from one stage to the next: the same questions, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.config import STAGES
from jaxchat.eval.statistics import paired_z, wilson_interval
from jaxchat.runs.directory import RunDirectory
from jaxchat.runs.files import Object, read_lines

_ANSWER = Object({"question": str, "score": float}, {"calculations": int})
_SETTINGS = ("questions", "max_new_tokens", "temperature")


def change_of(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """What became of questions with these scores, in [0, 1], before and after; at least one question.

    Returns `count`, the means `before` and `after`, the ends of their 95 % intervals `before_low`, `before_high`,
    `after_low` and `after_high`, how many answers have become right (`gained`) and wrong (`lost`), and of these `z`
    (`statistics.paired_z`).
    """
    right = [(old == 1, new == 1) for old, new in zip(before, after, strict=True)]
    change: dict[str, float] = {"count": len(right)}
    for name, scores in (("before", before), ("after", after)):
        mean = sum(scores) / len(scores)
        low, high = wilson_interval(mean, len(scores))
        change |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    change |= {"gained": sum(new > old for old, new in right), "lost": sum(old > new for old, new in right)}
    return {**change, "z": paired_z([new - old for old, new in right])}


def changes(directory: RunDirectory) -> dict[str, dict[str, Any]]:
    """For each stage that was evaluated after another one, the `change_of` each task, from the answers that are kept.

    Such as `{"rl": {"before": "sft", "tasks": {"gsm8k": {"count": 1319, ..., "calculations": {"2": {...}}}}}}`, where
    `calculations` has the change by the calculator's calls in the right answer, if they differ. A task is there if both
    stages answered the same questions with the same settings.
    """
    asked = {
        (line["of"], name.removeprefix("score/")): tuple(line.get(setting) for setting in _SETTINGS)
        for line in directory.read_metrics()
        if "of" in line and line.get("questions") is not None
        for name in line
        if name.startswith("score/")
    }
    scored = [stage for stage in STAGES if any(of == stage for of, _ in asked)]
    found = {}
    for before, stage in zip(scored, scored[1:], strict=False):
        tasks = {
            task: change
            for of, task in asked
            if of == stage and asked[of, task] == asked.get((before, task))
            if (change := _change(directory, before, stage, task)) is not None
        }
        if tasks:
            found[stage] = {"before": before, "tasks": tasks}
    return found


def describe(change: dict[str, Any]) -> str:
    """Such as `+26.5 points: 55 wrong to right, 2 right to wrong, z 7.0`."""
    points = 100 * (change["after"] - change["before"])
    return (
        f"{points:+.1f} points: {change['gained']:,} wrong to right, {change['lost']:,} right to wrong, "
        f"z {change['z']:.1f}"
    )


def _change(directory: RunDirectory, before: str, after: str, task: str) -> dict[str, Any] | None:
    """The change of a task; None if not all answers are there."""
    old, new = (read_lines(directory.answers(stage, task), _ANSWER, "delete it")[0] for stage in (before, after))
    if not new or [line["question"] for line in old] != [line["question"] for line in new]:
        return None
    pairs = [(one["score"], other["score"]) for one, other in zip(old, new, strict=True)]
    numbers = [line.get("calculations", 0) for line in new]
    change: dict[str, Any] = {**_of_pairs(pairs)}
    if len(set(numbers)) > 1:
        change["calculations"] = {
            str(number): _of_pairs([pair for pair, own in zip(pairs, numbers, strict=True) if own == number])
            for number in sorted(set(numbers))
        }
    return change


def _of_pairs(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return change_of([old for old, _ in pairs], [new for _, new in pairs])
