"""Settings that several experiments share."""

from __future__ import annotations

import dataclasses

from jaxchat.config import (
    CostConfig,
    DataConfig,
    EvaluateConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    RLConfig,
    ScheduleConfig,
    TokenizerConfig,
)

SCORED = ("arc_easy", "mmlu", "gsm8k")  # while midtraining and SFT learn to answer


def on_text(
    depth: int,
    *,
    devices: int,
    mfu: float,
    shards: int,
    vocab_size: int = 32_768,
    pretrain_tokens: int = 524_288,
    midtrain_tokens: int = 131_072,
) -> Experiment:
    """Training on real text: 20 pretraining tokens per parameter, then midtraining and SFT, then RL on GSM8K.

    Midtraining and SFT leave out the tasks that the data folder does not have. Pretraining measures CORE where it has
    that.

    Args:
      devices: H100s that the dry run expects.
      mfu: fraction of their peak FLOP/s that it expects training to use.
      shards: shards of FineWeb-Edu, about 53 million tokens each, to download where the user brings no text.
      pretrain_tokens, midtrain_tokens: tokens of an optimizer step.
    """
    return Experiment(
        data=DataConfig(download=(f"fineweb-edu:{shards}", "smoltalk", "mmlu", "arc", "gsm8k", "humaneval")),
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
