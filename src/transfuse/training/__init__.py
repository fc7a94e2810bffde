"""Training: one loop, objectives that plug into it, checkpoints, metrics."""

from .checkpoint import Checkpoint, CheckpointFolder, read, verify
from .ema import EMA
from .loop import DivergedError, LoopConfig, Trainer
from .metrics import read_metrics
from .objective import Objective, ObjectiveConfig, Sums, TokenObjective, TransfusionObjective
from .optimizer import OptimizerConfig, build_optimizer, learning_rate
from .parallel import ParallelConfig, parallelize, place
from .ranks import Ranks, join, stopped_code
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
    "ParallelConfig",
    "Ranks",
    "Sums",
    "Trainer",
    "TokenObjective",
    "TransfusionObjective",
    "build_optimizer",
    "join",
    "learning_rate",
    "parallelize",
    "place",
    "read",
    "read_metrics",
    "stopped_code",
    "verify",
]
