"""Plots, as PNG: one look, what was measured as a thin line or points, its trend in front.

A `Curve` is the steps of a metric (rising) and its values; `curves` gathers them by stage and metric name. What there
is not enough of is not drawn: a curve needs two points.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from jaxchat.config import STAGES
from jaxchat.runs.report_page import core_name
from jaxchat.runs.tables import core_means

Curve = tuple[np.ndarray, np.ndarray]
Curves = dict[str, dict[str, Curve]]

# Okabe and Ito, "Color universal design" (2008): told apart with every kind of colour vision.
COLOURS = {"pretrain": "#0072B2", "midtrain": "#E69F00", "sft": "#009E73", "rl": "#CC79A7"}
TASK_COLOURS = (*COLOURS.values(), "#56B4E9", "#D55E00", "#000000")
_SUGGESTED = "#D55E00"
GREY = "#555555"
_LEARNING_RATES = {
    "lr_matrix": "matrices (Muon)",
    "lr_embedding": "embedding (Adam)",
    "lr_head": "head (Adam)",
    "lr_value_embedding": "value emb. (Adam)",
    "lr_gate": "gates (Adam)",
    "lr_residual_scale": "residual (Adam)",
    "lr_input_scale": "input (Adam)",
    "lr_scalar": "scalars (Adam)",
}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.12,
    "savefig.dpi": 160,
}


def style() -> AbstractContextManager[None]:
    """The project's look, and nothing of the user's matplotlibrc, for what is drawn and written inside."""
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE})  # pyright: ignore[reportArgumentType]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curves(records: list[dict[str, Any]]) -> Curves:
    """Finite numbers of `read_metrics` by stage and metric name, without those of evaluations and samples."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        if "of" in record or "sample" in record:
            continue
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                points.setdefault(record["stage"], {}).setdefault(name, {})[record["step"]] = value
    return {
        stage: {
            name: (np.array(sorted(p)), np.array([float(p[step]) for step in sorted(p)])) for name, p in names.items()
        }
        for stage, names in points.items()
    }


def smoothed(values: np.ndarray, *, steep_start: bool = False) -> np.ndarray:
    """The trend of `values` [N]: two centred moving averages over N/15 points, over fewer at the ends.

    With `steep_start` the window grows from one point, so that a curve that falls from its first step is not bent.
    """
    index = np.arange(len(values))
    reach = np.full(len(values), max(1, len(values) // 30))
    if steep_start:
        reach = np.minimum(reach, index // 4)
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach, len(values) - 1)
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[last + 1] - total[first]) / (last + 1 - first)
    return values


def all_plots(
    records: list[dict[str, Any]],
    scores: dict[str, dict[str, dict[str, Any]]],
    turned: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, bytes]:
    """File name to PNG of every plot there is something for, besides those of `rl_plots`.

    Args:
      scores: stage to task to `score`, the share answered right, with its interval `low` and `high` if that is known.
      turned: stage to the step at which its validation turned, of those where it did.
    """
    by_stage = curves(records)
    with style():
        figures = {
            "loss.png": _panels(by_stage, "loss", "training loss (nats per token)", draw_trend),
            "bpb.png": _panels(by_stage, "bpb", "validation bits per byte", _draw_points, turned),
            "learning_rates.png": _learning_rates(by_stage),
            "core.png": _core(by_stage.get("pretrain", {})),
            "task_scores.png": _task_scores(by_stage),
            "evaluation.png": _evaluation(scores),
        }
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


class RangeCurve(NamedTuple):
    """A learning-rate range test: `losses` (nats a token) and `smoothed` at the first of `rates`, which rise."""

    group: str
    rates: np.ndarray
    losses: Sequence[float]
    smoothed: np.ndarray
    configured: float
    suggested: float | None


def lr_range_plot(tests: list[RangeCurve]) -> bytes:
    """A panel a group, its rate on x; all have one loss axis, which ends a little above the untrained model's."""
    with style():
        figure = Figure(figsize=({1: 7.0, 2: 9.0}.get(len(tests), 12.0), 4.2), layout="constrained")
        panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
        lines = {}
        for axes, test in zip(panels, tests, strict=True):
            lines |= _draw_range(axes, test)
        panels[0].set_ylabel("training loss (nats per token)")
        values = np.concatenate([test.losses for test in tests])
        # A test from too high a rate on only rises; its rise is cut off, and the others are seen.
        low, high = values.min(initial=np.inf), max((test.losses[0] for test in tests if len(test.losses)), default=1.0)
        if low < np.inf:
            margin = 0.08 * (high - low) or 0.1
            panels[0].set_ylim(low - margin, high + margin)
        figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=len(lines))
        return png(figure)


