"""Rules by which horizon, batch, learning rates, momentum and weight decay follow from the depth alone.

Those of nanochat, July 2026 (scripts/base_train.py, nanochat/gpt.py). Its constants are tuned for 12 layers and 524,288
tokens a step; larger and smaller trainings follow from these. Where the length is set by hand, the decay is that of the
whole horizon. What is ours: shorter trainings have smaller batches, higher rates and less momentum (`best_batch` here,
`rate_factor` and `momentum_of` of jaxchat/recipes.py), as was best in benchmarks/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

from jaxchat.config import LENGTHS, Experiment
from jaxchat.recipes import (
    RATES,
    REFERENCE_BATCH,
    REFERENCE_STEPS,
    counted_parameters,
    decay_of,
    momentum_of,
    rate_factor,
    relative_horizon,
)

# Bergsma et al. (2025), arXiv:2505.13738: the best batch grows with the tokens of the training to this power.
BATCH_EXPONENT = 0.383
# Trainings of ours on 32 to 119 million tokens were best with batches of 32,000 to 65,000. The line through them and
# the reference has this exponent.
SHORT_BATCH_EXPONENT = 0.77
LEAST_BATCH = 1 << 15  # tokens: none smaller was best
OF_PRETRAINING = {f"pretrain.{name}" for name in LENGTHS["pretrain"]}


def best_batch(tokens: float) -> int:
    """Tokens of a step, a power of two, for a training on so many tokens."""
    relative = tokens / (REFERENCE_STEPS * REFERENCE_BATCH)
    exponent = BATCH_EXPONENT if relative > 1 else SHORT_BATCH_EXPONENT
    return max(LEAST_BATCH, 1 << round(math.log2(REFERENCE_BATCH * relative**exponent)))


def rates_of(batch_tokens: int, tokens: float) -> dict[str, float]:
    """The rates of a training, by their fields in `OptimizerConfig`."""
    factor = rate_factor(batch_tokens, tokens)
    return {name: factor * rate for name, rate in RATES.items()}


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
    whole = OF_PRETRAINING.isdisjoint(given)
    tokens = pretrain.tokens_per_matrix_param * counted_parameters(experiment.model, vocab_size)
    if not whole and "pretrain.num_iterations" not in given:
        pretrain = dataclasses.replace(pretrain, num_iterations=None)  # the experiment's own
        tokens = _wanted_tokens(dataclasses.replace(experiment, pretrain=pretrain))
    batch = pretrain.batch_tokens if "pretrain.batch_tokens" in given else best_batch(tokens)
    pretrain = dataclasses.replace(pretrain, batch_tokens=batch)
    if whole:
        steps = max(1, round(tokens / pretrain.mean_batch_tokens))
        pretrain = dataclasses.replace(pretrain, num_iterations=steps)
    steps = _steps(dataclasses.replace(experiment, pretrain=pretrain))
    chosen = {**rates_of(batch, steps * pretrain.mean_batch_tokens), "matrix_weight_decay": decay_of(batch, horizon)}
    if experiment.optimizer.muon_momentum_end is not None:
        chosen |= momentum_of(steps)
    chosen = {name: value for name, value in chosen.items() if f"optimizer.{name}" not in given}
    optimizer = dataclasses.replace(experiment.optimizer, **chosen)
    return dataclasses.replace(experiment, pretrain=pretrain, optimizer=optimizer)


def _wanted_tokens(experiment: Experiment) -> float:
    """The tokens of pretraining by its FLOPs, or by tokens per parameter."""
    from jaxchat.model.config import GPTConfig  # slow to import, as what follows
    from jaxchat.train.budget import wanted_tokens

    return wanted_tokens(experiment.pretrain, GPTConfig.of(experiment.model, experiment.tokenizer.vocab_size))


def _steps(experiment: Experiment) -> int:
    """The steps of pretraining."""
    if experiment.pretrain.num_iterations is not None:
        return experiment.pretrain.num_iterations
    from jaxchat.model.config import GPTConfig
    from jaxchat.train.budget import training_length

    return training_length(experiment.pretrain, GPTConfig.of(experiment.model, experiment.tokenizer.vocab_size))


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
    factor = rate_factor(config.batch_tokens, _steps(experiment) * config.mean_batch_tokens)
    momentum = "" if optimizer.muon_momentum_end is None else f", momentum up to {optimizer.muon_momentum:.3g}"
    return [
        f"{there:,} parameters in matrices and head; batch {config.batch_tokens:,} tokens; {length}",
        f"learning rates {factor:.3g} times the reference's: {rates}; Muon's weight decay "
        f"{optimizer.matrix_weight_decay:.3g}{momentum}",
    ]
