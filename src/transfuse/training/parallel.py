"""How a network is spread over processes, compiled and made to remember less: none of it in the model's own files.

The order matters: tensor parallel, activation checkpointing, compilation, sharding; then storage, weights, optimizer.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model import Transfusion
from .ranks import Ranks

# Predictions are views of one tensor, and nothing changes them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. It changes how fast a run is and what fits, not what is learned."""

    replicate: int = 1
    """copies of the network; each is sharded over the processes that make up one (1: FSDP, more: HSDP)"""
    tensor: int = 1
    """processes that share every block's matrices, and the data (tensor parallel)"""
    activation_checkpointing: ActivationCheckpointing = "none"
    """what the backward pass computes again rather than remember; selective: all but products and attention"""
    compile: bool = False
    """compile each block (torch.compile)"""
    float8: bool = False
    """products of the blocks in 8-bit floating point (extra: torchao; NVIDIA Hopper or newer)"""

    def __post_init__(self) -> None:
        for name in ("replicate", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, found {getattr(self, name)}")


def parallelize(model: Transfusion, ranks: Ranks, config: ParallelConfig) -> Transfusion:
    """Make a network on the meta device ready for these ranks. Returns it; storage and weights come afterwards."""
    if ranks.mesh is not None:
        mesh = ranks.mesh["replicate", "shard"] if config.replicate > 1 else ranks.mesh["shard"]
        # The layers say themselves in which dtype they compute; gathered in it, half as much is sent.
        policy = MixedPrecisionPolicy(model.compute, torch.float32, cast_forward_inputs=False)
        for block in model.trunk.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Losses are divided by counts of all ranks already: gradients are summed, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    return model


def sum_over_copies(model: nn.Module, last: bool) -> None:
    """Copies of a sharded network add their gradients up in the step's last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def place(weight: Tensor, values: Tensor) -> None:
    """Put values, whole and the same on every rank, into a weight, or this rank's shard into its shard of it."""
    if isinstance(weight, DTensor):
        values = distribute_tensor(
            values.to(weight.device, weight.dtype), weight.device_mesh, weight.placements, src_data_rank=None
        )
    weight.copy_(values)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its storage; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All shards put together, on every rank; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: list[nn.Parameter], largest: float, ranks: Ranks) -> Tensor:
    """Scale gradients so that their global norm is at most `largest`. Returns the norm before, on all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    if ranks.mesh is None:
        norm = torch.linalg.vector_norm(norms)
    else:
        copies = torch.tensor([_copies(gradient, ranks) for gradient in gradients], device=norms.device)
        norm = ranks.sum_all((norms.square() / copies).sum()).sqrt()
    torch._foreach_mul_([local(gradient) for gradient in gradients], (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _copies(tensor: Tensor, ranks: Ranks) -> int:
    """How many ranks hold the same shard."""
    if not isinstance(tensor, DTensor):
        return ranks.count
    mesh = tensor.device_mesh
    shards = [mesh.size(axis) for axis, placement in enumerate(tensor.placements) if placement.is_shard()]
    return ranks.count // int(torch.tensor(shards).prod())
