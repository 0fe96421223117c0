"""What the runs of `scaling.py` tell: the optimum of each compute budget, and how it moves.

A run is a record with `flops` (its budget), `depth`, `parameters` (N, in matrix products), `batch_tokens` (B), `tokens`
(D), `lr_fraction` (the factor on all rates) and `bpb`. An optimum is the lowest point of a parabola through bpb against
the logarithm of what is varied, as in approach 2 of Hoffmann et al. (2022), arXiv:2203.15556.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxchat.planning.rules import BATCH_EXPONENT
from jaxchat.recipes import RATE_BATCH_EXPONENT, RATE_TOKENS_EXPONENT

Record = Mapping[str, Any]
# Exponents as published: of the model and the tokens by Hoffmann et al. (2022), the others as in planning/rules.py and
# recipes.py; by their rules, rates do not depend on the model.
PUBLISHED = {
    "parameters against compute": 0.5,
    "tokens against compute": 0.5,
    "batch against tokens": BATCH_EXPONENT,
    "rate against batch": RATE_BATCH_EXPONENT,
    "rate against tokens": RATE_TOKENS_EXPONENT,
    "rate against parameters": 0.0,
}
VARIES = 1.2  # the largest of several numbers as a multiple of the smallest, at least
APART = 0.01  # singular values below this share of the largest: two numbers vary together but for rounding


def optimum(points: Iterable[tuple[float, float]]) -> dict[str, Any] | None:
    """Where bpb is lowest over x > 0, from (x, bpb): of several with one x the lowest counts; None for no points.

    `inside` tells that the parabola opens upwards and its lowest point lies between the x that were tried. If not, the
    best of them is given, and the true optimum may lie beyond it.
    """
    lowest: dict[float, float] = {}
    for x, bpb in points:
        lowest[x] = min(bpb, lowest.get(x, math.inf))
    if not lowest:
        return None
    best = min(lowest, key=lambda x: lowest[x])
    found = {"x": best, "bpb": lowest[best], "inside": False}
    if len(lowest) >= 3:
        logs = np.log(sorted(lowest))
        a, b, c = np.polyfit(logs, [lowest[x] for x in sorted(lowest)], 2)
        vertex = -b / (2 * a) if a > 0 else math.inf
        if logs[0] <= vertex <= logs[-1]:
            found = {"x": math.exp(vertex), "bpb": float(c - b * b / (4 * a)), "inside": True}
    return found


def power_law(points: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """y = factor x^exponent by least squares of the logarithms, with the standard error of the exponent.

    None for fewer than two x; no error for two points.
    """
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.log(np.array(points, float)).T
    exponent, log_factor = np.polyfit(x, y, 1)
    error = None
    if len(points) > 2:
        rest = y - exponent * x - log_factor
        error = float(np.sqrt((rest**2).sum() / (len(points) - 2) / ((x - x.mean()) ** 2).sum()))
    return {"exponent": float(exponent), "factor": math.exp(log_factor), "error": error, "points": len(points)}


def joint_law(points: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, Any]:
    """y as a product of powers of `names`, by least squares of the logarithms: each one's law as of `power_law`.

    A power is None for what hardly varies in the points. All are if two vary together, or if there are no more points
    than unknowns, so that nothing would tell their errors.
    """
    laws: dict[str, Any] = dict.fromkeys(names)
    columns = {name: [point[name] for point in points] for name in names}
    rows = [name for name, column in columns.items() if column and max(column) >= VARIES * min(column)]
    if len(points) <= len(rows) + 1 or not rows:
        return laws
    logs = np.log([[point[name] for name in rows] for point in points])
    matrix, y = np.column_stack([logs - logs.mean(0), np.ones(len(points))]), np.log([point["y"] for point in points])
    found, _, rank, _ = np.linalg.lstsq(matrix, y, rcond=APART)
    if rank < matrix.shape[1]:
        return laws
    free = len(points) - rank
    rest = y - matrix @ found
    covariance = np.linalg.inv(matrix.T @ matrix) * (rest @ rest / free)
    for number, name in enumerate(rows):
        error = float(np.sqrt(covariance[number, number]))
        laws[name] = {"exponent": float(found[number]), "error": error, "points": len(points)}
    return laws


def fits(records: Iterable[Record]) -> dict[str, Any]:
    """The optima and the power laws through those that lie inside of what was tried."""
    records = [record for record in records if record["bpb"] is not None and math.isfinite(record["bpb"])]
    budgets = []
    for flops, of_budget in sorted(_by(records, lambda record: record["flops"]).items()):
        best = min(of_budget, key=lambda record: record["bpb"])
        model = optimum((record["parameters"], record["bpb"]) for record in of_budget)
        tokens = optimum((record["tokens"], record["bpb"]) for record in of_budget)
        assert model and tokens, "there are records"
        budgets.append({"flops": flops, "best": dict(best), "parameters": model, "tokens": tokens})
    batches = []
    for (flops, depth), same in sorted(_by(records, lambda record: (record["flops"], record["depth"])).items()):
        found = optimum((record["batch_tokens"], record["bpb"]) for record in same)
        assert found, "there are records"
        tokens = sum(record["tokens"] for record in same) / len(same)  # they differ by rounding to whole steps
        batches.append({"flops": flops, "depth": depth, "tokens": tokens, **found})
    rates = []
    of_a_batch = _by(records, lambda record: (record["flops"], record["depth"], record["batch_tokens"]))
    for (flops, depth, batch), same in sorted(of_a_batch.items()):
        found = optimum((record["rate"], record["bpb"]) for record in same)
        assert found, "there are records"
        tokens = sum(record["tokens"] for record in same) / len(same)
        of_run = {"batch": batch, "tokens": tokens, "parameters": same[0]["parameters"]}
        rates.append({"flops": flops, "depth": depth, "batch_tokens": batch, **of_run, **found})
    laws = {
        "parameters against compute": [
            (b["flops"], b["parameters"]["x"]) for b in budgets if b["parameters"]["inside"]
        ],
        "tokens against compute": [(b["flops"], b["tokens"]["x"]) for b in budgets if b["tokens"]["inside"]],
        "batch against tokens": [(b["tokens"], b["x"]) for b in batches if b["inside"]],
    }
    of_rates = joint_law(
        [rate | {"y": rate["x"]} for rate in rates if rate["inside"]], ("batch", "tokens", "parameters")
    )
    found = {name: power_law(points) for name, points in laws.items()}
    found |= {f"rate against {name}": law for name, law in of_rates.items()}
    return {
        **{"budgets": budgets, "batches": batches, "rates": rates},
        "laws": {name: {"published": PUBLISHED[name], "fit": fit} for name, fit in found.items()},
    }


def budget_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each budget: the best run, and the optimum over models."""
    rows = []
    for budget in found["budgets"]:
        best, model = budget["best"], budget["parameters"]
        ratio = budget["tokens"]["x"] / model["x"]
        rows.append([
            *(f"{budget['flops']:.2g}", f"d{best['depth']}", f"{best['batch_tokens']:,}", f"{best['lr_fraction']:g}"),
            *(f"{best['bpb']:.4f}", f"{model['x']:,.0f}" + ("" if model["inside"] else " (edge)"), f"{ratio:.1f}"),
        ])  # fmt: skip
    return rows


