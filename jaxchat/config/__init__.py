"""The settings of an experiment: frozen dataclasses, checked when they are built.

An `Experiment` says everything a run needs. The files in `experiments/` build one each; the command line overrides
single fields (`--pretrain.num-iterations=100`); the run directory keeps the result as `config.json`.

The line under each field is its help on the command line.
"""

from jaxchat.config.data import MIN_VOCAB, NUM_BYTES, DataConfig, TokenizerConfig
from jaxchat.config.experiment import Experiment
from jaxchat.config.model import LARGEST_HEAD, WIDTH_PER_LAYER, MeshConfig, ModelConfig, head_count, model_width
from jaxchat.config.optimizer import OptimizerConfig, ScheduleConfig
from jaxchat.config.phases import PhasesConfig
from jaxchat.config.ranges import (
    STAGES,
    Impossible,
    Range,
    Section,
    checked_path,
    declared,
    declared_range,
    describe,
    shown,
)
from jaxchat.config.run import CheckpointConfig, CostConfig, LoggingConfig
from jaxchat.config.stages import (
    LENGTHS,
    TRAINED,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    RLConfig,
    SupervisedConfig,
    TrainConfig,
)

__all__ = [
    "LARGEST_HEAD", "LENGTHS", "MIN_VOCAB", "NUM_BYTES", "STAGES", "TRAINED", "WIDTH_PER_LAYER", "CheckpointConfig",
    "CostConfig", "DataConfig", "EvaluateConfig", "Experiment", "FinetuneConfig", "Impossible", "LoggingConfig",
    "MeshConfig", "ModelConfig", "OptimizerConfig", "PhasesConfig", "PretrainConfig", "RLConfig", "Range",
    "ScheduleConfig", "Section", "SupervisedConfig", "TokenizerConfig", "TrainConfig", "checked_path", "declared",
    "declared_range", "describe", "head_count", "model_width", "shown",
]  # fmt: skip
