"""Fine-tuning of a model that is there, on your conversations: one GPU, or a CPU for a small model.

    python launch.py --experiment=finetune --init-from=RUN --data=DIR             # DIR/chat/train.jsonl
    python launch.py --experiment=finetune --init-from=RUN --sft.mixture=FILE.jsonl

RUN is a run directory: of a training, or of a downloaded model (`jaxchat import`), whose sizes the new run has.
Hardware: training takes about 14 bytes of memory a parameter, and room for activations; --dry-run shows both. A shorter
context (--model.sequence-len=512) saves time and memory where conversations are short.
"""

from jaxchat.config import EvaluateConfig, Experiment, FinetuneConfig, ScheduleConfig

experiment = Experiment(
    stages=("sft", "report"),
    sft=FinetuneConfig(
        mixture=("chat",),
        batch_tokens=8_192,
        epochs=3.0,
        lr_fraction=0.1,
        schedule=ScheduleConfig(decay_ratio=1.0),
        eval_every=50,
        eval_tokens=262_144,
    ),
    evaluate=EvaluateConfig(of=("pretrain", "sft")),
)
