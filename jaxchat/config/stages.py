"""The stages that train, and their evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxchat.config.optimizer import ScheduleConfig
from jaxchat.config.ranges import check_each
from jaxchat.errors import check

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "rl", "evaluate", "report")


@dataclass(frozen=True)
class TrainConfig:
    """What all training stages have: length, learning rate, and how often to evaluate, sample and save."""

    device_rows: int = 32
    """Rows that a device computes at once; more of a step's rows are accumulated one after another."""
    num_iterations: int | None = None
    """Optimizer steps. None: as many as the stage needs for its data."""
    lr_fraction: float = 1.0
    """Factor on the learning rates of the optimizer section in this stage."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 250
    """Steps between evaluations. 0: only before the first and after the last step."""
    sample_every: int = 0
    """Steps between samples of the model's output. 0: only after the last step."""
    save_every: int = 1000
    """Steps between checkpoints. 0: only after the last step, or when the run is stopped."""

    def __post_init__(self):
        check_each(self, "", lambda value: value >= 1, "at least 1", "device_rows")
        check_each(self, "", lambda value: value is None or value >= 1, "at least 1", "num_iterations")
        check(self.lr_fraction > 0, "lr-fraction must be above 0")
        check_each(self, "", lambda value: value >= 0, "0 or more", "eval_every", "sample_every", "save_every")


@dataclass(frozen=True)
class SupervisedConfig(TrainConfig):
    """Training on given tokens: pretraining, midtraining and SFT."""

    batch_tokens: int = 524_288
    """Tokens of an optimizer step, on all devices together."""

    def __post_init__(self):
        super().__post_init__()
        check_each(self, "", lambda value: value >= 1, "at least 1", "batch_tokens")


@dataclass(frozen=True)
class PretrainConfig(SupervisedConfig):
    """Pretraining on plain text."""

    num_iterations: int | None = None
    """Optimizer steps. None: as many as target-flops or, without it, tokens-per-param gives."""
    target_flops: float | None = None
    """Training compute in FLOPs, such as 1e19. None: tokens-per-param decides."""
    tokens_per_param: float = 20.0
    """Training tokens for each parameter; 20 is about compute-optimal."""
    eval_tokens: int = 10_485_760
    """Validation tokens of an evaluation."""
    sample_every: int = 2000

    def __post_init__(self):
        super().__post_init__()
        check_each(self, "pretrain.", lambda value: value is None or value > 0, "above 0", "target_flops")
        check_each(self, "pretrain.", lambda value: value > 0, "above 0", "tokens_per_param", "eval_tokens")


@dataclass(frozen=True)
class FinetuneConfig(SupervisedConfig):
    """Fine-tuning on conversations; only what the assistant writes is trained on."""

    num_iterations: int | None = None
    """Optimizer steps. None: as many as the epochs take."""
    mixture: tuple[str, ...] = ("chat",)
    """Tasks to train on: NAME or NAME:EXAMPLES, or the path of a .jsonl file with conversations."""
    epochs: float = 1.0
    """Passes over the mixture, unless num-iterations is set."""
    eval_tokens: int = 1_048_576
    """Validation tokens of an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        check(len(self.mixture) > 0, "mixture is empty; name at least one task, such as 'chat'")
        check(self.epochs > 0, "epochs must be above 0")
        check_each(self, "", lambda value: value > 0, "above 0", "eval_tokens")


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """Reinforcement learning on questions whose answers can be checked."""

    num_iterations: int | None = None
    """Optimizer steps. None: one pass over the questions."""
    method: Literal["reinforce", "best_of_n"] = "reinforce"
    """Weight each sampled token by its answer's reward minus the mean of the question's samples (reinforce), or
    fine-tune on each question's best sample (best_of_n)."""
    tasks: tuple[str, ...] = ("gsm8k",)
    """Tasks that ask and reward: NAME or NAME:EXAMPLES."""
    questions_per_step: int = 16
    """Questions of an optimizer step."""
    samples_per_question: int = 16
    """Answers that are sampled for each question."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; lower is less varied."""
    top_k: int | None = 50
    """Sample from the k likeliest tokens. None: from all."""
    lr_fraction: float = 0.05
    eval_questions: int = 400
    """Held-out questions of an evaluation."""
    eval_every: int = 60

    def __post_init__(self):
        super().__post_init__()
        check(
            self.samples_per_question >= 2,
            f"rl.samples-per-question is {self.samples_per_question}; it must be at least 2: answers are compared with "
            "each other",
        )
        counts = ("questions_per_step", "max_new_tokens", "eval_questions")
        check_each(self, "rl.", lambda value: value >= 1, "at least 1", *counts)
        check(
            self.temperature > 0,
            f"rl.temperature is {self.temperature}; it must be above 0: nothing is learnt from identical answers",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """The tasks that the finished stages are compared on."""

    tasks: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    """Tasks to score: NAME or NAME:EXAMPLES."""
    of: tuple[str, ...] = ("midtrain", "sft", "rl")
    """Stages whose models are scored."""
    limit: int | None = None
    """Questions of each task, at most. None: all."""
    batch_rows: int = 64
    """Questions that the model answers at once."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""

    def __post_init__(self):
        check(self.limit is None or self.limit >= 1, f"evaluate.limit is {self.limit}; it must be at least 1")
        check(
            self.batch_rows >= 1 and self.max_new_tokens >= 1,
            "evaluate.batch-rows and evaluate.max-new-tokens must be at least 1",
        )
