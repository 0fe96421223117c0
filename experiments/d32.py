"""A GPT of 32 layers and 1.9 billion parameters, 38 billion tokens, eight GPUs for more than a day.

    python launch.py --experiment=d32 --data=DIR

Hardware: 8 x H100. Expected, not measured: 32 hours for pretraining at 50 % MFU, about $765 at $3 a GPU-hour.
"""

from jaxchat.config import (
    CostConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    ScheduleConfig,
    TokenizerConfig,
)

experiment = Experiment(
    tokenizer=TokenizerConfig(vocab_size=65_536),
    model=ModelConfig(depth=32),
    pretrain=PretrainConfig(batch_tokens=524_288, device_rows=8),
    midtrain=FinetuneConfig(
        mixture=("chat", "smoltalk", "mmlu", "gsm8k", "spelling:20000"),
        batch_tokens=524_288,
        device_rows=8,
        eval_every=150,
    ),
    sft=FinetuneConfig(
        mixture=("chat", "smoltalk:10000", "arc_easy", "arc_challenge", "gsm8k", "spelling:300"),
        batch_tokens=16_384,
        device_rows=1,
        lr_fraction=0.02,
        schedule=ScheduleConfig(decay_ratio=1.0),
        eval_every=100,
    ),
    cost=CostConfig(device="NVIDIA H100", devices=8, expected_mfu=0.50),
)
