"""Bits per byte as a function of parameters and tokens, fitted to the runs of `scaling.py`.

The form and the way of fitting are those of approach 3 of Hoffmann et al. (2022), arXiv:2203.15556, appendix D.3: the
Huber loss of differences of logarithms, from several starting points.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from jaxchat.errors import check
from jaxchat.planning.expected_quality import Curve, QualityLaw
from jaxchat.planning.proposal import PASSES

HUBER = 1e-3  # the difference of logarithms from which on it counts in proportion only
FEWEST = 8  # runs for five constants
PUBLISHED = 0.34, 0.28  # exponents of model and data by Hoffmann et al., equation 10
STARTS = (0.1, 0.3, 0.6), (0.1, 0.3, 0.6), (0.2, 0.5, 0.8)  # both exponents, and the floor as a share of the lowest bpb


def usable(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each budget and depth the best run, without those that diverged or read the text more than `PASSES` times."""
    best: dict[tuple, Mapping[str, Any]] = {}
    for one in records:
        place = one["flops"], one["depth"]
        if one["bpb"] is None or one["passes"] >= PASSES:
            continue
        if place not in best or one["bpb"] < best[place]["bpb"]:
            best[place] = one
    return list(best.values())


def fit_law(records: Iterable[Mapping[str, Any]], experiment: str, text: str) -> QualityLaw:
    """The law of the usable runs of `records`.

    Raises:
      UserError: there are too few to fit it to.
    """
    runs = usable(records)
    depths, budgets = ({one[name] for one in runs} for name in ("depth", "flops"))
    check(
        len(runs) >= FEWEST and min(len(depths), len(budgets)) >= 3,
        f"a law needs the best runs of three depths with three budgets at least, {FEWEST} in all, which read the "
        f"text {PASSES:.0f} times at most; there are {len(runs)}, of {len(depths)} depths and {len(budgets)} budgets",
    )
    parameters, tokens, bpb = (np.array([one[name] for one in runs], float) for name in ("parameters", "tokens", "bpb"))

    def range_of(name: str) -> tuple[float, float]:
        return min(one[name] for one in runs), max(one[name] for one in runs)

    fitted = _fit(parameters, tokens, bpb)
    return QualityLaw(
        fitted=fitted,
        published=_fit(parameters, tokens, bpb, PUBLISHED),
        error=float(np.sqrt(np.mean((fitted(parameters, tokens) - bpb) ** 2))),  # pyright: ignore[reportArgumentType]
        runs=len(runs),
        experiment=experiment,
        text=text,
        date=date.today().isoformat(),
        flops=range_of("real_flops"),
        parameters=range_of("parameters"),
        tokens=range_of("tokens"),
    )


def _fit(
    parameters: np.ndarray, tokens: np.ndarray, bpb: np.ndarray, exponents: tuple[float, float] | None = None
) -> Curve:
    """The nearest curve, or the nearest with these exponents of the model and the data."""
    # Centred, so that a factor hardly changes with its exponent.
    middles = np.log(parameters).mean(), np.log(tokens).mean()
    log_n, log_d = np.log(parameters) - middles[0], np.log(tokens) - middles[1]
    lower, upper = [-10.0, -10.0, -10.0, 0.0, 0.0], [3.0, 3.0, 3.0, 2.0, 2.0]
    free = 5 if exponents is None else 3

    def terms(constants: Sequence[float]) -> np.ndarray:
        floor, model, data, model_exponent, data_exponent = *constants, *(exponents or ())
        return np.exp(floor) + np.exp(model - model_exponent * log_n) + np.exp(data - data_exponent * log_d)

    starts: dict[tuple[float, ...], None] = {}  # each once: where exponents are given, many are alike
    for model_exponent, data_exponent, share in itertools.product(*STARTS):
        rest = math.log((1 - share) * bpb.min() / 2)
        starts[(math.log(share * bpb.min()), rest, rest, model_exponent, data_exponent)[:free]] = None
    fits = [
        least_squares(
            lambda constants: np.log(terms(constants)) - np.log(bpb),
            start,
            loss="huber",
            f_scale=HUBER,
            bounds=(lower[:free], upper[:free]),
            x_scale=[0.1] * free,
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-12,
        )
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost).x.tolist()
    floor, model, data, model_exponent, data_exponent = *best, *(exponents or ())
    return Curve(
        math.exp(floor),
        math.exp(model + model_exponent * middles[0]),
        model_exponent,
        math.exp(data + data_exponent * middles[1]),
        data_exponent,
    )


def write_law(law: QualityLaw, file: Path) -> None:
    file.write_text(json.dumps(dataclasses.asdict(law), indent=2) + "\n", encoding="utf-8")
