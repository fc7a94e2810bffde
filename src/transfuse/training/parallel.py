"""Parallelism, compilation and activation checkpointing of a network, apart from the model's own files.

The order matters: tensor parallel, activation checkpointing, compilation, sharding; then storage, weights, optimizer.

Tensor parallel shares every matrix among the ranks of a group, and the positions between matrices:

    norm [N / T, C] -> gather -> qkv, gate_up: a T-th of the heads and of the hidden channels, for all N
                              -> out, down: sums over the ranks, scattered by position -> [N / T, C]

(Megatron, arXiv 1909.08053, for the matrices; arXiv 2205.05198 for the positions of norms and residual stream.) Before
and after the transformer all ranks of a group compute the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..errors import UserError
from ..model import ModelConfig, Transfusion
from ..model.activations import Checkpointing
from ..model.attention import Attend
from ..model.layers import Block, Linear
from .distributed import Distributed

STACKED = {"qkv": 3, "gate_up": 2}
"""number of matrices stacked in each of these; each rank needs a piece of every one"""


class Parts(nn.Module):
    """A stacked matrix split into separate linear maps, outputs concatenated: `[N, C] -> [N, parts * D]`."""

    def __init__(self, stacked: Linear, count: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.parts = nn.ModuleList(Linear(stacked.in_features, stacked.out_features // count) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def share_matrices(model: Transfusion, mesh: DeviceMesh) -> None:
    """Shard the transformer's matrices over a one-axis mesh. Raises UserError if they do not divide."""
    _check(model.config, mesh.size())
    whole, rows = Replicate(), Shard(0)
    gathered = PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(whole,))
    column = ColwiseParallel(input_layouts=whole)
    row = RowwiseParallel(output_layouts=rows, use_local_output=False)
    norm = SequenceParallel(sequence_dim=0)
    for block in model.transformer.blocks:
        assert isinstance(block, Block)
        block.qkv = Parts(block.qkv, STACKED["qkv"])  # type: ignore[assignment]
        block.feed_forward.gate_up = Parts(block.feed_forward.gate_up, STACKED["gate_up"])  # type: ignore[assignment]
        block.n_heads, block.kv_heads = block.n_heads // mesh.size(), block.kv_heads // mesh.size()
        plan = {
            "attention_norm": norm,
            "qkv": gathered,
            "qkv.parts.*": column,
            "out": row,
            "feed_forward_norm": norm,
            "feed_forward": gathered,
            "feed_forward.gate_up.parts.*": column,
            "feed_forward.down": row,
        }
        parallelize_module(block, mesh, plan)
    parallelize_module(model.transformer, mesh, {"norm": norm})
    inputs = PrepareModuleInput(
        input_layouts=(whole, None, None, None),
        desired_input_layouts=(rows, None, None, None),
    )
    outputs = PrepareModuleOutput(output_layouts=(rows,), desired_output_layouts=(whole,))
    parallelize_module(model, mesh, {"transformer": inputs})
    parallelize_module(model, mesh, {"transformer": outputs})


def _check(config: ModelConfig, ranks: int) -> None:
    def check(ok: bool, expected: str) -> None:
        if not ok:
            raise UserError(f"parallel.tensor: expected {expected}, found {ranks}")

    check(config.n_heads % ranks == 0, f"a divisor of model.n_heads ({config.n_heads})")
    check(config.ffn_dim % ranks == 0, f"a divisor of the hidden channels ({config.ffn_dim})")
    check(config.kv_heads == config.n_heads, "1 with model.n_kv_heads")
    check(not config.qk_norm, "1 with model.qk_norm")
    check(not config.dropout, "1 with model.dropout")


def stacked_name(name: str) -> str:
    """Return the name of a part's weight in an unsplit network; other names are unchanged."""
    head, _, tail = name.partition(".parts.")
    return f"{head}.{tail.split('.', 1)[1]}" if tail else name


def restacked(name: str, tensor: Tensor, saved: list[Tensor]) -> Tensor:
    """Return the values of a tensor of this name from the saved stacked matrix, or from its parts in order."""
    if not tensor.ndim:
        return saved[0]
    stacked = torch.cat(saved)
    if stacked_name(name) == name:
        return stacked
    number = int(name.partition(".parts.")[2].split(".", 1)[0])
    return stacked[number * len(tensor) : (number + 1) * len(tensor)]


