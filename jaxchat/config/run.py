"""What surrounds the training: checkpoints, logs, and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxchat.config.ranges import Range, Section


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Which checkpoints of a stage are kept; its result always is."""

    section = "checkpoints"

    keep: Annotated[int, Range(at_least=1)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int | None, Range(at_least=1)] = None
    """Keep also the checkpoints of steps that this number divides. None: no others."""
    keep_best: bool = False
    """Whether to keep also rl's checkpoint with the best evaluation, as the other stages always do."""


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Where metrics are written besides the run's metrics.jsonl."""

    section = "logging"

    tensorboard: bool = False
    """Whether to write them for TensorBoard too."""
    wandb: bool = False
    """Whether to send them to Weights & Biases too."""


@dataclass(frozen=True)
class CostConfig(Section):
    """What the dry run and the report expect of the hardware, and what it costs."""

    section = "cost"

    device: str = "NVIDIA H100"
    """Kind of device, as JAX names it."""
    devices: Annotated[int, Range(at_least=1, at_most=1024)] = 1
    """Number of devices."""
    dollars_per_device_hour: Annotated[float, Range(at_least=0, at_most=1_000_000)] = 3.0
    """Price of a device for an hour, in dollars."""
    expected_mfu: Annotated[float, Range(above=0, at_most=1)] = 0.45
    """Fraction of the devices' peak FLOP/s that training is expected to use."""

    def hours(self, flops: float, peak: float) -> float:
        """Hours for `flops` on the devices, of `peak` FLOP/s each, at the expected MFU."""
        return flops / (self.expected_mfu * self.devices * peak) / 3600

    def dollars(self, hours: float, devices: int | None = None) -> float:
        """The price of so many hours of `devices`, by default those of this config."""
        return hours * (self.devices if devices is None else devices) * self.dollars_per_device_hour
