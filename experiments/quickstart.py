"""A small chatbot on a laptop: about ten minutes on 2 CPU cores, no GPU, no download.

    python launch.py --experiment=quickstart

The text, a made-up world with its stories and conversations, is generated.
"""

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

experiment = Experiment(
    data=DataConfig(
        generate=True, synthetic_documents=40_000, synthetic_conversations=40_000, shuffle=True, packing="concat"
    ),
    tokenizer=TokenizerConfig(vocab_size=1024),
    model=ModelConfig(depth=3, sequence_len=128),
    pretrain=PretrainConfig(
        batch_tokens=4096, num_iterations=360, eval_every=100, eval_tokens=65_536, sample_every=200
    ),
    midtrain=FinetuneConfig(batch_tokens=4096, num_iterations=150, lr_fraction=0.5, eval_every=75, eval_tokens=65_536),
    sft=FinetuneConfig(
        batch_tokens=4096,
        num_iterations=120,
        eval_every=60,
        eval_tokens=65_536,
        lr_fraction=0.3,
        schedule=ScheduleConfig(decay_ratio=1.0),
    ),
    rl=RLConfig(
        tasks=("long_sums", "sums:300", "letters:300", "facts"),
        questions_per_step=16,
        samples_per_question=8,
        num_iterations=30,
        max_new_tokens=64,
        lr_fraction=0.1,
        eval_questions=160,
        pass_k=4,
        eval_every=15,
        top_k=None,
    ),
    evaluate=EvaluateConfig(
        tasks=("sums", "letters", "facts", "long_sums"),
        of=("pretrain", "midtrain", "sft", "rl"),
        limit=200,
        max_new_tokens=64,
    ),
    cost=CostConfig(device="2 CPU cores", devices=1, dollars_per_device_hour=0.1),
)
