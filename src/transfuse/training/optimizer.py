"""AdamW with its schedule, groups and clipping (Transfusion section 4.1), and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .distributed import Distributed, local


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW; the defaults are the paper's. Raises ValueError, naming the field, for values out of range."""

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

    def __post_init__(self) -> None:
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
    model: nn.Module, config: OptimizerConfig, betas: Mapping[str, tuple[float, float]] | None = None
) -> torch.optim.AdamW:
    """Return fused AdamW over the model's parameters; `betas` overrides the config's by name of a child module."""
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            own = (betas or {}).get(name.split(".")[0], config.betas)
            # Tensors sharded over different axes cannot be updated in one call.
            key = decay, own, getattr(parameter, "device_mesh", None)
            groups.setdefault(key, {"params": [], "weight_decay": decay, "betas": own})["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config.learning_rate, eps=config.eps, fused=True)


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
    """An exponential moving average of every parameter, the weights that are exported and sampled from.

    The decay is `min(decay, (1 + step) / (10 + step))`. In a sharded network each rank averages its shards.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Include the weights after step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(model.named_parameters())
        averages = [local(weight) for weight in self.weights.values()]
        torch._foreach_lerp_(averages, [local(current[name].detach()) for name in self.weights], 1 - decay)
