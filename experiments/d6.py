"""A GPT of 6 layers on your text: one small GPU, minutes to an hour.

    python launch.py --experiment=d6 --data=DIR

Hardware: one GPU of 16 GB or more. Expected, not measured: 8 minutes of pretraining on an H100, for 0.7 billion tokens
at 30 % MFU.
"""

from jaxchat.config import (
    CostConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    ScheduleConfig,
)

experiment = Experiment(
    model=ModelConfig(depth=6),
    pretrain=PretrainConfig(batch_tokens=262_144, device_rows=32, eval_every=250, sample_every=1000),
    midtrain=FinetuneConfig(
        mixture=("chat", "smoltalk", "mmlu", "gsm8k", "spelling:20000"),
        batch_tokens=131_072,
        device_rows=32,
        eval_every=150,
    ),
    sft=FinetuneConfig(
        mixture=("chat", "smoltalk:10000", "arc_easy", "arc_challenge", "gsm8k", "spelling:300"),
        batch_tokens=16_384,
        device_rows=8,
        lr_fraction=0.02,
        schedule=ScheduleConfig(decay_ratio=1.0),
        eval_every=100,
    ),
    cost=CostConfig(device="NVIDIA H100", devices=1, expected_mfu=0.30),
)
