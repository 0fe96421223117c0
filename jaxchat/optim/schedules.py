"""What changes with the step: the learning-rate multiplier and Muon's momentum.

Both are optax schedules, functions of the number of updates done so far (0 at the first).
"""

from __future__ import annotations

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
        # A Python int is answered on the host: a log line must not queue behind the steps that the device still has.
        xp = jnp if isinstance(count, jax.Array) else np
        warmup = xp.minimum((count + 1) / max(1, warmup_steps), 1.0)
        left = xp.clip((total_steps - count) / max(1, decay_steps), 0.0, 1.0)
        if config.decay == "cosine":
            left = (1.0 - xp.cos(xp.pi * left)) / 2.0
        decay = config.final_fraction + (1.0 - config.final_fraction) * left
        return warmup * (decay if decay_steps else 1.0)

    return schedule


def muon_momentum(config: OptimizerConfig) -> optax.Schedule:
    """Muon's momentum: linear from `muon_momentum_start` to `muon_momentum` over `muon_momentum_steps` updates."""
    return optax.linear_schedule(config.muon_momentum_start, config.muon_momentum, config.muon_momentum_steps)
