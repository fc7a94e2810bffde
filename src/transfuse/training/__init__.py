"""Training: one loop, objectives that plug into it, checkpoints, metrics."""

from .checkpoint import Checkpoint, CheckpointFolder, read, verify
from .distillation import DistilConfig, DistillationObjective
from .distributed import RESUMABLE, Distributed, join, place, stopped_code
from .loss import LossSums, Objective, ObjectiveConfig, TokenObjective, TransfusionObjective
from .metrics import read_metrics
from .optimizer import EMA, OptimizerConfig, build_optimizer, learning_rate
from .parallel import ParallelConfig, parallelize
from .trainer import DivergedError, LoopConfig, Trainer

__all__ = [
    "RESUMABLE",
    "Checkpoint",
    "CheckpointFolder",
    "DistilConfig",
    "DistillationObjective",
    "DivergedError",
    "EMA",
    "LoopConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Distributed",
    "LossSums",
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
