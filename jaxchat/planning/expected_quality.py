"""The bits per byte that a pretraining may be expected to reach, by a law fitted to trainings of our own.

`benchmarks/scaling.py` trains these, and with --write-law writes the law's constants to `FILE`. Without that file
nothing is expected.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jaxchat.config import Experiment
from jaxchat.recipes import counted_parameters

FILE = Path(__file__).with_name("expected_quality.json")


@dataclass(frozen=True)
class Curve:
    """L(N, D) = floor + model_factor / N^model_exponent + data_factor / D^data_exponent, in bits per byte.

    The form is that of Hoffmann et al. (2022), arXiv:2203.15556, equation 2, with parameters in matrix products N
    (`counted_parameters`) and training tokens D, each read a few times at most: up to four times they teach almost as
    much as new ones (Muennighoff et al. 2023, arXiv:2305.16264).
    """

    floor: float
    model_factor: float
    model_exponent: float
    data_factor: float
    data_exponent: float

    def __call__(self, parameters: float, tokens: float) -> float:
        model = self.model_factor / parameters**self.model_exponent
        return self.floor + model + self.data_factor / tokens**self.data_exponent


@dataclass(frozen=True)
class QualityLaw:
    """Curves fitted to trainings, and what these were.

    Attributes:
      fitted: the curve that is nearest to the runs.
      published: the nearest of those with the exponents of Hoffmann et al. Far beyond the runs the first promises too
        little, because small models learn fast at first, and this one rather too much.
      error: the root mean square of the differences between `fitted` and the runs, in bits per byte.
      runs: how many, of `experiment` with other depths, batches and lengths on `text`.
      flops, parameters, tokens: the least and the most that these had.
    """

    fitted: Curve
    published: Curve
    error: float
    runs: int
    experiment: str
    text: str
    date: str
    flops: tuple[float, float]
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def is_too_small(self, parameters: float, tokens: float) -> bool:
        """Whether the runs had ten times as many or more: there the curves rise without bounds, and tell nothing."""
        return 10 * parameters < self.parameters[0] or 10 * tokens < self.tokens[0]

    def covers(self, flops: float, parameters: float, tokens: float) -> bool:
        """Whether the runs had as few and as many."""
        limits = (self.flops, flops), (self.parameters, parameters), (self.tokens, tokens)
        return all(least <= value <= most for (least, most), value in limits)


def load_law() -> QualityLaw | None:
    """The law in `FILE`; None if there is none."""
    if not FILE.exists():
        return None
    found = json.loads(FILE.read_text(encoding="utf-8"))
    curves = {name: Curve(**found[name]) for name in ("fitted", "published")}
    return QualityLaw(**found | curves | {name: tuple(found[name]) for name in ("flops", "parameters", "tokens")})


def quality_lines(experiment: Experiment, tokens: int, flops: float, law: QualityLaw | None) -> list[str]:
    """What to expect of a pretraining on `tokens` with `flops`, and from what; [] where no law tells anything.

    The law knows nothing of text that is read more often, nor of other recipes and text: a line says so.
    """
    if law is None or experiment.data.folder is None:
        return []
    parameters = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    if law.is_too_small(parameters, tokens):
        return []
    least, most = law.flops
    runs = f"{law.runs} runs of {law.experiment} with {least:.1g} to {most:.1g} FLOPs on {law.text}"
    fitted, published = law.fitted(parameters, tokens), law.published(parameters, tokens)
    if law.covers(flops, parameters, tokens):
        first = f"about {fitted:.3f} bits per byte after pretraining, by {runs}"
        how = f"from which it errs by {law.error:.3f}"
    else:
        lowest, highest = sorted((fitted, published))
        first = f"{lowest:.2f} to {highest:.2f} bits per byte after pretraining, far from {runs}"
        how = "by exponents as published and as fitted"
    return [first, f"{how}; another recipe or text differs, and text read more than four times counts for less"]
