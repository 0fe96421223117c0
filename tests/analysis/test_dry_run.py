"""The dry run plans the stages that the experiment has."""

import pytest

from jaxchat.analysis.dry_run import dry_run
from jaxchat.config import CostConfig, Experiment, FinetuneConfig, ModelConfig, PretrainConfig, TokenizerConfig
from jaxchat.errors import UserError


def plan(*stages: str, **batch_tokens: int) -> None:
    """Of rows of 96 tokens on the 4 devices of the tests, which do not divide the default batch of pretraining."""
    dry_run(
        Experiment(
            name="planned",
            stages=stages,
            tokenizer=TokenizerConfig(vocab_size=300),
            model=ModelConfig(depth=1, sequence_len=96),
            pretrain=PretrainConfig(batch_tokens=batch_tokens.get("pretrain", 524_288)),
            midtrain=FinetuneConfig(batch_tokens=batch_tokens.get("midtrain", 524_288)),
            sft=FinetuneConfig(batch_tokens=batch_tokens.get("sft", 524_288)),
            cost=CostConfig(device="cpu"),
        )
    )


@pytest.mark.parametrize(
    ("stages", "batch_tokens", "rows"),
    [
        (("sft", "report"), {"sft": 768}, 2),
        (("midtrain", "sft"), {"midtrain": 1152, "sft": 384}, 3),
        (("tokenizer", "pretrain", "sft"), {"pretrain": 1536, "sft": 768}, 4),
    ],
)
def test_the_step_of_the_first_stage_is_compiled(stages, batch_tokens, rows, capsys):
    plan(*stages, **batch_tokens)
    out = capsys.readouterr().out
    assert f"{rows} rows, remat none: a step takes" in out and "GiB a device" in out
    assert [line.split()[0] for line in out.splitlines() if "x the data" in line or " x 1 " in line] == [
        stage for stage in stages if stage in batch_tokens
    ]


def test_without_such_a_stage_nothing_is_compiled(capsys):
    plan("rl", "evaluate", "report")
    out = capsys.readouterr().out
    assert "parameters" in out and "memory" not in out and "GiB" not in out


@pytest.mark.parametrize("stages", [("sft", "report"), ("midtrain", "sft")])
def test_the_stage_whose_batch_does_not_divide_is_named(stages):
    with pytest.raises(UserError, match=r"\Asft: batch-tokens 1000 is not a multiple of 384 "):
        plan(*stages, midtrain=768, sft=1000)
