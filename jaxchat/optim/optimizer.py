"""The one optimizer of all stages: Muon for the blocks' matrices, AdamW for the other groups of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxchat.config import OptimizerConfig
from jaxchat.model.config import GPTConfig
from jaxchat.model.gpt import abstract_params
from jaxchat.model.parameters import groups_of
from jaxchat.optim.decay import add_cautious_decay
from jaxchat.optim.muon import Direction, Polynomial, scale_by_muon
from jaxchat.optim.schedules import matrix_decay, muon_momentum

# The AdamW rates were tuned at the width of d12; others scale by the root of the ratio.
REFERENCE_WIDTH = 768
# Amsel et al., "The Polar Express" (2025), arXiv:2505.16932: the best polynomials, one after the other, for singular
# values of at least about 0.001. The first has a slope of 8 at 0, so what rounding puts above 1 must stay below it.
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
POLAR_EXPRESS_SAFETY = 1.01


class AdamW(NamedTuple):
    """What AdamW does with a group: its highest rate, at a width of 768 if `by_width`, and the rest."""

    rate: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    by_width: bool = False


def adamw_groups(config: OptimizerConfig) -> dict[str, AdamW]:
    """The groups that AdamW updates."""
    betas = config.adam_b1, config.adam_b2

    def own(decay: float | None) -> float:
        return config.weight_decay if decay is None else decay

    return {
        "embedding": AdamW(
            config.embedding_lr, config.embedding_betas or betas, own(config.embedding_weight_decay), by_width=True
        ),
        "head": AdamW(config.head_lr, config.head_betas or betas, own(config.head_weight_decay), by_width=True),
        "value_embedding": AdamW(
            config.value_embedding_lr,
            config.value_embedding_betas,
            config.value_embedding_weight_decay,
            by_width=True,
        ),
        "residual_scale": AdamW(config.residual_scale_lr, betas, config.residual_scale_weight_decay),
        "input_scale": AdamW(config.input_scale_lr, config.input_scale_betas),
        "scalar": AdamW(config.scalar_lr, betas),
        "gate": AdamW(config.gate_lr, betas),
    }


def groups_in(params: Any) -> tuple[str, ...]:
    """The optimizer groups that have parameters, sorted."""
    return tuple(sorted(set(jax.tree.leaves(groups_of(params)))))


def peak_rates(config: OptimizerConfig, model: GPTConfig, lr_fraction: float = 1.0) -> dict[str, float]:
    """The highest learning rate of each group, whether the model has it or not, as `lr_matrix` and so on."""
    adam_scale = (model.width / REFERENCE_WIDTH) ** -0.5
    rates = {"lr_matrix": config.matrix_lr * lr_fraction}
    for name, group in adamw_groups(config).items():
        rates[f"lr_{name}"] = group.rate * (adam_scale if group.by_width else 1.0) * lr_fraction
    return rates


def learning_rates(
    config: OptimizerConfig, model: GPTConfig, schedule: optax.Schedule, *, lr_fraction: float = 1.0
) -> Callable[[Any], dict[str, Any]]:
    """A function of the step: the rates of the groups that the model has, such as `lr_matrix` and `lr_embedding`."""
    there = {f"lr_{name}" for name in groups_in(abstract_params(model))}
    peaks = {name: peak for name, peak in peak_rates(config, model, lr_fraction).items() if name in there}
    return lambda step: {name: peak * schedule(step) for name, peak in peaks.items()}


def make_optimizer(
    config: OptimizerConfig,
    model: GPTConfig,
    schedule: optax.Schedule,
    *,
    lr_fraction: float = 1.0,
    momentum: optax.Schedule | None = None,
    decay: optax.Schedule | None = None,
    mesh: Mesh | None = None,
    newton_schulz_dtype: DTypeLike = jnp.bfloat16,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient's global norm, then updates each group by its own method, all rates times `schedule(count)`.

    An update that is given `muon_momentum` or `muon_decay` uses these in place of the schedules'.

    A caller that logs `optax.tree.norm(gradients)` under the same jit pays for it once: XLA merges it with the clip's.

    Args:
      momentum: Muon's; None for that of `config` in a training whose length is not known.
      decay: Muon's weight decay, where `config` has one; None as above.
    """
    peaks = peak_rates(config, model, lr_fraction)

    def rate(name: str) -> optax.Schedule:
        return lambda count: peaks[f"lr_{name}"] * schedule(count)

    def adamw(name: str, group: AdamW) -> optax.GradientTransformation:
        b1, b2 = group.betas
        return optax.adamw(rate(name), b1=b1, b2=b2, eps=config.adam_eps, weight_decay=group.weight_decay)

    muon = [scale_by_muon(momentum or muon_momentum(config), muon_direction(config, newton_schulz_dtype), mesh=mesh)]
    if config.matrix_weight_decay:
        muon.append(add_cautious_decay(decay or matrix_decay(config)))
    groups = {"matrix": optax.chain(*muon, optax.scale_by_learning_rate(rate("matrix")))}
    groups |= {name: adamw(name, group) for name, group in adamw_groups(config).items()}
    # With nothing in the clip's place, so that checkpoints look alike.
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, _by_group(groups))


def muon_direction(config: OptimizerConfig, dtype: DTypeLike = jnp.bfloat16) -> Direction:
    """What Muon does with its momentum."""
    iterations = config.newton_schulz_steps * (config.newton_schulz_coefficients,)
    return Direction(
        POLAR_EXPRESS if config.polar_express else iterations,
        safety=POLAR_EXPRESS_SAFETY if config.polar_express else 1.0,
        equalize=config.equalize_rows,
        rescale=config.rescale,
        variance_decay=config.muon_b2,
        dtype=dtype,
    )


def _by_group(groups: dict[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Each parameter by its group's transformation; a group without parameters has no state either."""

    def there(params):
        names = groups_in(params)
        return optax.multi_transform({name: group for name, group in groups.items() if name in names}, groups_of)

    def update(updates, state, params=None, **extra):
        return there(updates).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: there(params).init(params), update)
