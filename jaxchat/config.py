"""The settings of an experiment: frozen dataclasses, checked when they are built.

An `Experiment` says everything a run needs. The files in `experiments/` build one each; the command line overrides
single fields (`--pretrain.num-iterations=100`); the run directory keeps the result as `config.json`.

The line under each field is its help on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxchat.errors import check, closest

STAGES = ("tokenizer", "pretrain", "midtrain", "sft", "rl", "evaluate", "report")
NUM_BYTES = 256
WIDTH_PER_LAYER = 64
LARGEST_HEAD = 128


def _check_each(config: Any, section: str, fits: Callable[[Any], bool], what: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(fits(value), f"{section}{name.replace('_', '-')} is {value}; it must be {what}")


def model_width(depth: int) -> int:
    """The width of the residual stream of a model with `depth` layers."""
    return WIDTH_PER_LAYER * depth


def head_count(depth: int) -> int:
    """The number of query heads of a model with `depth` layers: as few as make none larger than `LARGEST_HEAD`."""
    return -(-model_width(depth) // LARGEST_HEAD)


def _depth_fits(depth: int) -> bool:
    """Whether heads are of equal and even size, as rotary embeddings need."""
    return model_width(depth) % (2 * head_count(depth)) == 0


def _nearest_depths(depth: int) -> str:
    below = next((d for d in range(depth - 1, 0, -1) if _depth_fits(d)), None)
    above = next(d for d in range(depth + 1, depth + 200) if _depth_fits(d))
    return " and ".join(str(d) for d in (below, above) if d)


@dataclass(frozen=True)
class ModelConfig:
    """The GPT; its depth sets all other sizes."""

    depth: int = 12
    """Number of layers. The width is 64 times as much, in heads of at most 128."""
    sequence_len: int = 2048
    """Context: tokens of a training row, and the most that the model can read and write in a conversation."""
    window_pattern: str = "L"
    """How far back each layer sees: S a quarter of the context, L all of it. The letters repeat over the layers, as in
    SSSL; the last layer always sees all of it."""
    num_kv_heads: int | None = None
    """Heads of keys and values, a divisor of the number of query heads. None: as many as query heads."""
    rope_base: float = 10_000.0
    """Base of the rotary position embeddings' wavelengths."""
    logit_cap: float = 15.0
    """Bound c of the logits, which become c * tanh(logits / c)."""

    def __post_init__(self):
        check(self.depth >= 1, f"model.depth is {self.depth}; it must be at least 1")
        check(self.sequence_len >= 2, f"model.sequence-len is {self.sequence_len}; it must be at least 2")
        check(
            _depth_fits(self.depth),
            f"model.depth {self.depth} gives a width of {self.width}, which {self.num_heads} heads cannot share in "
            f"equal and even sizes; nearest depths that work: {_nearest_depths(self.depth)}",
        )
        kv = self.kv_heads
        check(
            kv >= 1 and self.num_heads % kv == 0,
            f"model.num-kv-heads is {kv}; it must divide the {self.num_heads} heads of depth {self.depth}",
        )
        check(
            bool(self.window_pattern) and set(self.window_pattern) <= set("SLsl"),
            f"model.window-pattern is {self.window_pattern!r}; write one letter per layer, S for a quarter of the "
            "context and L for all of it, repeated over the layers: such as SSSL",
        )
        _check_each(self, "model.", lambda value: value > 0, "above 0", "rope_base", "logit_cap")
        object.__setattr__(self, "window_pattern", self.window_pattern.upper())  # one model, one spelling

    @property
    def width(self) -> int:
        return model_width(self.depth)

    @property
    def num_heads(self) -> int:
        return head_count(self.depth)

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


