"""Training: one loop, objectives that plug into it, checkpoints, metrics."""

from .checkpoint import Checkpoint, CheckpointFolder, verify
from .ema import EMA
from .loop import DivergedError, LoopConfig, Trainer
from .metrics import read_metrics
from .objective import Objective, ObjectiveConfig, Sums, TokenObjective, TransfusionObjective
from .optimizer import OptimizerConfig, build_optimizer, learning_rate
from .signals import RESUMABLE

__all__ = [
    "RESUMABLE",
    "Checkpoint",
    "CheckpointFolder",
    "DivergedError",
    "EMA",
    "LoopConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Sums",
    "Trainer",
    "TokenObjective",
    "TransfusionObjective",
    "build_optimizer",
    "learning_rate",
    "read_metrics",
    "verify",
]
