"""How a network is spread over processes, compiled and made to remember less: none of it in the model's own files.

The order matters: tensor parallel, activation checkpointing, compilation, sharding; then storage, weights, optimizer.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..errors import UserError
from ..model import Transfusion
from ..model.activations import Checkpointing
from ..model.attention import Attend
from .ranks import Ranks
from .tensor_parallel import share_matrices

# Predictions are views of one tensor, and nothing changes them in place.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
]
"""what selective checkpointing keeps: the dear ones"""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes. It changes how fast a run is and what fits, not what is learned."""

    replicate: int = 1
    """copies of the network; each is sharded over the processes that make up one (1: FSDP, more: HSDP)"""
    tensor: int = 1
    """processes that share every block's matrices, and the data (tensor parallel)"""
    activation_checkpointing: Checkpointing = "none"
    """what the backward pass computes again rather than remember; selective: all but products and attention"""
    compile: bool = False
    """compile each block (torch.compile)"""
    float8: bool = False
    """products of the blocks in 8-bit floating point (extra: quantize; NVIDIA Hopper or newer)"""

    def __post_init__(self) -> None:
        for name in ("replicate", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, found {getattr(self, name)}")
        if self.float8 and self.tensor > 1:
            raise ValueError(f"parallel.float8: expected False with parallel.tensor {self.tensor}, found True")


def parallelize(model: Transfusion, ranks: Ranks, config: ParallelConfig) -> Transfusion:
    """Make a network on the meta device ready for these ranks. Returns it; storage and weights come afterwards.

    Raises UserError where the network can not be spread so.
    """
    if ranks.mesh is not None and config.tensor > 1:
        share_matrices(model, ranks.mesh["tensor"])
    if config.float8:
        _to_float8(model)
    for block in model.transformer.blocks:
        if config.activation_checkpointing != "none":
            _forget(block, config.activation_checkpointing)
        if config.compile:
            compile_block(block)
    if ranks.mesh is not None:
        mesh = ranks.mesh["replicate", "shard"] if config.replicate > 1 else ranks.mesh["shard"]
        # The layers say themselves in which dtype they compute; gathered in it, half as much is sent.
        policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
        for module in (*model.transformer.blocks, model):
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            # Losses are divided by counts of all ranks already: gradients are summed, not averaged.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
    return model


def compile_block(block: nn.Module, **options: Any) -> None:
    """One graph for all blocks of a network: each says it is the first. Where torch looks at the number (2.11 does),
    it would compile a graph for every block, and give up at the eighth; in training nothing needs it."""
    block.layer = 0  # type: ignore[assignment]
    block.compile(**options)


def _forget(block: nn.Module, kind: Checkpointing) -> None:
    """Have a block's backward pass compute again what it needs: all, or all but the results of KEPT."""
    forward = block.forward

    def again(x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, dropout: torch.Generator | None) -> Tensor:
        state = None if dropout is None else dropout.get_state()

        def run(x: Tensor) -> Tensor:
            if dropout is not None and state is not None:  # the second time, what is dropped must be the same
                dropout.set_state(state)
            return forward(x, rotary, attend, dropout)

        if kind == "full":
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=_selective)

    block.forward = again


def _selective() -> Any:
    # A function of the module, for torch.compile looks it up by name.
    return create_selective_checkpoint_contexts(KEPT)


def _to_float8(model: Transfusion) -> None:
    """The blocks' linear maps by torchao's, which scale each operand to 8 bits on the way."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("parallel.float8: expected torchao, found none; pip install 'transfuse[quantize]'") from None
    on_cpu = not torch.cuda.is_available()
    for block in model.transformer.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=on_cpu))


def sum_over_copies(model: nn.Module, last: bool) -> None:
    """Copies of a sharded network add their gradients up in the step's last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def sum_over_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Add the gradients of a network up that every rank has the whole of; sharded ones have done so already."""
    if ranks.mesh is None or isinstance(model, FSDPModule):
        return
    parameters = list(model.parameters())
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64)
    for parameter, ranks_with in zip(parameters, ranks.sum(there.to(parameters[0].device)).tolist(), strict=True):
        if ranks_with and parameter.grad is None:  # where no rank has one, the optimizer passes it by
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, found in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(found.view(gradient.shape))


def place(weight: Tensor, values: Tensor) -> None:
    """Put values, whole and the same on every rank, into a weight, or this rank's shard of them into its own."""
    if isinstance(weight, DTensor):
        mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis in reversed(range(mesh.ndim)):  # tensor parallel cuts first, sharding cuts its pieces
            placement = weight.placements[axis]
            if not placement.is_replicate():
                pieces = values.chunk(mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
                at = coordinate[axis]
                values = pieces[at] if at < len(pieces) else values.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    local(weight).copy_(values)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, sharing its storage; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All shards put together, on every rank; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: list[nn.Parameter], largest: float, ranks: Ranks) -> Tensor:
    """Scale gradients so that their global norm is at most `largest`. Returns the norm before, on all ranks.

    Without any gradient, which then no rank has, it is 0.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
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
    shards = [mesh.size(axis) for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return ranks.count // math.prod(shards)
