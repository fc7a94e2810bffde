"""The update of a step: whether its losses allow one, AdamW or Muon with its schedule, groups and clipping
(Transfusion section 4.1), and the moving average of the weights.

Every step is judged before the optimizer changes a weight, by the losses and gradient norm of all ranks, so all ranks
reach the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..model import Transfusion
from .distributed import Distributed, local, place, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: the steepest at zero that stays within 0.7 to 1.2
EPS = 1e-7  # least norm that Newton-Schulz divides by
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

    Muon (Keller Jordan, 2024; arXiv 2502.16982) updates by the gradient's momentum, orthogonalised by a few
    Newton-Schulz steps: its singular values become about 1. The arithmetic is that of `torch.optim.Muon`, to which the
    tests compare it. That class cannot be used here, because two things come between a parameter and its matrices:

    - Stacked matrices (queries, keys and values; gate and up) are orthogonalised apart. The stack has no more singular
      values than one of them, so that together each would get a part of an update, and the one with the largest
      gradient most of it.
    - Sharded matrices are gathered, a few at a time, because Newton-Schulz needs all of one. Momentum stays sharded.

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