def stack(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors under the names of an unsplit network, with parts (unsharded, in order) concatenated."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        parts.setdefault(stacked_name(name), []).append(tensor)
    return {name: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for name, pieces in parts.items()}


# Predictions are views of one tensor, which nothing changes in place.
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
"""operations whose results selective checkpointing keeps, because they are expensive"""


@dataclass(frozen=True)
class ParallelConfig:
    """Placement of a run on processes; it changes speed and memory, not results."""

    replicate: int = 1
    """number of copies of the network, each sharded over its processes (1: FSDP, more: HSDP)"""
    tensor: int = 1
    """number of processes that share every block's matrices and work on the same data (tensor parallel)"""
    activation_checkpointing: Checkpointing = "none"
    """activations recomputed in the backward pass; selective: all but matrix products and attention"""
    compile: bool = False
    """compile each block (torch.compile)"""
    float8: bool = False
    """matrix products of the blocks in 8-bit floating point (extra: quantize; NVIDIA Hopper or newer)"""

    def __post_init__(self) -> None:
        for name in ("replicate", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}: expected at least 1, found {getattr(self, name)}")
        if self.float8 and self.tensor > 1:
            raise ValueError(f"parallel.float8: expected False with parallel.tensor {self.tensor}, found True")


def parallelize(model: Transfusion, ranks: Distributed, config: ParallelConfig) -> Transfusion:
    """Prepare a network on the meta device for these ranks and return it; storage and weights follow.

    Raises UserError if the network cannot be split as configured.
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
        # Layers cast their inputs themselves; gathering weights in that dtype halves the traffic.
        policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
        for module in (*model.transformer.blocks, model):
            sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
            # Losses are already divided by counts of all ranks, so gradients are summed, not averaged.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
    return model


def compile_block(block: nn.Module, **options: Any) -> None:
    """Compile a block so that all blocks of a network share one graph."""
    # torch 2.11 specialises on the layer number, and would compile a graph per block and stop at the eighth.
    block.layer = 0  # type: ignore[assignment]
    block.compile(**options)


def _forget(block: nn.Module, kind: Checkpointing) -> None:
    """Make a block's backward pass recompute its activations: all, or all but the results of KEPT."""
    forward = block.forward

    def again(x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, dropout: torch.Generator | None) -> Tensor:
        state = None if dropout is None else dropout.get_state()

        def run(x: Tensor) -> Tensor:
            if dropout is not None and state is not None:  # the recomputation must drop the same elements
                dropout.set_state(state)
            return forward(x, rotary, attend, dropout)

        if kind == "full":
            return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, context_fn=_selective)

    block.forward = again


def _selective() -> Any:
    # At module level, because torch.compile looks it up by name.
    return create_selective_checkpoint_contexts(KEPT)


def _to_float8(model: Transfusion) -> None:
    """Replace the blocks' linear maps by torchao's, which scale each operand to 8 bits."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("parallel.float8: expected torchao, found none; pip install 'transfuse[quantize]'") from None
    on_cpu = not torch.cuda.is_available()
    for block in model.transformer.blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=on_cpu))


def sum_over_copies(model: nn.Module, last: bool) -> None:
    """Sum gradients over the copies of a sharded network only in the step's last micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def sum_over_ranks(model: nn.Module, ranks: Distributed) -> None:
    """Sum the gradients of an unsharded network over ranks; a sharded one has done so in its backward pass."""
    if ranks.mesh is None or isinstance(model, FSDPModule):
        return
    parameters = list(model.parameters())
    has_grad = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64)
    for parameter, ranks_with in zip(parameters, ranks.sum(has_grad.to(parameters[0].device)).tolist(), strict=True):
        if ranks_with and parameter.grad is None:  # without any gradient, the optimizer skips it
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))


def place(weight: Tensor, values: Tensor) -> None:
    """Copy unsharded values, the same on every rank, into a weight or into this rank's shard of it."""
    if isinstance(weight, DTensor):
        mesh, coordinate = weight.device_mesh, weight.device_mesh.get_coordinate()
        assert coordinate is not None
        for axis in reversed(range(mesh.ndim)):  # tensor parallel splits first, FSDP shards its pieces
            placement = weight.placements[axis]
            if not placement.is_replicate():
                pieces = values.chunk(mesh.size(axis), placement.dim)  # type: ignore[attr-defined]
                at = coordinate[axis]
                values = pieces[at] if at < len(pieces) else values.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    local(weight).copy_(values)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, sharing its storage; an unsharded tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: list[nn.Parameter], largest: float, ranks: Distributed) -> Tensor:
    """Scale gradients to a global norm of at most `largest`. Return the norm before, 0 without gradients."""
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


def _copies(tensor: Tensor, ranks: Distributed) -> int:
    """Return the number of ranks that hold the same shard."""
    if not isinstance(tensor, DTensor):
        return ranks.count
    mesh = tensor.device_mesh
    shards = [mesh.size(axis) for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return ranks.count // math.prod(shards)