@dataclass(frozen=True)
class MeshConfig:
    """Devices of each kind of parallelism; their product is the number of devices."""

    data: int = -1
    """Data parallelism: devices with whole copies of the model. -1: all devices that the others leave."""
    fsdp: int = 1
    """Fully sharded data parallelism: devices among which parameters and optimizer state are split."""
    tensor: int = 1
    """Tensor parallelism: devices among which each layer's heads and MLP are split."""

    def __post_init__(self):
        check(self.fsdp >= 1 and self.tensor >= 1, "mesh.fsdp and mesh.tensor must be at least 1")
        check(self.data == -1 or self.data >= 1, "mesh.data must be at least 1, or -1 for all devices left")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the matrices of the blocks, AdamW for embedding and head."""

    matrix_lr: float = 0.02
    """Muon's learning rate."""
    embedding_lr: float = 0.2
    """AdamW's learning rate of the embedding at a width of 768; others scale by (width / 768)^-1/2."""
    head_lr: float = 0.004
    """AdamW's learning rate of the head at a width of 768; others scale by (width / 768)^-1/2."""
    weight_decay: float = 0.0
    """AdamW's weight decay for embedding and head; Muon has none."""
    adam_b1: float = 0.8
    """AdamW's decay rate of the gradient's mean."""
    adam_b2: float = 0.95
    """AdamW's decay rate of the gradient's mean square."""
    adam_eps: float = 1e-10
    """AdamW's epsilon, added to the root of the mean square."""
    muon_momentum: float = 0.95
    """Muon's Nesterov momentum after its warm-up."""
    muon_momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    muon_momentum_steps: int = 300
    """Steps over which Muon's momentum rises linearly from the start to its final value."""
    newton_schulz_steps: int = 5
    """Iterations that orthogonalise Muon's update."""
    newton_schulz_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """Coefficients a b c of an iteration, X <- a X + b (X X^T) X + c (X X^T)^2 X."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; a larger one is scaled down to it."""

    def __post_init__(self):
        for name in ("matrix_lr", "embedding_lr", "head_lr", "newton_schulz_steps", "clip_norm"):
            check(getattr(self, name) > 0, f"optimizer.{name.replace('_', '-')} must be above 0")
        rates = ("adam_b1", "adam_b2", "muon_momentum", "muon_momentum_start")
        _check_each(self, "optimizer.", lambda value: 0 <= value < 1, "at least 0 and below 1", *rates)


