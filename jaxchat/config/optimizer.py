"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxchat.config.ranges import Range, Section

ROUNDING = 1e-9  # of two fractions that sum to 1
RATE = Range(above=0, at_most=1000)
DECAY = Range(at_least=0, at_most=100)
DECAY_RATE = Range(at_least=0, at_most=0.999999)  # one closer to 1 is 1 in float32, and divides by 0
COEFFICIENT = Range(at_least=-100, at_most=100)
FRACTION = Range(at_least=0, at_most=1)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """Muon for the blocks' matrices, AdamW for all other parameters, by groups."""

    section = "optimizer"

    matrix_lr: Annotated[float, RATE] = 0.02
    """Muon's learning rate."""
    embedding_lr: Annotated[float, RATE] = 0.2
    """AdamW's learning rate of the embedding at a width of 768; others scale by (width / 768)^-1/2."""
    head_lr: Annotated[float, RATE] = 0.004
    """AdamW's learning rate of the head at a width of 768; others scale by (width / 768)^-1/2."""
    value_embedding_lr: Annotated[float, RATE] = 0.075
    """AdamW's learning rate of the value embeddings at a width of 768; others scale by (width / 768)^-1/2."""
    residual_scale_lr: Annotated[float, RATE] = 0.0025
    """AdamW's learning rate of the layers' factors on the residual stream."""
    input_scale_lr: Annotated[float, RATE] = 0.025
    """AdamW's learning rate of the layers' factors on the embedded input."""
    scalar_lr: Annotated[float, RATE] = 0.02
    """AdamW's learning rate of the parameters of smear and backout."""
    gate_lr: Annotated[float, RATE] = 0.003
    """AdamW's learning rate of the value embeddings' gates."""
    weight_decay: Annotated[float, DECAY] = 0.0
    """AdamW's weight decay for embedding and head, unless they have their own."""
    embedding_weight_decay: Annotated[float | None, DECAY] = None
    """AdamW's weight decay for the embedding. None: weight-decay."""
    head_weight_decay: Annotated[float | None, DECAY] = None
    """AdamW's weight decay for the head. None: weight-decay."""
    value_embedding_weight_decay: Annotated[float, DECAY] = 0.01
    """AdamW's weight decay for the value embeddings."""
    residual_scale_weight_decay: Annotated[float, DECAY] = 0.05
    """AdamW's weight decay for the layers' factors on the residual stream."""
    matrix_weight_decay: Annotated[float, DECAY] = 0.0
    """Muon's weight decay at the first step, from which it falls to 0 along half a cosine. It is cautious: only weights
    that the update makes smaller anyway decay."""
    adam_b1: Annotated[float, DECAY_RATE] = 0.8
    """AdamW's decay rate of the gradient's mean."""
    adam_b2: Annotated[float, DECAY_RATE] = 0.95
    """AdamW's decay rate of the gradient's mean square."""
    embedding_betas: Annotated[tuple[float, float] | None, DECAY_RATE] = None
    """Both decay rates of the embedding. None: adam-b1 and adam-b2."""
    head_betas: Annotated[tuple[float, float] | None, DECAY_RATE] = None
    """Both decay rates of the head. None: adam-b1 and adam-b2."""
    value_embedding_betas: Annotated[tuple[float, float], DECAY_RATE] = (0.8, 0.995)
    """Both decay rates of the value embeddings."""
    input_scale_betas: Annotated[tuple[float, float], DECAY_RATE] = (0.96, 0.95)
    """Both decay rates of the layers' factors on the embedded input."""
    adam_eps: Annotated[float, Range(above=0, at_most=1)] = 1e-10
    """AdamW's epsilon, added to the root of the mean square."""
    muon_momentum: Annotated[float, DECAY_RATE] = 0.95
    """Muon's Nesterov momentum after its warm-up."""
    muon_momentum_start: Annotated[float, DECAY_RATE] = 0.85
    """Muon's momentum at the first step."""
    muon_momentum_steps: Annotated[int, Range(at_least=0)] = 300
    """Steps over which Muon's momentum rises linearly from the start to its final value."""
    muon_momentum_ratio: Annotated[float | None, FRACTION] = None
    """Fraction of the stage's steps over which it rises, in place of muon-momentum-steps. None: these."""
    muon_momentum_end: Annotated[float | None, DECAY_RATE] = None
    """Muon's momentum after the last step: it falls to that while the learning rates fall. None: it stays."""
    newton_schulz_steps: Annotated[int, Range(at_least=1, at_most=50)] = 5
    """Iterations that orthogonalise Muon's update."""
    newton_schulz_coefficients: Annotated[tuple[float, float, float], COEFFICIENT] = (3.4445, -4.7750, 2.0315)
    """Coefficients a b c of an iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    polar_express: bool = False
    """Orthogonalise by the five polynomials of Polar Express, one an iteration, in place of newton-schulz-*."""
    equalize_rows: bool = False
    """Before Muon orthogonalises a matrix, give what leads to each of its outputs the same norm (MuonEq)."""
    rescale: bool = False
    """Give Muon's orthogonalised matrices the Frobenius norm of an exactly orthogonal one (Muon+)."""
    muon_b2: Annotated[float | None, DECAY_RATE] = None
    """Decay rate of the mean square of Muon's update of each output or input, by whose root it is divided (NorMuon).
    None: it is not."""
    clip_norm: Annotated[float | None, Range(above=0)] = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it. None: no limit."""

    def __post_init__(self):
        super().__post_init__()
        if self.muon_momentum_start > self.muon_momentum:
            self.refuse("muon_momentum_start", f"at most the muon-momentum that it rises to, {self.muon_momentum:g}")
        if self.muon_momentum_end is not None and self.muon_momentum_end > self.muon_momentum:
            self.refuse("muon_momentum_end", f"at most the muon-momentum that it falls from, {self.muon_momentum:g}")


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """The stage's learning-rate schedule: warm-up from 0, constant, decay."""

    section = "schedule"
    of_a_stage = True

    warmup_ratio: Annotated[float, FRACTION] = 0.0
    """Fraction of the steps in which the learning rate rises linearly from 0."""
    decay_ratio: Annotated[float, FRACTION] = 0.2
    """Fraction of the steps, the last ones, in which the learning rate falls."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay."""
    final_fraction: Annotated[float, FRACTION] = 0.0
    """Learning rate at the end of the decay, as a fraction of the highest."""

    def __post_init__(self):
        super().__post_init__()
        self.check(
            self.warmup_ratio + self.decay_ratio <= 1 + ROUNDING,
            f"warmup-ratio is {self.warmup_ratio:g} and decay-ratio is {self.decay_ratio:g}; "
            "they must sum to at most 1",
        )
