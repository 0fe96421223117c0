"""The speedrun: a GPT of 20 layers and 561 million parameters, 11.2 billion tokens, eight GPUs.

    python launch.py --experiment=speedrun --data=DIR

The run of nanochat's `speedrun.sh`: vocabulary 65,536, 524,288 tokens a step, 20 tokens a parameter.
Hardware: 8 x H100. Expected, not measured: 3.1 hours for pretraining at 45 % MFU, about $73 at $3 a GPU-hour.
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
    model=ModelConfig(depth=20),
    pretrain=PretrainConfig(batch_tokens=524_288, device_rows=32),
    midtrain=FinetuneConfig(
        mixture=("chat", "smoltalk", "mmlu", "gsm8k", "spelling:20000"),
        batch_tokens=524_288,
        device_rows=32,
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
    cost=CostConfig(device="NVIDIA H100", devices=8, expected_mfu=0.45),
)
