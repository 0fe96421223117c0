"""What surrounds the training: checkpoints, logs, and costs."""

from __future__ import annotations

from dataclasses import dataclass

from jaxchat.config.ranges import check_each
from jaxchat.errors import check


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a stage are kept; a stage's result is its last one."""

    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep also the checkpoints of steps that this number divides. None: no others."""
    keep_best: bool = False
    """Whether to keep also the checkpoint with the best evaluation."""

    def __post_init__(self):
        check(self.keep >= 1, f"checkpoints.keep is {self.keep}; it must be at least 1")
        every = self.keep_every
        check(every is None or every >= 1, f"checkpoints.keep-every is {every}; it must be at least 1")


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics are written besides the run's metrics.jsonl."""

    tensorboard: bool = False
    """Whether to write them for TensorBoard too."""
    wandb: bool = False
    """Whether to send them to Weights & Biases too."""


@dataclass(frozen=True)
class CostConfig:
    """What the dry run and the report expect of the hardware, and what it costs."""

    device: str = "NVIDIA H100"
    """Kind of device, as JAX names it."""
    devices: int = 1
    """Number of devices."""
    dollars_per_device_hour: float = 3.0
    """Price of a device for an hour, in dollars."""
    expected_mfu: float = 0.45
    """Fraction of the devices' peak FLOP/s that training is expected to use."""

    def __post_init__(self):
        check_each(self, "cost.", lambda value: value >= 1, "at least 1", "devices")
        check_each(self, "cost.", lambda value: value >= 0, "0 or more", "dollars_per_device_hour")
        check_each(self, "cost.", lambda value: 0 < value <= 1, "above 0 and at most 1", "expected_mfu")

    def hours(self, flops: float, peak: float) -> float:
        """Hours for `flops` on the devices, of `peak` FLOP/s each, at the expected MFU."""
        return flops / (self.expected_mfu * self.devices * peak) / 3600

    def dollars(self, hours: float, devices: int | None = None) -> float:
        """The price of so many hours of `devices`, by default those of this config."""
        return hours * (self.devices if devices is None else devices) * self.dollars_per_device_hour