def _draw_range(axes: Axes, test: RangeCurve) -> dict[str, Line2D]:
    """Returns what was drawn, by its name."""
    rates, colour = test.rates[: len(test.losses)], COLOURS["pretrain"]
    lines = {}
    (lines["measured"],) = axes.plot(rates, test.losses, color=colour, linewidth=0.7, alpha=0.35)
    (lines["smoothed"],) = axes.plot(rates, test.smoothed, color=colour, linewidth=2)
    lines["configured"] = axes.axvline(test.configured, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    if test.suggested is not None:
        lines["suggested"] = axes.axvline(test.suggested, color=_SUGGESTED, linewidth=2, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(test.rates[0], test.rates[-1])
    axes.set_xlabel(f"learning rate (optimizer.{test.group}-lr)")
    titles(axes, test.group, "no suggestion" if test.suggested is None else f"suggested {test.suggested:g}")
    return lines


def _stages_with(by_stage: Curves, name: str) -> list[str]:
    return [s for s in STAGES if name in by_stage.get(s, {}) and len(by_stage[s][name][0]) > 1]


def steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.margins(x=0.02)


def _panels(
    by_stage: Curves,
    name: str,
    label: str,
    draw: Callable[[Axes, str, Curve], float],
    turned: Mapping[str, int] = MappingProxyType({}),
) -> Figure | None:
    """One panel a stage that has the metric: stages differ in length and in what their values mean."""
    stages = _stages_with(by_stage, name)
    if not stages:
        return None
    columns = 2 if len(stages) == 4 else len(stages)
    rows = -(-len(stages) // columns)
    width = {1: 7.0, 2: 9.0, 3: 11.0}[columns]
    figure = Figure(figsize=(width, 3.6 * rows), layout="constrained")
    for i, stage in enumerate(stages):
        axes = figure.add_subplot(rows, columns, i + 1)
        curve = by_stage[stage][name]
        end = draw(axes, stage, curve)
        best = _draw_turn(axes, curve, turned[stage]) if stage in turned else ""
        titles(axes, stage, f"{best}{end:.3f} at the end" if stage != "rl" else "")
        steps_axis(axes)
        if stage == "pretrain":
            _settled_limits(axes, curve[1])
        if stage == "rl":
            axes.set_ylabel("objective (nats per token, weighted)")
        elif i % columns == 0:
            axes.set_ylabel(label)
    return figure


def draw_trend(axes: Axes, stage: str, curve: Curve, label: str | None = None) -> float:
    """Draws what was measured and its trend; returns the trend's last value."""
    steps, values = curve
    trend = smoothed(values, steep_start=stage == "pretrain")
    axes.plot(steps, values, color=COLOURS.get(stage, GREY), linewidth=0.7, alpha=0.35)
    axes.plot(steps, trend, color=COLOURS.get(stage, GREY), linewidth=2, label=label)
    return trend[-1]


def _draw_points(axes: Axes, stage: str, curve: Curve) -> float:
    """Returns the last value."""
    axes.plot(*curve, color=COLOURS.get(stage, GREY), linewidth=1.5, marker="o", markersize=4)
    return curve[1][-1]


def _draw_turn(axes: Axes, curve: Curve, step: int) -> str:
    """Draws a ring around the value at a step, if there is one; returns it in words."""
    values = curve[1][curve[0] == step]
    if not len(values):
        return ""
    axes.plot([step], values, color=_SUGGESTED, marker="o", markersize=11, markerfacecolor="none", markeredgewidth=2)
    return f"{values[0]:.3f} at step {step:,}, "


def titles(axes: Axes, stage: str, result: str) -> None:
    axes.set_title(stage)
    axes.set_title(result, loc="right", fontsize=10, fontweight="normal", color=GREY)


def _settled_limits(axes: Axes, values: np.ndarray) -> None:
    """Cuts off the fall from an untrained model's ln(vocabulary), which would flatten all that follows."""
    settled = values[-(-len(values) // 20) :] if len(values) > 3 else values
    low, high = settled.min(), settled.max()
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _learning_rates(by_stage: Curves) -> Figure | None:
    names = [name for name in _LEARNING_RATES if _stages_with(by_stage, name)]
    stages = [s for s in STAGES if any(s in _stages_with(by_stage, name) for name in names)]
    if not names:
        return None
    figure = Figure(figsize=(3.0 + 2.0 * len(stages), 1.0 + 1.6 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), len(stages), sharex="col", sharey="row", squeeze=False)
    for row, name in zip(grid, names, strict=True):
        for axes, stage in zip(row, stages, strict=True):
            if name in by_stage[stage]:
                axes.plot(*by_stage[stage][name], color=COLOURS.get(stage, GREY), linewidth=2)
        row[0].set_ylabel(_LEARNING_RATES[name])
        row[0].set_ylim(bottom=0)
    for axes, stage in zip(grid[0], stages, strict=True):
        axes.set_title(stage)
    for axes in grid[-1]:
        steps_axis(axes)
    figure.align_ylabels()
    figure.suptitle("learning rate", x=0.01, ha="left", fontsize=10, color=GREY)
    return figure


def _core(pretrain: dict[str, Curve]) -> Figure | None:
    """The means over CORE's tasks, as `jaxchat.stages.scores` names them; below 0 is worse than guessing."""
    means = [name for name in core_means(pretrain) if len(pretrain[name][0]) > 1]
    if not means:
        return None
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="guessing")
    for name, colour in zip(means, TASK_COLOURS, strict=False):
        axes.plot(*pretrain[name], color=colour, linewidth=1.5, marker="o", markersize=4, label=core_name(name))
    titles(axes, "pretrain", ", ".join(f"{pretrain[name][1][-1]:.3f}" for name in means) + " at the end")
    axes.set_ylabel("share above guessing, mean over tasks")
    steps_axis(axes)
    axes.legend(loc="best")
    return figure


def _task_scores(by_stage: Curves) -> Figure | None:
    """The tasks that stages scored on the way, with intervals of 95 %, a panel a stage."""
    prefix = "sample_score/"
    names = sorted({name for names in by_stage.values() for name in names if name.startswith(prefix)})
    stages = [stage for stage in STAGES if any(stage in _stages_with(by_stage, name) for name in names)]
    if not stages:
        return None
    figure = Figure(figsize=({1: 7.0, 2: 9.0}.get(len(stages), 12.0), 4.0), layout="constrained")
    panels, drawn = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], {}
    for axes, stage in zip(panels, stages, strict=True):
        for number, name in enumerate(names):
            if stage not in _stages_with(by_stage, name):
                continue
            (steps, values), colour = by_stage[stage][name], TASK_COLOURS[number % len(TASK_COLOURS)]
            task = name.removeprefix(prefix)
            (line,) = axes.plot(
                steps, 100 * values, color=colour, linewidth=1.5, marker="o", markersize=4, clip_on=False
            )
            ends = [by_stage[stage].get(f"sample_{end}/{task}") for end in ("low", "high")]
            if all(end is not None and np.array_equal(end[0], steps) for end in ends):
                axes.fill_between(steps, *(100 * end[1] for end in ends if end), color=colour, alpha=0.12, linewidth=0)
            drawn[task.replace("_", " ")] = line
        axes.set_title(stage)
        steps_axis(axes)
    panels[0].set_ylim(bottom=0)
    panels[0].yaxis.set_major_formatter(PercentFormatter(decimals=0))
    panels[0].set_ylabel("answered right, of a sample")
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=min(4, len(drawn)))
    return figure


def _evaluation(scores: dict[str, dict[str, dict[str, Any]]]) -> Figure | None:
    stages = [stage for stage in STAGES if scores.get(stage)]
    tasks = list(dict.fromkeys(task for stage in stages for task in scores[stage]))
    if not tasks:
        return None
    width = 0.8 / len(stages)
    figure = Figure(figsize=(max(5.0, 1.5 + len(tasks) * (0.4 + 0.42 * len(stages))), 3.8), layout="constrained")
    axes = figure.add_subplot()
    for i, stage in enumerate(stages):
        placed = [(t, scores[stage][task]) for t, task in enumerate(tasks) if task in scores[stage]]
        x = [t + (i - (len(stages) - 1) / 2) * width for t, _ in placed]
        y = [100 * entry["score"] for _, entry in placed]
        ends = [[100 * entry.get(end, entry["score"]) for _, entry in placed] for end in ("low", "high")]
        errors = [np.maximum(np.subtract(y, ends[0]), 0), np.maximum(np.subtract(ends[1], y), 0)]
        known = any("low" in entry for _, entry in placed)
        bars = axes.bar(
            x, y, 0.92 * width, color=COLOURS.get(stage, GREY), label=stage, yerr=errors if known else None,
            error_kw={"ecolor": "black", "elinewidth": 1, "alpha": 0.6},
        )  # fmt: skip
        axes.bar_label(bars, fmt=lambda y: f"{y:.0f}" if y >= 9.95 else f"{y:.1f}", padding=2, fontsize=9)
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], color="black")
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_ylabel("answered right")
    figure.legend(loc="outside upper left", ncols=len(stages))
    return figure
