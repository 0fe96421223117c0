"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxchat.config.ranges import check_each
from jaxchat.errors import check


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the matrices of the blocks, AdamW for embedding and head."""

    matrix_lr: float = 0.02
    """Muon's learning rate."""
    embedding_lr: float = 0.2
    """AdamW's learning rate of the embedding at a width of 768; others scale by (width / 768)^-1/2."""
    head_lr: float = 0.004
    """AdamW's learning rate of the head at a width of 768; others scale by (width / 768)^-1/2."""
    weight_decay: float = 0.0
    """AdamW's weight decay for embedding and head; Muon has none."""
    adam_b1: float = 0.8
    """AdamW's decay rate of the gradient's mean."""
    adam_b2: float = 0.95
    """AdamW's decay rate of the gradient's mean square."""
    adam_eps: float = 1e-10
    """AdamW's epsilon, added to the root of the mean square."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum after its warm-up."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    muon_momentum_steps: int = 300
    """Steps over which Muon's momentum rises linearly from the start to its final value."""
    newton_schulz_steps: int = 5
    """Iterations that orthogonalise Muon's update."""
    newton_schulz_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Coefficients a b c of an iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it."""

    def __post_init__(self):
        for name in ("matrix_lr", "embedding_lr", "head_lr", "newton_schulz_steps", "clip_norm"):
            check(getattr(self, name) > 0, f"optimizer.{name.replace('_', '-')} must be above 0")
        rates = ("adam_b1", "adam_b2", "muon_momentum", "muon_momentum_start")
        check_each(self, "optimizer.", lambda value: 0 <= value < 1, "at least 0 and below 1", *rates)


@dataclass(frozen=True)
class ScheduleConfig:
    """The stage's learning-rate schedule: warm-up from 0, constant, decay."""

    warmup_ratio: float = 0.0
    """Fraction of the steps in which the learning rate rises linearly from 0."""
    decay_ratio: float = 0.2
    """Fraction of the steps, the last ones, in which the learning rate falls."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay."""
    final_fraction: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the highest."""

    def __post_init__(self):
        fits = self.warmup_ratio >= 0 and self.decay_ratio >= 0 and self.warmup_ratio + self.decay_ratio <= 1
        check(fits, "schedule.warmup-ratio and schedule.decay-ratio must be 0 or more and sum to at most 1")
        check(0 <= self.final_fraction <= 1, "schedule.final-fraction must be between 0 and 1")
