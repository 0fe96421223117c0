"""The settings of an experiment: frozen dataclasses, checked when they are built.

An `Experiment` says everything a run needs. The files in `experiments/` build one each; the command line overrides
single fields (`--pretrain.num-iterations=100`); the run directory keeps the result as `config.json`.

The line under each field is its help on the command line.
"""

from jaxchat.config.data import NUM_BYTES, DataConfig, TokenizerConfig
from jaxchat.config.experiment import Experiment
from jaxchat.config.model import LARGEST_HEAD, WIDTH_PER_LAYER, MeshConfig, ModelConfig, head_count, model_width
from jaxchat.config.optimizer import OptimizerConfig, ScheduleConfig
from jaxchat.config.run import CheckpointConfig, CostConfig, LoggingConfig
from jaxchat.config.stages import (
    STAGES,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    RLConfig,
    SupervisedConfig,
    TrainConfig,
)

__all__ = [
    "LARGEST_HEAD", "NUM_BYTES", "STAGES", "WIDTH_PER_LAYER", "CheckpointConfig", "CostConfig", "DataConfig",
    "EvaluateConfig", "Experiment", "FinetuneConfig", "LoggingConfig", "MeshConfig", "ModelConfig", "OptimizerConfig",
    "PretrainConfig", "RLConfig", "ScheduleConfig", "SupervisedConfig", "TokenizerConfig", "TrainConfig", "head_count",
    "model_width",
]  # fmt: skip
