"""Muon for the matrices of a transformer's blocks (Keller Jordan, 2024; arXiv 2502.16982), AdamW for all else.

An update is the gradient's momentum, orthogonalised by a few Newton-Schulz steps: its singular values become about 1.
The arithmetic is that of `torch.optim.Muon`, to which the tests compare it. That class cannot be used here, because two
things come between a parameter and the matrices that it holds:

- Stacked matrices (queries, keys and values; gate and up) are orthogonalised apart. The stack has no more singular
  values than one of them, so that together each would get a part of an update, and the one with the largest gradient
  most of it.
- Sharded matrices are gathered, a few at a time, because Newton-Schulz needs all of one. Momentum stays sharded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..model import Transfusion
from .distributed import local, place, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: the steepest at zero that stays within 0.7 to 1.2
EPS = 1e-7
TOGETHER = 1 << 24  # elements of matrices that are gathered and orthogonalised at once


@dataclass(frozen=True)
class MuonConfig:
    """Settings of Muon, by `torch.optim.Muon`'s names. Raises ValueError, naming the field, for values out of range."""

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    """Newton-Schulz steps"""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """how a matrix's shape changes the learning rate. match_rms_adamw: the update is as large as AdamW's, so that one
    learning rate and one weight decay suit both (arXiv 2502.16982); original: Keller Jordan's"""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.muon.momentum: expected a number from 0 to below 1, found {self.momentum}")
        if not 1 <= self.ns_steps < 100:
            raise ValueError(f"optimizer.muon.ns_steps: expected 1 to 99, found {self.ns_steps}")


def block_matrices(model: Transfusion) -> dict[str, tuple[int, ...]]:
    """Return the names of the blocks' matrices, each with the rows of the matrices that are stacked in it."""
    config, matrices = model.config, dict[str, tuple[int, ...]]()
    for name, weight in model.named_parameters():
        if not name.startswith("transformer.blocks.") or not name.endswith(".weight") or weight.ndim != 2:
            continue  # adapters of LoRA among them
        if name.endswith("qkv.weight"):
            matrices[name] = config.heads_dim, *[config.kv_heads * config.head_dim] * 2
        else:
            matrices[name] = (len(weight) // 2,) * 2 if name.endswith("gate_up.weight") else (len(weight),)
    return matrices


def orthogonalised(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return U V^T of each matrix U S V^T of `[N, R, C]`, roughly: singular values are about 0.7 to 1.2.

    Computed in `dtype`, all at once: on a CPU and a GPU, products of small matrices one by one take twice as long.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for `groups`, and `others` for the parameters that it holds; both by one list of groups and one state.

    rows    of each of Muon's parameters the rows of the matrices in it (`block_matrices`)
    dtype   of Newton-Schulz
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        others: torch.optim.Optimizer,
        rows: Mapping[nn.Parameter, tuple[int, ...]],
        config: MuonConfig,
        dtype: torch.dtype,
    ) -> None:
        super().__init__([dict(group) for group in groups], {"lr": others.defaults["lr"]})
        self.rows, self.config, self.dtype, self.others = rows, config, dtype, others
        self.own = list(self.param_groups)
        self.param_groups += others.param_groups
        self.state = others.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.own:
            trained = [weight for weight in group["params"] if weight.grad is not None]
            for weights in _together(trained):
                for weight, update in zip(weights, self._updates(weights), strict=True):
                    local(weight).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        self.others.step()

    def _updates(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Update the momenta, and return this rank's parts of the orthogonalised updates."""
        pieces = [whole(self._direction(weight)).split(self.rows[weight]) for weight in weights]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for piece in chain.from_iterable(pieces):
            by_shape.setdefault(piece.shape, []).append(piece)
        done = {
            shape: iter(orthogonalised(torch.stack(alike), self.config.ns_steps, self.dtype))
            for shape, alike in by_shape.items()
        }
        updates = []
        for weight, parts in zip(weights, pieces, strict=True):
            scaled = []
            for part in parts:
                rows, columns = part.shape
                factor = 0.2 * math.sqrt(max(rows, columns))
                if self.config.adjust_lr_fn == "original":
                    factor = math.sqrt(max(1, rows / columns))
                scaled.append(next(done[part.shape]).to(weight.dtype) * factor)
            update = torch.cat(scaled)
            if isinstance(weight, DTensor):
                shard = torch.empty_like(self.state[weight]["momentum_buffer"])
                place(shard, update)
                update = local(shard)
            updates.append(update)
        return updates

    def _direction(self, weight: nn.Parameter) -> Tensor:
        """Update the momentum of a weight, and return what is to be orthogonalised."""
        gradient, momentum = weight.grad, self.config.momentum
        assert gradient is not None
        if "momentum_buffer" not in self.state[weight]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight, requires_grad=False)
        buffer = self.state[weight]["momentum_buffer"]
        local(buffer).lerp_(local(gradient), 1 - momentum)
        if not self.config.nesterov:
            return buffer
        direction = torch.empty_like(buffer)
        local(direction).copy_(local(gradient).lerp(local(buffer), momentum))
        return direction


def _together(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the weights in order, as many together as have at most `TOGETHER` elements, and at least one."""
    batch: list[nn.Parameter] = []
    for weight in weights:
        if batch and sum(each.numel() for each in [*batch, weight]) > TOGETHER:
            yield batch
            batch = []
        batch.append(weight)
    if batch:
        yield batch
