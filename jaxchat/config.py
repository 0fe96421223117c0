"""The settings of an experiment: frozen dataclasses, checked when they are built.

An `Experiment` says everything a run needs. The files in `experiments/` build one each; the command line overrides
single fields (`--pretrain.num-iterations=100`); the run directory keeps the result as `config.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxchat.errors import check, closest

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "rl", "evaluate", "report")
NUM_BYTES = 256


def _check_each(config: Any, section: str, fits: Callable[[Any], bool], what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(fits(value), f"{section}{name.replace('_', '-')} is {value}; it must be {what}")


@dataclass(frozen=True)
class ModelConfig:
    """The one dial is `depth`: the width is 64 a layer, heads are about 128 wide.

    `window_pattern` says how far back each layer's attention reaches: S a quarter of the context, L all of it. The
    letters are repeated over the layers; the last layer reaches all of it, whatever its letter.
    """

    depth: int = 12
    sequence_len: int = 2048
    window_pattern: str = "L"
    num_kv_heads: int | None = None
    rope_base: float = 10_000.0
    logit_cap: float = 15.0

    def __post_init__(self):
        check(self.depth >= 1, f"model.depth is {self.depth}; it must be at least 1")
        check(self.sequence_len >= 2, f"model.sequence-len is {self.sequence_len}; it must be at least 2")
        check(
            _depth_fits(self.depth),
            f"model.depth {self.depth} gives a width of {self.width}, which {self.num_heads} heads do not divide into "
            f"an even size; nearest that do: {_near_depths(self.depth)}",
        )
        kv = self.kv_heads
        check(
            kv >= 1 and self.num_heads % kv == 0,
            f"model.num-kv-heads is {kv}; it must divide the {self.num_heads} heads of depth {self.depth}",
        )
        check(
            bool(self.window_pattern) and set(self.window_pattern) <= set("SLsl"),
            f"model.window-pattern is {self.window_pattern!r}; write a letter a layer, S for a quarter of the context "
            "and L for all of it, repeated over the layers: such as SSSL",
        )
        _check_each(self, "model.", lambda value: value > 0, "above 0", "rope_base", "logit_cap")
        object.__setattr__(self, "window_pattern", self.window_pattern.upper())  # one model, one spelling

    @property
    def width(self) -> int:
        return 64 * self.depth

    @property
    def num_heads(self) -> int:
        return max(1, (self.width + 127) // 128)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer, the number of tokens before itself that a token sees; None for all of them."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)] + ["L"]
        return tuple(self.sequence_len // 4 if letter == "S" else None for letter in letters)


def _depth_fits(depth: int) -> bool:
    heads = max(1, (64 * depth + 127) // 128)
    return 64 * depth % (2 * heads) == 0


def _near_depths(depth: int) -> str:
    below = next((d for d in range(depth - 1, 0, -1) if _depth_fits(d)), None)
    above = next(d for d in range(depth + 1, depth + 200) if _depth_fits(d))
    return " and ".join(str(d) for d in (below, above) if d)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 for `data` takes all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        check(self.fsdp >= 1 and self.tensor >= 1, "mesh.fsdp and mesh.tensor must be at least 1")
        check(self.data == -1 or self.data >= 1, "mesh.data must be at least 1, or -1 for all devices left")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the blocks' matrices, AdamW for embedding and head. Adam's rates are scaled by (width/768)^-1/2."""

    matrix_lr: float = 0.02
    embedding_lr: float = 0.2
    head_lr: float = 0.004
    weight_decay: float = 0.0
    adam_b1: float = 0.8
    adam_b2: float = 0.95
    adam_eps: float = 1e-10
    muon_momentum: float = 0.95
    muon_momentum_start: float = 0.85
    muon_momentum_steps: int = 300
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("matrix_lr", "embedding_lr", "head_lr", "newton_schulz_steps", "clip_norm"):
            check(getattr(self, name) > 0, f"optimizer.{name.replace('_', '-')} must be above 0")
        rates = ("adam_b1", "adam_b2", "muon_momentum", "muon_momentum_start")
        _check_each(self, "optimizer.", lambda value: 0 <= value < 1, "at least 0 and below 1", *rates)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate multiplier: warm-up from 0, constant, then decay to `final_fraction` at the end."""

    warmup_ratio: float = 0.0
    decay_ratio: float = 0.2
    decay: Literal["linear", "cosine"] = "linear"
    final_fraction: float = 0.0

    def __post_init__(self):
        fits = self.warmup_ratio >= 0 and self.decay_ratio >= 0 and self.warmup_ratio + self.decay_ratio <= 1
        check(fits, "schedule.warmup-ratio and schedule.decay-ratio must be 0 or more and sum to at most 1")
        check(0 <= self.final_fraction <= 1, "schedule.final-fraction must lie between 0 and 1")


@dataclass(frozen=True)
class TokenizerConfig:
    """`max_chars` bounds the training text, `backend` trains on it. `path` brings an already trained tokenizer instead:
    a `tokenizer.json`, a folder that has one, or a `.tiktoken` file."""

    vocab_size: int = 32768
    max_chars: int = 2_000_000_000
    path: str | None = None
    backend: Literal["rust", "huggingface"] = "rust"

    def __post_init__(self):
        check(self.max_chars > 0, "tokenizer.max-chars must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """`path` is a folder of the user's (`--data`). Without one, `generate` lets the project make up the text.

    `download` names the data sets of `jaxchat data list` that the folder is to have, pretraining text as NAME:SHARDS;
    what is missing is fetched while training goes on, to `data` without a `path`. Text of the user's own in the folder
    is used instead.

    `packing` is how documents become rows for pretraining: whole ones that fit together, each row beginning with
    `<|bos|>`, or all laid end to end and cut. `mask_borders` is what respects the borders of documents in a row: the
    "loss" (`<|bos|>` is no target), the "attention" (a token sees its own document only), or "both". `on_bad` says what
    becomes of text that is damaged or too long: the run is refused with a line that names it, or it is named, counted
    and left out. `lanes`, for many hosts: the text is dealt out to so many, and each process reads its part alone.

    Conversations are made up too where the user's folder has none; the sizes are those of what is made up.
    """

    path: str | None = None
    download: tuple[str, ...] = ()
    val_shard: str | None = None
    generate: bool = False
    synthetic_documents: int = 40_000
    synthetic_conversations: int = 40_000
    shuffle: bool = False
    packing: Literal["best-fit", "concat"] = "best-fit"
    mask_borders: Literal["none", "loss", "attention", "both"] = "none"
    lanes: int = 1
    on_bad: Literal["refuse", "skip"] = "refuse"

    @property
    def folder(self) -> str | None:
        """Where the data is, or is downloaded to; None where it is made up."""
        return "data" if self.path is None and self.download else self.path


@dataclass(frozen=True)
class TrainConfig:
    """What every stage that trains has: batch, length, rhythm.

    `batch_tokens` is the whole optimizer step's; `device_rows` rows of the model's sequence length go through a device
    at once and the rest is accumulated inside the step.
    """

    batch_tokens: int = 524_288
    device_rows: int = 32
    num_iterations: int | None = None
    lr_fraction: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval_every: int = 250
    sample_every: int = 0
    save_every: int = 1000

    def __post_init__(self):
        check(self.batch_tokens >= 1 and self.device_rows >= 1, "batch-tokens and device-rows must be at least 1")
        check(
            self.num_iterations is None or self.num_iterations >= 1,
            f"num-iterations is {self.num_iterations}; it must be at least 1",
        )
        check(self.lr_fraction > 0, "lr-fraction must be above 0")
        _check_each(self, "", lambda value: value >= 0, "0 or more", "eval_every", "sample_every", "save_every")


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Horizon: `num_iterations` if set, else `target_flops` if set, else `tokens_per_param` tokens a parameter."""

    target_flops: float | None = None
    tokens_per_param: float = 20.0
    eval_tokens: int = 10_485_760
    sample_every: int = 2000

    def __post_init__(self):
        super().__post_init__()
        _check_each(self, "pretrain.", lambda value: value is None or value > 0, "above 0", "target_flops")
        _check_each(self, "pretrain.", lambda value: value > 0, "above 0", "tokens_per_param", "eval_tokens")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Midtraining and SFT. `mixture` names tasks, each `NAME` or `NAME:EXAMPLES`; `epochs` if no iterations."""

    mixture: tuple[str, ...] = ("chat",)
    epochs: float = 1.0
    eval_tokens: int = 1_048_576

    def __post_init__(self):
        super().__post_init__()
        check(len(self.mixture) > 0, "mixture is empty; name at least one task, such as 'chat'")
        check(self.epochs > 0, "epochs must be above 0")
        _check_each(self, "", lambda value: value > 0, "above 0", "eval_tokens")


@dataclass(frozen=True)
class RLConfig(TrainConfig):
    """`reinforce`: on-policy, advantage r - mean(r of the question's samples) on each sampled token.
    `best_of_n`: fine-tuning on each question's best sample. `batch_tokens` is not used: a step is its rollouts."""

    method: Literal["reinforce", "best_of_n"] = "reinforce"
    tasks: tuple[str, ...] = ("gsm8k",)
    questions_per_step: int = 16
    samples_per_question: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = 50
    lr_fraction: float = 0.05
    eval_questions: int = 400
    eval_every: int = 60

    def __post_init__(self):
        super().__post_init__()
        check(self.samples_per_question >= 2, "rl.samples-per-question must be at least 2: a reward needs a rival")
        counts = ("questions_per_step", "max_new_tokens", "eval_questions")
        _check_each(self, "rl.", lambda value: value >= 1, "at least 1", *counts)
        check(self.temperature > 0, "rl.temperature must be above 0: identical samples teach nothing")


@dataclass(frozen=True)
class EvaluateConfig:
    """`tasks` are asked of every finished stage in `of`; `limit` questions a task."""

    tasks: tuple[str, ...] = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")
    of: tuple[str, ...] = ("midtrain", "sft", "rl")
    limit: int | None = None
    batch_rows: int = 64
    max_new_tokens: int = 512

    def __post_init__(self):
        check(self.limit is None or self.limit >= 1, f"evaluate.limit is {self.limit}; it must be at least 1")
        check(
            self.batch_rows >= 1 and self.max_new_tokens >= 1,
            "evaluate.batch-rows and evaluate.max-new-tokens must be at least 1",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a stage stay: the newest `keep`, those of the steps that `keep_every` divides, and the one
    that its evaluation found best (`keep_best`). A stage's result is its last one."""

    keep: int = 2
    keep_every: int | None = None
    keep_best: bool = False

    def __post_init__(self):
        check(self.keep >= 1, f"checkpoints.keep is {self.keep}; it must be at least 1")
        every = self.keep_every
        check(every is None or every >= 1, f"checkpoints.keep-every is {every}; it must be at least 1")


@dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class CostConfig:
    """For the dry run and the report: what a device-hour costs (dollars), and the MFU to expect of it."""

    device: str = "NVIDIA H100"
    devices: int = 1
    dollars_per_device_hour: float = 3.0
    expected_mfu: float = 0.45

    def __post_init__(self):
        _check_each(self, "cost.", lambda value: value >= 1, "at least 1", "devices")
        _check_each(self, "cost.", lambda value: value >= 0, "0 or more", "dollars_per_device_hour")
        _check_each(self, "cost.", lambda value: 0 < value <= 1, "above 0 and at most 1", "expected_mfu")


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs; `stages` in the order in which they run.

    `precision` is what training computes in: "fp8" is bf16 but for the blocks' matrix products, on Hopper and later.

    `remat` is what a training step computes twice to save memory: nothing ("none"), the norms and the MLPs ("mlp",
    a ninth more matrix products), or all of a block but its attention ("full", two ninths); "auto" is the first of them
    whose step fits into the device's memory.

    `on_nan` is what becomes of a training whose loss is no number or spikes: "stop" ends it and names the last good
    checkpoint, "skip" goes on from there without the batches since then.
    """

    name: str = ""
    stages: tuple[str, ...] = STAGES
    seed: int = 42
    precision: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    remat: Literal["auto", "none", "mlp", "full"] = "auto"
    on_nan: Literal["stop", "skip"] = "stop"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    midtrain: FinetuneConfig = field(default_factory=FinetuneConfig)
    sft: FinetuneConfig = field(default_factory=FinetuneConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cost: CostConfig = field(default_factory=CostConfig)

    def __post_init__(self):
        for stage in self.stages:
            check(stage in STAGES, f"unknown stage {stage!r}{closest(stage, STAGES)} Stages: {', '.join(STAGES)}")
        order = [STAGES.index(stage) for stage in self.stages]
        check(order == sorted(set(order)), f"stages must be in order, each once: {', '.join(STAGES)}")
        heads, tensor = self.model.kv_heads, self.mesh.tensor
        check(
            heads % tensor == 0,
            f"mesh.tensor is {tensor}, and shares out attention's heads: it must divide the {heads} of keys and values",
        )
        lanes, rows = self.data.lanes, self.pretrain.batch_tokens // self.model.sequence_len
        fits = lanes >= 1 and rows % lanes == 0
        check(fits, f"data.lanes is {lanes}; it must be at least 1, and divide the {rows} rows of pretraining's batch")
