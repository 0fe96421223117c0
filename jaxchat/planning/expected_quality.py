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
class QualityLaw:
    """L(N, D) = floor + model_factor / N^model_exponent + data_factor / D^data_exponent, and what it was fitted to.

    That of Hoffmann et al. (2022), arXiv:2203.15556, equation 2, for validation bits per byte L, parameters in matrix
    products N (`counted_parameters`) and training tokens D, each read a few times at most: up to four times they teach
    almost as much as new ones (Muennighoff et al. 2023, arXiv:2305.16264).

    Attributes:
      error: the root mean square of its differences to the runs, in bits per byte.
      runs: how many it was fitted to, of `experiment` with other depths, batches and lengths on `text`.
      flops, parameters, tokens: the least and the most that these had.
    """

    floor: float
    model_factor: float
    model_exponent: float
    data_factor: float
    data_exponent: float
    error: float
    runs: int
    experiment: str
    text: str
    date: str
    flops: tuple[float, float]
    parameters: tuple[float, float]
    tokens: tuple[float, float]

    def __call__(self, parameters: float, tokens: float) -> float:
        """Bits per byte."""
        model = self.model_factor / parameters**self.model_exponent
        return self.floor + model + self.data_factor / tokens**self.data_exponent

    def covers(self, flops: float, parameters: float, tokens: float) -> bool:
        """Whether the runs had as few and as many."""
        limits = (self.flops, flops), (self.parameters, parameters), (self.tokens, tokens)
        return all(least <= value <= most for (least, most), value in limits)


def load_law() -> QualityLaw | None:
    """The law in `FILE`; None if there is none."""
    if not FILE.exists():
        return None
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return QualityLaw(**found | {name: tuple(found[name]) for name in ("flops", "parameters", "tokens")})


def quality_lines(experiment: Experiment, tokens: int, flops: float, law: QualityLaw | None) -> list[str]:
    """What to expect of a pretraining on `tokens` with `flops`, and from what; [] without a law, or on generated text.

    The law knows nothing of text that is read more often, nor of other recipes and text: a line says so.
    """
    if law is None or experiment.data.folder is None:
        return []
    parameters = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    least, most = law.flops
    how = f"where its error is {law.error:.4f}"
    if not law.covers(flops, parameters, tokens):
        how = "an extrapolation, since none of these was as small or as large"
    return [
        f"about {law(parameters, tokens):.3f} bits per byte after pretraining, by a law of {law.runs} runs of "
        f"{law.experiment} with {least:.2g} to {most:.2g} FLOPs on {law.text}",
        f"{how}; text that is read more than four times counts for less, and another recipe or text differs",
    ]
