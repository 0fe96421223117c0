"""What changes with the step: the learning-rate multiplier, Muon's momentum and its weight decay.

All are optax schedules, functions of the number of updates done so far (0 at the first).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxchat.config import OptimizerConfig, ScheduleConfig


def multiplier(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """The factor on every learning rate at each of `total_steps` updates.

    Warm-up over the first `warmup_ratio` is (step + 1) / warmup_steps, so that the first update already moves. The
    decay reaches `final_fraction` one step after the last update, which so still counts: the schedule of nanochat.
    """
    warmup_steps = round(config.warmup_ratio * total_steps)
    decay_steps = round(config.decay_ratio * total_steps)

    def schedule(count):
        xp = _numpy_for(count)
        warmup = xp.minimum((count + 1) / max(1, warmup_steps), 1.0)
        left = _left(xp, count, total_steps, decay_steps)
        if config.decay == "cosine":
            left = (1.0 - xp.cos(xp.pi * left)) / 2.0
        decay = config.final_fraction + (1.0 - config.final_fraction) * left
        return warmup * (decay if decay_steps else 1.0)

    return schedule


def muon_momentum(
    config: OptimizerConfig, schedule: ScheduleConfig | None = None, total_steps: int | None = None
) -> optax.Schedule:
    """Muon's momentum: linear from `muon_momentum_start` to `muon_momentum` over `muon_momentum_steps` updates.

    With `muon_momentum_ratio` it rises over that part of `total_steps` instead. With `muon_momentum_end` it falls to
    that linearly while the learning rates fall by `schedule`; until the falling line is below the rising one it still
    rises, so that short trainings have no jump. Where the number of steps is not known, it does neither.
    """
    start, peak, end = config.muon_momentum_start, config.muon_momentum, config.muon_momentum_end
    if schedule is None or total_steps is None or not momentum_follows_length(config):
        steps = config.muon_momentum_steps  # of 0, optax would stay at the start
        return optax.linear_schedule(start, peak, steps) if steps else optax.constant_schedule(peak)
    ratio, rising = config.muon_momentum_ratio, config.muon_momentum_steps
    rising = rising if ratio is None else round(ratio * total_steps)
    decay_steps = round(schedule.decay_ratio * total_steps)

    def momentum(count):
        xp = _numpy_for(count)
        risen = start + (peak - start) * xp.clip(count / rising, 0.0, 1.0) if rising else peak
        left = _left(xp, count, total_steps, decay_steps)
        return risen + 0.0 * count if end is None else xp.minimum(risen, end + (peak - end) * left)

    return momentum


def momentum_follows_length(config: OptimizerConfig) -> bool:
    """Whether Muon's momentum depends on how long a training is."""
    return config.muon_momentum_ratio is not None or config.muon_momentum_end is not None


def matrix_decay(config: OptimizerConfig, total_steps: int | None = None) -> optax.Schedule:
    """Muon's weight decay: half a cosine from `matrix_weight_decay` to 0 at the end of `total_steps`.

    Where the number of steps is not known, it is constant.
    """
    if total_steps is None:
        return optax.constant_schedule(config.matrix_weight_decay)

    def decay(count):
        xp = _numpy_for(count)
        return config.matrix_weight_decay * (1 + xp.cos(xp.pi * count / total_steps)) / 2

    return decay


def _left(xp: Any, count: Any, total_steps: int, decay_steps: int) -> Any:
    """The part that is left of the steps in which the rates fall; 1 before them."""
    return xp.clip((total_steps - count) / max(1, decay_steps), 0.0, 1.0)


def _numpy_for(count: Any) -> Any:
    """A Python int is answered on the host: a log line must not queue behind the steps that the device still has."""
    return jnp if isinstance(count, jax.Array) else np
