"""One experiment a file: `experiment` is its settings, its docstring what it takes and what it gives."""

from jaxchat.config import (
    CostConfig,
    DataConfig,
    Experiment,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    ScheduleConfig,
    TokenizerConfig,
)


def on_text(
    depth: int,
    *,
    devices: int,
    mfu: float,
    shards: int,
    device_rows: int = 32,
    vocab_size: int = 32_768,
    pretrain_tokens: int = 524_288,
    midtrain_tokens: int = 131_072,
    sft_rows: int = 8,
) -> Experiment:
    """The recipe of every depth on real text: pretraining of 20 tokens a parameter, midtraining and SFT on what tasks
    the data folder has, RL on GSM8K.

    Args:
      devices, mfu: what the dry run expects to run on: so many H100s, used to this fraction.
      shards: of FineWeb-Edu, each about 53 million tokens, where the user brings no text.
      device_rows: rows of 2,048 tokens that a device takes at once; as many as its memory holds.
      pretrain_tokens, midtrain_tokens: tokens of an optimizer step.
      sft_rows: rows that a device takes at once in SFT, whose step is 16,384 tokens.
    """
    return Experiment(
        data=DataConfig(download=(f"fineweb-edu:{shards}", "smoltalk", "mmlu", "arc", "gsm8k", "humaneval")),
        tokenizer=TokenizerConfig(vocab_size=vocab_size),
        model=ModelConfig(depth=depth),
        pretrain=PretrainConfig(batch_tokens=pretrain_tokens, device_rows=device_rows),
        midtrain=FinetuneConfig(
            mixture=("chat", "smoltalk", "mmlu", "gsm8k", "spelling:20000"),
            batch_tokens=midtrain_tokens,
            device_rows=device_rows,
            eval_every=150,
        ),
        sft=FinetuneConfig(
            mixture=("chat", "smoltalk:10000", "arc_easy", "arc_challenge", "gsm8k", "spelling:300"),
            batch_tokens=16_384,
            device_rows=sft_rows,
            lr_fraction=0.02,
            schedule=ScheduleConfig(decay_ratio=1.0),
            eval_every=100,
        ),
        cost=CostConfig(device="NVIDIA H100", devices=devices, expected_mfu=mfu),
    )