def law_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each exponent: what was fitted, and what is published."""
    rows = []
    for name, law in found["laws"].items():
        fit = law["fit"]
        value = "too few optima inside the grid"
        if fit is not None:
            value = f"{fit['exponent']:.3f}" + ("" if fit["error"] is None else f" ± {fit['error']:.3f}")
        rows.append([name, value, str(fit["points"]) if fit else "", f"{law['published']:g}"])
    return rows


def draw(records: Iterable[Record], found: Mapping[str, Any], file: str) -> None:
    """Writes a figure: bpb against compute by depth, and against the model by budget; the batch against the tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from jaxchat.runs.plots import style

    records = [record for record in records if record["bpb"] is not None]
    with style():
        figure = Figure(figsize=(12.0, 3.8), layout="constrained")
        compute, models, batches = figure.subplots(1, 3)
        for depth, same in sorted(_by(records, lambda record: record["depth"]).items()):
            _curve(compute, same, "flops", f"d{depth}")
        for flops, same in sorted(_by(records, lambda record: record["flops"]).items()):
            _curve(models, same, "parameters", f"{flops:.2g}")
        for inside, marker, label in ((True, "o", "optimum"), (False, "x", "best at the edge")):
            points = [(b["tokens"], b["x"]) for b in found["batches"] if b["inside"] is inside]
            if points:
                batches.plot(*zip(*points, strict=True), marker, label=label)
        optima = [budget["parameters"] for budget in found["budgets"] if budget["parameters"]["inside"]]
        models.plot([o["x"] for o in optima], [o["bpb"] for o in optima], "*", color="black", label="optimum")
        for axes in (models, batches):
            axes.margins(y=0.3)  # room for the legend
        for axes, title, label in (
            (compute, "bits per byte, by depth", "FLOPs"),
            (models, "bits per byte, by FLOPs", "parameters in matrix products"),
            (batches, "batch of each depth and budget", "training tokens"),
        ):
            axes.set(title=title, xlabel=label, xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e").replace("e0", "e")))
            axes.xaxis.set_minor_locator(NullLocator())
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper right", fontsize="small", ncols=2 if axes is models else 1)
        batches.set_yscale("log", base=2)
        figure.savefig(file)


def _curve(axes: Any, records: Sequence[Record], name: str, label: str) -> None:
    """The lowest bpb at each value of `name`."""
    lowest = {value: min(r["bpb"] for r in same) for value, same in _by(records, lambda r: r[name]).items()}
    axes.plot(sorted(lowest), [lowest[value] for value in sorted(lowest)], marker="o", label=label)


def _by(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups
