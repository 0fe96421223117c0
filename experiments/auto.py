"""A chatbot from your text, of sizes that suit it: depth, vocabulary, context and steps follow from how much there is.

    python launch.py --experiment=auto --data=DIR
    python launch.py --experiment=auto --data=DIR --dry-run     # what it would be

A start counts the text and says what it proposes. Sizes that you set stay, such as --model.depth=6, and the others
follow from them too.
"""

from jaxchat.config import DataConfig, EvaluateConfig, Experiment, FinetuneConfig, ScheduleConfig

experiment = Experiment(
    sizes="auto",
    data=DataConfig(shuffle=True),  # a folder's files may differ in kind, and the last would be what is learnt best
    stages=("tokenizer", "pretrain", "midtrain", "sft", "evaluate", "report"),
    midtrain=FinetuneConfig(mixture=("chat",), batch_tokens=131_072, lr_fraction=0.5),
    sft=FinetuneConfig(
        mixture=("chat",), batch_tokens=16_384, lr_fraction=0.3, schedule=ScheduleConfig(decay_ratio=1.0)
    ),
    evaluate=EvaluateConfig(tasks=("sums", "letters"), of=("midtrain", "sft"), limit=200),
)
