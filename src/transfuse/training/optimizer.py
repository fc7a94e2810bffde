"""The update of a step: whether its losses allow one, AdamW or Muon with its schedule, groups and clipping
(Transfusion section 4.1), and the moving average of the weights.

Every step is judged before the optimizer changes a weight, by the losses and gradient norm of all ranks, so all ranks
reach the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..model import Transfusion
from .distributed import Distributed, local
from .muon import Muon, MuonConfig, block_matrices


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW, the paper's by default, and of Muon. Raises ValueError, naming the field, if out of range."""

    learning_rate: float = 3e-4
    final_learning_rate: float = 1.5e-5
    warmup: int = 4000
    """steps of linear warm-up"""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """weight decay of matrices; norms and biases have none"""
    clip: float = 1.0
    """largest global norm of the gradient"""
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the transformer's blocks, AdamW for embeddings, heads, norms and patch layers"""
    muon: MuonConfig = field(default_factory=MuonConfig)

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name: expected adamw or muon, found {self.name}")
        for name in ("clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("learning_rate", "final_learning_rate", "warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}: expected at least 0, found {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: expected numbers from 0 to below 1, found {self.betas}")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0) of `steps`: linear warm-up, then cosine decay to the final rate."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    betas: Mapping[str, tuple[float, float]] | None = None,
    rate_of: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """Return fused AdamW over the trained parameters, or Muon over the blocks' matrices and AdamW over the rest.

    betas     override the config's by name of a child module
    rate_of   the factor of the learning rate of a parameter, kept as `rate` of its group

    Raises UserError for Muon without blocks.
    """
    matrices: dict[str, tuple[int, ...]] = {}
    if config.name == "muon":
        if not isinstance(model, Transfusion):
            raise UserError("optimizer.name: expected adamw for a network without a transformer's blocks, found muon")
        matrices = block_matrices(model)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            own = (betas or {}).get(name.split(".")[0], config.betas)
            rate = rate_of(name)
            # Tensors sharded over different axes cannot be updated in one call.
            key = name in matrices, decay, own, rate, getattr(parameter, "device_mesh", None)
            group = groups.setdefault(key, {"params": [], "weight_decay": decay, "betas": own, "rate": rate})
            group["params"].append(parameter)
    by_adamw = [group for (is_matrix, *_), group in groups.items() if not is_matrix]
    adamw = torch.optim.AdamW(by_adamw, lr=config.learning_rate, eps=config.eps, fused=True)
    by_muon = [group for (is_matrix, *_), group in groups.items() if is_matrix]
    if not by_muon:
        return adamw
    assert isinstance(model, Transfusion)
    rows = {weight: matrices[name] for name, weight in model.named_parameters() if name in matrices}
    return Muon(by_muon, adamw, rows, config.muon, model.compute_dtype)


def clip_gradients(parameters: list[nn.Parameter], largest: float, ranks: Distributed) -> Tensor:
    """Scale gradients to a global norm of at most `largest`. Return the norm before, 0 without gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    if ranks.mesh is None:
        norm = torch.linalg.vector_norm(norms)
    else:  # each rank adds its shards, divided by the number of ranks that hold the same shard
        shards = [
            math.prod(g.device_mesh.size(axis) for axis, place in enumerate(g.placements) if not place.is_replicate())
            if isinstance(g, DTensor)
            else 1
            for g in gradients
        ]
        copies = torch.tensor([ranks.count // count for count in shards], device=norms.device)
        norm = ranks.sum_all((norms.square() / copies).sum()).sqrt()
    torch._foreach_mul_([local(gradient) for gradient in gradients], (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


class EMA:
    """An exponential moving average of every trained parameter, the weights that are exported and sampled from.

    The decay is `min(decay, (1 + step) / (10 + step))`. In a sharded network each rank averages its shards.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Include the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(model.named_parameters())
        averages = [local(weight) for weight in self.weights.values()]
        torch._foreach_lerp_(averages, [local(current[name].detach()) for name in self.weights], 1 - decay)


@dataclass(frozen=True)
class GuardConfig:
    """Actions for bad steps. Raises ValueError, naming the field, for values out of range.

    raise     stop before any weight changes
    skip      leave the step's update out
    rollback  return to the newest checkpoint and continue with the data after the step's
    """

    nonfinite: Literal["raise", "skip", "rollback"] = "raise"
    """action if a loss or the gradient is not finite"""
    spike: Literal["log", "skip", "rollback"] = "log"
    """action if a loss is far above its recent values; log: only count it in the metrics"""
    sigmas: float = 6.0
    """a spike is this many standard deviations above the mean of the last `window` steps"""
    window: int = 128
    """number of recent steps to compare with; with fewer, no step is a spike"""
    most: int = 10
    """most steps left out within `window` steps; one more stops the run"""

    def __post_init__(self) -> None:
        for name, least in (("sigmas", 0), ("window", 2), ("most", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loop.guard.{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass(frozen=True)
class Verdict:
    """A bad step: its kind, a one-line reason, and the action to take."""

    kind: Literal["nonfinite", "spike"]
    reason: str
    action: Literal["raise", "log", "skip", "rollback"]


class Guard:
    """Judges each step by its mean losses, compared with those of recent steps."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.losses: dict[str, deque[float]] = {}
        self.left_out: list[int] = []

    def judge(self, step: int, losses: dict[str, float], norm: float) -> Verdict | None:
        """Return the verdict on a bad step, None for a good one. `losses` holds only terms with targets.

        The action is "raise" if more steps than the configuration allows were left out.
        """
        wrong = [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]
        verdict = None
        if wrong or not math.isfinite(norm):
            reason = f"expected finite numbers, found {', '.join([*wrong, f'gradient norm {norm}'])}"
            verdict = Verdict("nonfinite", reason, self.config.nonfinite)
        else:
            jumps = [jump for name, value in losses.items() if (jump := self._jump(name, value))]
            if jumps:
                verdict = Verdict("spike", jumps[0], self.config.spike)
        if verdict is not None and verdict.action in ("skip", "rollback"):
            recent = [earlier for earlier in self.left_out if step - earlier < self.config.window]
            self.left_out = [*recent, step]
            if len(self.left_out) > self.config.most:
                reason = f"{verdict.reason}; step number {len(self.left_out)} to be left out, more than loop.guard.most"
                verdict = Verdict(verdict.kind, f"{reason} allows", "raise")
        if verdict is None or (verdict.kind == "spike" and verdict.action == "log"):
            for name, value in losses.items():
                self.losses.setdefault(name, deque(maxlen=self.config.window)).append(value)
        return verdict

    def _jump(self, name: str, value: float) -> str:
        """Return the reason if a loss is far above its recent values, else an empty string."""
        last = self.losses.get(name, ())
        if len(last) < self.config.window:
            return ""
        mean = math.fsum(last) / len(last)
        # The floor keeps rounding in (nearly) constant losses from counting as a jump.
        least = max(self.config.sigmas * float(np.std(last)), 1e-6 * abs(mean))
        if value <= mean + least:
            return ""
        return f"{name} {value:.4g} is more than {self.config.sigmas:g} deviations above {mean:.4g}"

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain numbers."""
        return {"losses": {name: list(values) for name, values in self.losses.items()}, "left_out": [*self.left_out]}

    def restore(self, state: dict[str, Any]) -> None:
        """Load a checkpoint's state, but keep newer `left_out` steps, so that repeated rollbacks end the run."""
        self.losses = {name: deque(values, maxlen=self.config.window) for name, values in state["losses"].items()}
        self.left_out = self.left_out or list(state["left_out"])
