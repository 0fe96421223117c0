"""Tables and curves of what the runs of `quality_runs.py` have left."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from quality_runs import Record
from recipes import BASE, WHOLE, alone, left_out
from timing import table

from jaxchat.runs import plots


def reached(found: Record, target: float) -> tuple[float, float] | None:
    """The steps and seconds after which a run has come down to `target`, between two evaluations by a straight line.

    Those of the first evaluation, where that is below it already. None if the run has not come down to it.
    """
    before = None
    for step, seconds, bpb in found["curve"]:
        if bpb is not None and bpb <= target:
            if before is None:
                return float(step), seconds
            share = (before[2] - target) / (before[2] - bpb)
            return before[0] + share * (step - before[0]), before[1] + share * (seconds - before[1])
        before = None if bpb is None else (step, seconds, bpb)
    return None


def summary(records: Sequence[Record], target: float | None = None) -> dict[str, Any]:
    """Means over the seeds of one recipe; None for what one of them lacks."""
    curves = [{step: bpb for step, _, bpb in one["curve"]} for one in records]
    lasts = [one["curve"][-1][2] for one in records]
    there = [None if target is None else reached(one, target) for one in records]
    return {
        "seeds": len(records),
        "bpb": {step: _mean([curve.get(step) for curve in curves]) for step in curves[0]},
        "last": _mean(lasts),
        "spread": None if None in lasts or len(lasts) < 2 else max(lasts) - min(lasts),
        "step_ms": _mean([one["step_ms"] for one in records]),
        "seconds": _mean([one["seconds"] for one in records]),
        "steps_to_target": _mean([each and each[0] for each in there]),
        "seconds_to_target": _mean([each and each[1] for each in there]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def by_recipe(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each recipe, in the order in which the recipes come first."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one["recipe"], []).append(one)
    return groups


# --- tables -----------------------------------------------------------------------------------------------------------


def show(records: Sequence[Record], target: float | None = None) -> None:
    """Prints a table of all runs, where a recipe has several, and one of their means beside the first recipe's."""
    groups = by_recipe(records)
    steps = sorted({step for one in records for step, *_ in one["curve"]})
    scores = [f"bpb after {step:,}" for step in steps]
    ends = ["ms a step", "seconds"] + ([] if target is None else [f"steps to {target:g}", "seconds to it"])
    print(f"\n{'; '.join(dict.fromkeys(map(_settings, records)))}")
    if len(groups) < len(records):
        runs = [(f"{one['recipe']}, seed {one['seed']}", summary([one], target)) for one in sum(groups.values(), [])]
        table(["run", *scores, *ends], [[name, *_scores(run, steps), *_ends(run, ends)] for name, run in runs])
    means = {name: summary(group, target) for name, group in groups.items()}
    first = next(iter(means.values()), None)
    rows = [
        [name, *_scores(mean, steps), _apart(mean, first), _number(mean["spread"], 4), mean["seeds"]]
        + _ends(mean, ends)
        for name, mean in means.items()
    ]
    table(["mean over seeds", *scores, "difference to the first", "spread of seeds", "seeds", *ends], rows)


def show_parts(records: Sequence[Record], parts: Iterable[str]) -> None:
    """Prints what each part changes, alone and left out of the whole; the base and the whole are in the first line."""
    means = {name: summary(group) for name, group in by_recipe(records).items()}
    rows = [[f"{BASE}; {WHOLE}", *_beside(means.get(BASE), None), *_beside(means.get(WHOLE), means.get(BASE))]]
    for part in parts:
        apart = _beside(means.get(alone(part)), means.get(BASE)), _beside(means.get(left_out(part)), means.get(WHOLE))
        rows.append([part, *apart[0], *apart[1]])
    table(["part", "alone: bpb", f"to the {BASE}", "ms", "left out: bpb", f"to the {WHOLE}", "ms"], rows)


def _beside(mean: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    if mean is None:
        return ["", "", ""]
    return [_number(mean["last"], 4), _apart(mean, other), _number(mean["step_ms"], 1)]


def _scores(mean: Mapping[str, Any], steps: Sequence[int]) -> list[str]:
    return [_number(mean["bpb"].get(step), 4) for step in steps]


def _ends(mean: Mapping[str, Any], heads: Sequence[str]) -> list[str]:
    cells = [("step_ms", 1), ("seconds", 1), ("steps_to_target", 0), ("seconds_to_target", 1)]
    return [_number(mean[name], digits) for name, digits in cells[: len(heads)]]


def _apart(mean: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    if other is None or mean["last"] is None or other["last"] is None:
        return ""
    return f"{mean['last'] - other['last']:+.4f}"


def _settings(one: Record) -> str:
    return f"{one['program']} on {one['device']}, {one['batch_tokens']:,} tokens a step"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


# --- curves -----------------------------------------------------------------------------------------------------------


def draw(records: Sequence[Record]) -> bytes:
    """A PNG of bits per byte by steps and by seconds: the seeds' as thin lines, the means' in front."""
    with plots.style():
        figure = Figure(figsize=(11.0, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for place, (axes, label) in enumerate(zip(panels, ("steps", "seconds of training steps"), strict=True)):
            axes.set_xlabel(label)
            for number, (name, group) in enumerate(by_recipe(records).items()):
                _draw_recipe(axes, number, name, group, place)
        panels[0].set_ylabel("validation bits per byte")
        panels[1].legend(fontsize=8)
        return plots.png(figure)


def _draw_recipe(axes, number: int, name: str, group: Sequence[Record], place: int) -> None:
    colours = plots.TASK_COLOURS
    style = {"color": colours[number % len(colours)], "linestyle": ("-", "--", ":")[number // len(colours) % 3]}
    curves = [[point for point in one["curve"] if point[2] is not None] for one in group]
    if len(curves) > 1:
        for curve in curves:
            axes.plot([point[place] for point in curve], [point[2] for point in curve], linewidth=0.6, **style)
    # As far as all seeds have come: of one that has diverged there is nothing to average.
    mean = [[statistics.fmean(each) for each in zip(*points, strict=True)] for points in zip(*curves, strict=False)]
    xs, ys = [point[place] for point in mean], [point[2] for point in mean]
    axes.plot(xs, ys, linewidth=2, marker="o", markersize=4, label=name, **style)
