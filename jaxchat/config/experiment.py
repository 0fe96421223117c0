"""An experiment: everything a run needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxchat.config.data import DataConfig, TokenizerConfig
from jaxchat.config.model import MeshConfig, ModelConfig
from jaxchat.config.optimizer import OptimizerConfig
from jaxchat.config.ranges import STAGES, Range, Section, shown
from jaxchat.config.run import CheckpointConfig, CostConfig, LoggingConfig
from jaxchat.config.stages import EvaluateConfig, FinetuneConfig, PretrainConfig, RLConfig
from jaxchat.errors import closest


@dataclass(frozen=True)
class Experiment(Section):
    """Everything a run needs."""

    name: str = ""
    """Name of the experiment, by default its file's; the run lives in runs/NAME unless --run-dir is given."""
    stages: tuple[str, ...] = STAGES
    """Stages to run, in this order."""
    seed: Annotated[int, Range(at_least=0)] = 42
    """Seed of the synthetic corpus, the initial parameters, the order of the data, and sampling."""
    precision: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """What training computes in. auto: bfloat16 on TPUs and on GPUs that have it, float32 elsewhere. fp8: bfloat16, but
    fp8 for the matrix products of the blocks, on NVIDIA Hopper and later."""
    remat: Literal["auto", "none", "mlp", "full"] = "auto"
    """What a step computes twice to save memory: nothing (none), norms and MLPs (mlp, a ninth more matrix products),
    or all of a block but attention (full, two ninths). auto: the first of them whose step fits into memory."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do when the loss becomes NaN or infinite, or spikes and stays up: stop and name the last good checkpoint,
    or return to it and skip the batches since then."""
    sizes: Literal["fixed", "auto"] = "fixed"
    """Where the sizes of pretraining come from. fixed: from this experiment. auto: depth, vocabulary, context, batch
    and steps that are not set follow from the amount of text."""
    rules: Literal["none", "nanochat"] = "none"
    """Where batch, steps, learning rates, and Muon's momentum and weight decay of pretraining come from, as far as they
    are not set. none: from this experiment. nanochat: from the depth, by the rules of nanochat of July 2026, and for
    short trainings by ours."""
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
        super().__post_init__()
        self.check(
            self.name not in (".", "..") and not re.search(r"[/\\\x00-\x1f]", self.name),
            f"name is {shown(self.name)}; it must be a name for a folder, without / and control characters",
        )
        for stage in self.stages:
            hint = closest(stage, STAGES)
            self.check(
                stage in STAGES, f"stages names the unknown stage {shown(stage)}{hint} Stages: {', '.join(STAGES)}"
            )
        order = [STAGES.index(stage) for stage in self.stages]
        self.check(order == sorted(set(order)), f"stages must be in order, each once: {', '.join(STAGES)}")
        self.check(
            self.rules == "none" or self.sizes == "fixed",
            f"rules is {self.rules}, which starts from the depth, and sizes is auto, which finds it; choose one",
        )
        heads, tensor = self.model.kv_heads, self.mesh.tensor
        self.check(
            heads % tensor == 0,
            f"mesh.tensor is {tensor}; it must divide the {heads} heads of keys and values, which it splits",
        )
        lanes, rows = self.data.lanes, self.pretrain.unit_tokens // self.model.sequence_len
        self.check(rows % lanes == 0, f"data.lanes is {lanes}; it must divide the {rows} rows of pretraining's batch")
        self._check_text_fractions()

    def reads_text(self, stage: str) -> bool:
        """Whether `stage` reads the pretraining text."""
        return stage in ("tokenizer", "pretrain") or (
            stage in ("midtrain", "sft") and getattr(self, stage).text_fraction > 0
        )

    def _check_text_fractions(self) -> None:
        """Raises `Impossible` where a step is too small to have both text and conversations in it."""
        lanes = self.data.lanes
        for stage in ("midtrain", "sft"):
            config = getattr(self, stage)
            rows = config.batch_tokens // self.model.sequence_len
            most = max(0, rows - 1) // lanes * lanes
            if config.text_fraction == 0 or 0 < config.text_rows(rows, lanes) <= most:
                continue
            name, value = f"{stage}.text-fraction", f"{config.text_fraction:g}"
            self.check(
                most > 0,
                f"{name} is {value}, but a step has only {rows} rows{f' for {lanes} lanes' if lanes > 1 else ''}; "
                f"raise {stage}.batch-tokens, or set {name} to 0",
            )
            nearest = (lanes if config.text_rows(rows, lanes) == 0 else most) / rows
            self.check(False, f"{name} is {value}, which of the {rows} rows of a step leaves none for "
                       f"{'text' if config.text_rows(rows, lanes) == 0 else 'conversations'}; the nearest that works "
                       f"is {nearest:.4g}")  # fmt: skip
