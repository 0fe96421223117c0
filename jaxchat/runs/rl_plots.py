"""The plots of reinforcement learning: rewards, validation, and what the sampled answers are like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxchat.runs.comparison import measure_name, measures
from jaxchat.runs.plots import TASK_COLOURS, Curve, curves, draw_trend, png, steps_axis, style, titles

PANELS = 6  # at most of one plot: all questions, and five tasks
_ROLLOUTS = {
    "entropy": ("entropy of a token", "nats"),
    "completion_tokens": ("length of an answer", "tokens, on average"),
    "groups_without_signal": ("questions without signal", "share"),
    "cut": ("answers without room to end", "share"),
}


def rl_plots(records: list[dict[str, Any]]) -> dict[str, bytes]:
    """File name to PNG of every plot that a run's metrics have something for."""
    rl = curves(records).get("rl", {})
    with style():
        figures = {"reward.png": _reward(rl), "validation.png": _validation(rl), "rollouts.png": _rollouts(rl)}
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _reward(rl: Mapping[str, Curve]) -> Figure | None:
    drawn = [name for name in ("reward", "reward_eval") if name in rl and len(rl[name][0]) > 1]
    if not drawn:
        return None
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("rl")
    if "reward" in drawn:
        draw_trend(axes, "rl", rl["reward"], "training questions")
    if "reward_eval" in drawn:
        steps, values = rl["reward_eval"]
        axes.plot(steps, values, color="black", linewidth=1, marker="o", markersize=5, label="validation questions")
        titles(axes, "rl", f"validation questions: {values[0]:.2f} before, {values[-1]:.2f} after")
    axes.set_ylabel("mean reward of sampled answers")
    steps_axis(axes)
    axes.legend(loc="best")
    return figure


def _validation(rl: Mapping[str, Curve]) -> Figure | None:
    """Each measure with its intervals: a panel for all questions, and one for each task if there are several."""
    names = [name for name in measures(rl) if len(rl[name][0]) > 1]
    if not names:
        return None
    tasks = [name.removeprefix("greedy/") for name in rl if name.startswith("greedy/") and name.count("/") == 1]
    parts = ["", *(f"/{task}" for task in tasks)][:PANELS] if len(tasks) > 1 else [""]
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=({1: 7.0, 2: 9.0, 3: 12.0}[columns], 0.6 + 3.2 * rows), layout="constrained")
    drawn = {}
    for place, part in enumerate(parts):
        axes = figure.add_subplot(rows, columns, place + 1)
        for name, colour in zip(names, TASK_COLOURS, strict=False):
            if f"{name}{part}" not in rl:
                continue
            steps, values = rl[f"{name}{part}"]
            low, high = (rl[f"{name}_{end}{part}"][1] for end in ("low", "high"))
            (line,) = axes.plot(
                steps, 100 * values, color=colour, linewidth=1.5, marker="o", markersize=4, clip_on=False
            )
            axes.fill_between(steps, 100 * low, 100 * high, color=colour, alpha=0.12, linewidth=0)
            drawn[measure_name(name)] = line
        asked = rl.get(f"asked{part}")
        every = "validation questions" if len(tasks) != 1 else tasks[0].replace("_", " ")
        titles(axes, part[1:].replace("_", " ") or every, f"{asked[1][-1]:,.0f} asked" if asked else "")
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        if place % columns == 0:
            axes.set_ylabel("answered right")
        steps_axis(axes)
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=len(drawn))
    return figure


def _rollouts(rl: Mapping[str, Curve]) -> Figure | None:
    names = [name for name in _ROLLOUTS if name in rl and len(rl[name][0]) > 1]
    if not names:
        return None
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 + 4.5 * (columns - 1), 0.2 + 2.8 * rows), layout="constrained")
    for place, name in enumerate(names):
        title, label = _ROLLOUTS[name]
        axes = figure.add_subplot(rows, columns, place + 1)
        end = draw_trend(axes, "rl", rl[name])
        titles(axes, title, f"{end:.3g} at the end" if label != "share" else f"{end:.0%} at the end")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0, top=1 if label == "share" else None)
        if label == "share":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        elif np.max(rl[name][1]) == 0:
            axes.set_ylim(0, 1)
        steps_axis(axes)
    return figure