@dataclass(frozen=True)
class ScheduleConfig:
    """The stage's learning-rate schedule: warm-up from 0, constant, decay."""

    warmup_ratio: float = 0.0
    """Fraction of the steps in which the learning rate rises linearly from 0."""
    decay_ratio: float = 0.2
    """Fraction of the steps, the last ones, in which the learning rate falls."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay."""
    final_fraction: float = 0.0
    """Learning rate at the end of the decay, as a fraction of the highest."""

    def __post_init__(self):
        fits = self.warmup_ratio >= 0 and self.decay_ratio >= 0 and self.warmup_ratio + self.decay_ratio <= 1
        check(fits, "schedule.warmup-ratio and schedule.decay-ratio must be 0 or more and sum to at most 1")
        check(0 <= self.final_fraction <= 1, "schedule.final-fraction must be between 0 and 1")


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the experiment's text, or brought by the user."""

    vocab_size: int = 32768
    """Number of tokens, with the 256 bytes and the special tokens."""
    max_chars: int = 2_000_000_000
    """Characters of text to train on, at most."""
    path: str | None = None
    """A trained tokenizer to use instead: a tokenizer.json, a folder with one, or a .tiktoken file. None: train one."""
    backend: Literal["rust", "huggingface"] = "rust"
    """Library that trains the tokenizer: jaxchat's own in Rust, or Hugging Face's tokenizers."""

    def __post_init__(self):
        check(self.max_chars > 0, "tokenizer.max-chars must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Text and conversations: the user's folder, downloads, or a synthetic corpus."""

    path: str | None = None
    """Folder with the user's data, the same as --data. None: data/ with downloads, else the synthetic corpus."""
    download: tuple[str, ...] = ()
    """Data sets of "jaxchat data list" to download during training, pretraining text as NAME:SHARDS. Text of your own
    in the data folder takes their place."""
    val_shard: str | None = None
    """Name of the text file that is kept for validation. None: the one that the manifest names, else the last."""
    generate: bool = False
    """Whether to generate a synthetic corpus where there is no data folder."""
    synthetic_documents: int = 40_000
    """Documents of the synthetic corpus."""
    synthetic_conversations: int = 40_000
    """Conversations of the synthetic corpus; used with a data folder without conversations too."""
    shuffle: bool = False
    """Whether each epoch takes the blocks of the text in another order."""
    packing: Literal["best-fit", "concat"] = "best-fit"
    """How documents fill the rows of pretraining: each row begins with a document and holds whole ones that fit
    (best-fit), or documents are laid end to end and cut (concat)."""
    mask_borders: Literal["none", "loss", "attention", "both"] = "none"
    """What stops at the border of two documents in a row: the loss does not predict the next document's beginning,
    attention does not see other documents, or both."""
    lanes: int = 1
    """Parts of the text that are read independently, for training on many hosts: each process reads only its lanes.
    Divides the rows of pretraining's batch."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """What damaged or too long text does: stop the run (refuse), or be reported, counted and left out (skip)."""

    @property
    def folder(self) -> str | None:
        """Where the data is, or is downloaded to; None where it is generated."""
        return "data" if self.path is None and self.download else self.path


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
        _check_each(self, "", lambda value: value >= 1, "at least 1", "device_rows")
        _check_each(self, "", lambda value: value is None or value >= 1, "at least 1", "num_iterations")
        check(self.lr_fraction > 0, "lr-fraction must be above 0")
        _check_each(self, "", lambda value: value >= 0, "0 or more", "eval_every", "sample_every", "save_every")


@dataclass(frozen=True)
class SupervisedConfig(TrainConfig):
    """Training on given tokens: pretraining, midtraining and SFT."""

    batch_tokens: int = 524_288
    """Tokens of an optimizer step, on all devices together."""

    def __post_init__(self):
        super().__post_init__()
        _check_each(self, "", lambda value: value >= 1, "at least 1", "batch_tokens")


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
        _check_each(self, "pretrain.", lambda value: value is None or value > 0, "above 0", "target_flops")
        _check_each(self, "pretrain.", lambda value: value > 0, "above 0", "tokens_per_param", "eval_tokens")


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
        _check_each(self, "", lambda value: value > 0, "above 0", "eval_tokens")


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
        _check_each(self, "rl.", lambda value: value >= 1, "at least 1", *counts)
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


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a stage are kept; a stage's result is its last one."""

    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Keep also the checkpoints of steps that this number divides. None: no others."""
    keep_best: bool = False
    """Whether to keep also the checkpoint with the best evaluation."""

    def __post_init__(self):
        check(self.keep >= 1, f"checkpoints.keep is {self.keep}; it must be at least 1")
        every = self.keep_every
        check(every is None or every >= 1, f"checkpoints.keep-every is {every}; it must be at least 1")


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics are written besides the run's metrics.jsonl."""

    tensorboard: bool = False
    """Whether to write them for TensorBoard too."""
    wandb: bool = False
    """Whether to send them to Weights & Biases too."""


@dataclass(frozen=True)
class CostConfig:
    """What the dry run and the report expect of the hardware, and what it costs."""

    device: str = "NVIDIA H100"
    """Kind of device, as JAX names it."""
    devices: int = 1
    """Number of devices."""
    dollars_per_device_hour: float = 3.0
    """Price of a device for an hour, in dollars."""
    expected_mfu: float = 0.45
    """Fraction of the devices' peak FLOP/s that training is expected to use."""

    def __post_init__(self):
        _check_each(self, "cost.", lambda value: value >= 1, "at least 1", "devices")
        _check_each(self, "cost.", lambda value: value >= 0, "0 or more", "dollars_per_device_hour")
        _check_each(self, "cost.", lambda value: 0 < value <= 1, "above 0 and at most 1", "expected_mfu")

    def hours(self, flops: float, peak: float) -> float:
        """Hours for `flops` on the devices, of `peak` FLOP/s each, at the expected MFU."""
        return flops / (self.expected_mfu * self.devices * peak) / 3600

    def dollars(self, hours: float, devices: int | None = None) -> float:
        """The price of so many hours of `devices`, by default those of this config."""
        return hours * (self.devices if devices is None else devices) * self.dollars_per_device_hour


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs."""

    name: str = ""
    """Name of the experiment, by default its file's; the run lives in runs/NAME unless --run-dir is given."""
    stages: tuple[str, ...] = STAGES
    """Stages to run, in this order."""
    seed: int = 42
    """Seed of the synthetic corpus, the initial parameters, the order of the data, and sampling."""
    precision: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """What training computes in. auto: bfloat16 on GPU and TPU, float32 on CPU. fp8: bfloat16, but fp8 for the matrix
    products of the blocks, on NVIDIA Hopper and later."""
    remat: Literal["auto", "none", "mlp", "full"] = "auto"
    """What a step computes twice to save memory: nothing (none), norms and MLPs (mlp, a ninth more matrix products),
    or all of a block but attention (full, two ninths). auto: the first of them whose step fits into memory."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when the loss becomes NaN or infinite, or spikes: stop and name the last good checkpoint, or return to
    it and skip the batches since then."""
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
            f"mesh.tensor is {tensor}; it must divide the {heads} heads of keys and values, which it splits",
        )
        lanes, rows = self.data.lanes, self.pretrain.batch_tokens // self.model.sequence_len
        fits = lanes >= 1 and rows % lanes == 0
        check(fits, f"data.lanes is {lanes}; it must be at least 1, and divide the {rows} rows of pretraining's batch")
