"""Rules by which horizon, batch, learning rates and weight decay follow from the depth alone.

Those of nanochat, July 2026 (scripts/base_train.py, nanochat/gpt.py). Its constants are tuned for 12 layers and 524,288
tokens a step; larger and smaller trainings follow from these. Where the number of steps is set by hand, the decay is
that of the whole horizon. Nothing here is measured, and nothing needs JAX.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from jaxchat.config import Experiment
from jaxchat.recipes import (
    FIXED_RATES,
    RATES,
    REFERENCE_BATCH,
    counted_parameters,
    decay_of,
    relative_horizon,
)

# Bergsma et al. (2025), arXiv:2505.13738: the best batch grows with the tokens of the training to this power.
BATCH_EXPONENT = 0.383
# The square root is that of Adam's theory (Malladi et al. 2022, arXiv:2205.10287); for Muon it is taken on trust.
RATE_EXPONENT = 0.5
LENGTHS = ("pretrain.num_iterations", "pretrain.target_flops", "pretrain.tokens_per_param")


def best_batch(horizon: float) -> int:
    """Tokens of a step, a power of two, for a training of so many times the reference's tokens."""
    return 1 << round(math.log2(REFERENCE_BATCH * horizon**BATCH_EXPONENT))


def rates_of(batch_tokens: int) -> dict[str, float]:
    """The rates of a batch, by their fields in `OptimizerConfig`."""
    factor = (batch_tokens / REFERENCE_BATCH) ** RATE_EXPONENT
    return {**{name: factor * rate for name, rate in RATES.items()}, **FIXED_RATES}


def follow_rules(experiment: Experiment, given: Collection[str] = ()) -> Experiment:
    """`experiment` with what its `rules` decide; itself where it has none.

    Args:
      given: the fields that the user has set, such as `pretrain.batch_tokens`, which stay; the others follow from them
        too.

    Raises:
      Impossible: a value that its field cannot have.
    """
    if experiment.rules == "none":
        return experiment
    vocab_size, pretrain = experiment.tokenizer.vocab_size, experiment.pretrain
    horizon = relative_horizon(experiment.model, vocab_size)
    batch = pretrain.batch_tokens if "pretrain.batch_tokens" in given else best_batch(horizon)
    length: dict[str, Any] = {}
    if set(LENGTHS).isdisjoint(given):
        tokens = pretrain.tokens_per_matrix_param * counted_parameters(experiment.model, vocab_size)
        mean = dataclasses.replace(pretrain, batch_tokens=batch).mean_batch_tokens
        length = {"num_iterations": max(1, round(tokens / mean))}
    chosen = {**rates_of(batch), "matrix_weight_decay": decay_of(batch, horizon)}
    chosen = {name: value for name, value in chosen.items() if f"optimizer.{name}" not in given}
    return dataclasses.replace(
        experiment,
        pretrain=dataclasses.replace(pretrain, batch_tokens=batch, **length),
        optimizer=dataclasses.replace(experiment.optimizer, **chosen),
    )


def rules_lines(experiment: Experiment) -> list[str]:
    """What the rules have decided, for the user; [] without any."""
    if experiment.rules == "none":
        return []
    config, optimizer = experiment.pretrain, experiment.optimizer
    there = counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    length = "as long as you have set"
    if config.num_iterations is not None:
        tokens = round(config.num_iterations * config.mean_batch_tokens)
        length = f"{config.num_iterations:,} steps, {tokens:,} tokens, {tokens / there:.3g} for each"
    names = ("matrix_lr", "embedding_lr", "head_lr")
    rates = ", ".join(f"{name.removesuffix('_lr')} {getattr(optimizer, name):.3g}" for name in names)
    return [
        f"{there:,} parameters in matrices and head; batch {config.batch_tokens:,} tokens; {length}",
        f"learning rates at {config.batch_tokens / REFERENCE_BATCH:.3g} of the reference batch: {rates}; Muon's weight "
        f"decay {optimizer.matrix_weight_decay:.3g}",
    ]
