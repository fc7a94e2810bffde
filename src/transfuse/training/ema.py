"""An exponential moving average of the weights: what is exported and sampled from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parallel import local


class EMA:
    """Averages every parameter; early on it follows faster, as `min(decay, (1 + step) / (10 + step))`.

    Of a sharded network each rank averages its own shards.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        current = dict(model.named_parameters())
        averages = [local(weight) for weight in self.weights.values()]
        torch._foreach_lerp_(averages, [local(current[name].detach()) for name in self.weights], 1 - decay)
