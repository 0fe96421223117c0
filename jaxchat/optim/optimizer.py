"""The one optimizer of all stages: Muon for the blocks' matrices, AdamW for embedding and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxchat.config import OptimizerConfig
from jaxchat.model.config import GPTConfig
from jaxchat.model.parameters import groups_of
from jaxchat.optim.muon import scale_by_muon
from jaxchat.optim.schedules import muon_momentum

# The AdamW rates were tuned at the width of d12; others scale by the root of the ratio.
REFERENCE_WIDTH = 768


def learning_rates(
    config: OptimizerConfig, model: GPTConfig, schedule: optax.Schedule, *, lr_fraction: float = 1.0
) -> Callable[[Any], dict[str, Any]]:
    """A function of the step: the rates of the three groups as `lr_matrix`, `lr_embedding` and `lr_head`."""
    adam_scale = (model.width / REFERENCE_WIDTH) ** -0.5
    peaks = {
        "lr_matrix": config.matrix_lr * lr_fraction,
        "lr_embedding": config.embedding_lr * adam_scale * lr_fraction,
        "lr_head": config.head_lr * adam_scale * lr_fraction,
    }
    return lambda step: {name: peak * schedule(step) for name, peak in peaks.items()}


def make_optimizer(
    config: OptimizerConfig,
    model: GPTConfig,
    schedule: optax.Schedule,
    *,
    lr_fraction: float = 1.0,
    mesh: Mesh | None = None,
    newton_schulz_dtype: DTypeLike = jnp.bfloat16,
) -> optax.GradientTransformation:
    """Clips the gradient's global norm, then updates each group by its own method, all rates times `schedule(count)`.

    A caller that logs `optax.tree.norm(gradients)` under the same jit pays for it once: XLA merges it with the clip's.
    """
    rates = learning_rates(config, model, schedule, lr_fraction=lr_fraction)

    def adamw(name: str) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: rates(count)[name],
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )

    muon = optax.chain(
        scale_by_muon(
            muon_momentum(config),
            steps=config.newton_schulz_steps,
            coefficients=config.newton_schulz_coefficients,
            dtype=newton_schulz_dtype,
            mesh=mesh,
        ),
        optax.scale_by_learning_rate(lambda count: rates(count)["lr_matrix"]),
    )
    groups: dict = {"matrix": muon, "embedding": adamw("lr_embedding"), "head": adamw("lr_head")}
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.multi_transform(groups, groups_of))
