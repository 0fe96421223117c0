"""Settings that several experiments share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxchat.config import (
    CostConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RLConfig,
    ScheduleConfig,
    TokenizerConfig,
)

SCORED = ("arc_easy", "mmlu", "gsm8k")  # while midtraining and SFT learn to answer
# What nanochat of July 2026 is tuned for: layers, tokens of a step and steps, with Muon's decay and momentum there.
REFERENCE_DEPTH, REFERENCE_BATCH, REFERENCE_STEPS = 12, 1 << 19, 2520
REFERENCE_DECAY, REFERENCE_MOMENTUM = 0.28, 0.97
# At `REFERENCE_BATCH`; those of embeddings and head for a width of 768, from which the optimizer scales them. nanochat
# gives gates to Muon; the rate for AdamW moves their entries about as far. The rates of the input's scales and of the
# scalars are a tenth of nanochat's: with those, scales wandered off to -6 and 4 within a hundred steps, and trainings
# that differed in nothing but a factor of 1.5 on all rates were 0.03 bits per byte apart.
RATES = {
    "matrix_lr": 0.02,
    "embedding_lr": 0.3,
    "head_lr": 0.008,
    "value_embedding_lr": 0.15,
    "residual_scale_lr": 0.005,
    "input_scale_lr": 0.05,
    "scalar_lr": 0.02,
    "gate_lr": 0.006,
}
# The time in which weights forget, B / (rate x decay), is kept in proportion to the tokens of the training: Wang and
# Aitchison (2024), arXiv:2405.13698. The rate grows with sqrt(B), so the decay does too.
DECAY_BATCH_EXPONENT, DECAY_TOKENS_EXPONENT = 0.5, -1.0
# The square root is that of Adam's theory (Malladi et al. 2022, arXiv:2205.10287); for Muon it is taken on trust. The
# best rate falls with the tokens of a training (Bjorck et al. 2024, arXiv:2409.19913): with this exponent the rates of
# the reference become those that were best for a d12 on 26 and 52 million tokens (benchmarks/RESULTS.md).
RATE_BATCH_EXPONENT, RATE_TOKENS_EXPONENT = 0.5, -0.32
# A shorter training can average over fewer steps. For normalized SGD, whose steps are as long after any gradient, as
# Muon's are, the bound of Cutkosky and Mehta (2020), arXiv:2002.03305, has 1 - momentum fall with the root of their
# number; 0.9 to 0.95 were best in runs of 400 steps.
MOMENTUM_STEPS_EXPONENT = -0.5
LEAST_MOMENTUM, LAST_MOMENTUM = 0.85, 0.9  # at the first step, and after the last


def on_text(
    depth: int,
    *,
    devices: int,
    mfu: float,
    shards: int,
    vocab_size: int = 32_768,
    pretrain_tokens: int = 524_288,
    midtrain_tokens: int = 131_072,
    text: str = "fineweb-edu",
) -> Experiment:
    """Training on real text: 20 pretraining tokens per parameter, then midtraining and SFT, then RL on GSM8K.

    Midtraining and SFT leave out the tasks that the data folder does not have. Pretraining measures CORE where it has
    that.

    Args:
      devices: H100s that the dry run expects.
      mfu: fraction of their peak FLOP/s that it expects training to use.
      shards: shards of `text`, about 53 million tokens each of FineWeb-Edu, to download where the user brings no text.
      pretrain_tokens, midtrain_tokens: tokens of an optimizer step.
      text: the name of the pretraining text among the data sets.
    """
    return Experiment(
        data=DataConfig(download=(f"{text}:{shards}", "smoltalk", "mmlu", "arc", "gsm8k", "humaneval")),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        model=ModelConfig(depth=depth),
        pretrain=PretrainConfig(batch_tokens=pretrain_tokens, core_every=2000),
        midtrain=FinetuneConfig(
            mixture=("chat", "smoltalk", "mmlu", "gsm8k", "spelling:20000", "identity:2000"),
            batch_tokens=midtrain_tokens,
            eval_every=150,
            tasks=SCORED,
            tasks_every=600,
        ),
        sft=FinetuneConfig(
            mixture=("chat", "smoltalk:10000", "arc_easy", "arc_challenge", "gsm8k", "spelling:300", "identity:2000"),
            batch_tokens=16_384,
            lr_fraction=0.02,
            schedule=ScheduleConfig(decay_ratio=1.0),
            eval_every=100,
            tasks=SCORED,
            tasks_every=200,
        ),
        # Muon's step is as long after a weak signal as after a strong one, and small models solve few of the problems.
        rl=RLConfig(schedule=ScheduleConfig(decay_ratio=1.0), refill=4),
        evaluate=EvaluateConfig(tasks=("arc_easy", "arc_challenge", "mmlu", "gsm8k", "identity")),
        cost=CostConfig(device="NVIDIA H100", devices=devices, expected_mfu=mfu),
    )


def evening(depth: int, *, device: str, dollars: float, mfu: float, shards: int, vocab_size: int) -> Experiment:
    """Training on real text within an evening on a graphics card of one's own: `on_text` with less of everything.

    Pretraining has 10 tokens per parameter, 12 to 13 per parameter of a matrix product, which nanochat's fits of 2026
    find compute-optimal. Models of this size answer no problem of GSM8K, so that RL has nothing to reward.

    Args:
      device: the card that the dry run expects, as JAX names it.
      dollars: the electricity of an hour, of the card and the computer around it.
      mfu, shards, vocab_size: as in `on_text`.
    """
    long = on_text(depth, devices=1, mfu=mfu, shards=shards, vocab_size=vocab_size, pretrain_tokens=262_144)
    mixture = tuple("smoltalk:100000" if entry == "smoltalk" else entry for entry in long.midtrain.mixture)
    return dataclasses.replace(
        long,
        stages=tuple(stage for stage in long.stages if stage != "rl"),
        pretrain=dataclasses.replace(long.pretrain, tokens_per_param=10.0, eval_tokens=2_097_152),
        midtrain=dataclasses.replace(long.midtrain, mixture=mixture),
        evaluate=dataclasses.replace(long.evaluate, of=("midtrain", "sft")),
        cost=CostConfig(device=device, dollars_per_device_hour=dollars, expected_mfu=mfu),
    )


def modern(experiment: Experiment, *, tokens_per_counted_param: float = 12.0, warmup_steps: int = 0) -> Experiment:
    """`experiment` with what small GPTs have learnt since nanochat's recipe of 2025, on which the others are built.

    The model: value embeddings in every other layer, learned scales on the residual stream and on the embedded input,
    smear, backout, attention scores 1.44 times as large, longer wavelengths of RoPE, smaller initial values, windows of
    a quarter of the context in three of four layers. The optimizer: Muon with Polar Express, rows and columns of equal
    norm, and cautious decay; AdamW with rates, betas and decay by group. The schedules: rates that fall over two thirds
    of the steps to a twentieth, and a momentum that rises before and falls with them. The values are nanochat's of July
    2026 (92d63d4), but for the rates of scales and scalars, and for short trainings, whose momentum is lower
    (`momentum_of`). Where the steps are set, the rates of small batches are those of `REFERENCE_BATCH` tokens.

    A parameter counts if a matrix product uses it: those of the blocks and of the head. Where the steps of pretraining
    are not set, the experiment has `rules` too, so that all follows from the depth and the batch of the command line.

    Args:
      experiment: its depth, vocabulary, batch and, if they are set, pretraining steps stay.
      tokens_per_counted_param: pretraining tokens for each counted parameter, if the steps are not set.
      warmup_steps: in which the learning rates rise.
    """
    config, counted = experiment.pretrain, counted_parameters(experiment.model, experiment.tokenizer.vocab_size)
    steps = config.num_iterations or max(1, round(tokens_per_counted_param * counted / config.batch_tokens))
    batch = config.batch_tokens / REFERENCE_BATCH
    rate = math.sqrt(max(1.0, batch))
    rates: dict[str, Any] = {name: rounded(rate * value) for name, value in RATES.items()}
    momentum: dict[str, Any] = {name: rounded(value) for name, value in momentum_of(steps).items()}
    horizon = relative_horizon(experiment.model, experiment.tokenizer.vocab_size)
    schedule = ScheduleConfig(
        warmup_ratio=warmup_steps / steps, decay_ratio=min(0.65, 1 - warmup_steps / steps), final_fraction=0.05
    )
    return dataclasses.replace(
        experiment,
        rules="none" if config.num_iterations else "nanochat",
        model=dataclasses.replace(
            experiment.model,
            window_pattern="SSSL",
            rope_base=100_000.0,
            attention_scale=1.44,
            residual_scales=True,
            value_embeddings=True,
            smear=True,
            backout=True,
            embedding_std=0.8,
            up_factor=0.4,
            head_std=0.001,
        ),
        optimizer=OptimizerConfig(
            **rates,
            matrix_weight_decay=rounded(decay_of(config.batch_tokens, horizon)),
            embedding_weight_decay=0.001,
            head_weight_decay=0.01,
            value_embedding_weight_decay=0.01,
            residual_scale_weight_decay=0.05,
            embedding_betas=(0.8, 0.995),
            head_betas=(0.8, 0.96),
            value_embedding_betas=(0.8, 0.995),
            input_scale_betas=(0.96, 0.95),
            **momentum,
            polar_express=True,
            equalize_rows=True,
            rescale=True,
            muon_b2=0.9,
            clip_norm=None,
        ),
        pretrain=dataclasses.replace(
            config, num_iterations=steps, tokens_per_matrix_param=tokens_per_counted_param, schedule=schedule
        ),
    )


def counted_parameters(model: ModelConfig, vocab_size: int) -> int:
    """The parameters in matrix products: those of the blocks, and the head; no embeddings."""
    width, kv_width = model.width, model.kv_heads * model.head_dim
    block = 2 * width * width + 2 * width * kv_width + 8 * width * width
    return model.depth * block + width * (-(-vocab_size // 128) * 128)


def relative_horizon(model: ModelConfig, vocab_size: int) -> float:
    """The tokens of the training as a multiple of those of a model of `REFERENCE_DEPTH` layers, by one ratio."""
    reference = ModelConfig(depth=REFERENCE_DEPTH)
    return counted_parameters(model, vocab_size) / counted_parameters(reference, vocab_size)


def decay_of(batch_tokens: int, horizon: float) -> float:
    """Muon's weight decay, of a training of so many times the reference's tokens."""
    batch = (batch_tokens / REFERENCE_BATCH) ** DECAY_BATCH_EXPONENT
    return REFERENCE_DECAY * batch * horizon**DECAY_TOKENS_EXPONENT


def rate_factor(batch_tokens: int, tokens: float) -> float:
    """The learning rates of a training on so many tokens, as a multiple of `RATES`.

    A training longer than the reference has as high rates as one of its length.
    """
    reference = REFERENCE_STEPS * REFERENCE_BATCH
    shorter = min(1.0, tokens / reference) ** RATE_TOKENS_EXPONENT
    return (batch_tokens / REFERENCE_BATCH) ** RATE_BATCH_EXPONENT * shorter


def momentum_of(steps: int) -> dict[str, float]:
    """Muon's momentum in a training of so many steps, by the fields of `OptimizerConfig`.

    It rises over 400 steps, or until the rates fall, and falls with them. A training longer than the reference has as
    much momentum as the reference.
    """
    room = (1 - REFERENCE_MOMENTUM) * min(1.0, steps / REFERENCE_STEPS) ** MOMENTUM_STEPS_EXPONENT
    momentum = max(LEAST_MOMENTUM, 1 - room)
    return {
        "muon_momentum_start": LEAST_MOMENTUM,
        "muon_momentum": momentum,
        "muon_momentum_ratio": min(0.35, 400 / steps),
        "muon_momentum_end": min(LAST_MOMENTUM, momentum),
    }


def rounded(value: float) -> float:
    """`value` with three digits, as one would write it."""
    return float(f"{value:.3g}")
