"""Tensor parallel for the trunk: the ranks of a group share every matrix, and between matrices the positions.

    norm [N / T, C] -> gather -> qkv, gate_up: a T-th of the heads, of the hidden channels, for all N
                              -> out, down: sums over the ranks, scattered by position -> [N / T, C]

(Shoeybi et al. 2019 for the matrices, Korthikanti et al. 2022 for the positions of norms and residual stream.) What is
before and behind the trunk, all ranks of a group compute alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..errors import UserError
from ..model import ModelConfig, Transfusion
from ..model.layers import Linear
from ..model.transformer import Block

STACKED = {"qkv": 3, "gate_up": 2}
"""matrices that are several, one above the other: each rank needs a piece of every one of them"""


class Parts(nn.Module):
    """A stacked matrix as the linear maps it is made of, outputs side by side: `[N, C] -> [N, parts * D]`."""

    def __init__(self, stacked: Linear, count: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.parts = nn.ModuleList(Linear(stacked.in_features, stacked.out_features // count) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def share_matrices(model: Transfusion, mesh: DeviceMesh) -> None:
    """Cut the trunk's matrices over a mesh of one axis. Raises UserError where the network can not be cut so."""
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
    """The name a part's weight has where the matrix is not cut; others are their own."""
    head, _, tail = name.partition(".parts.")
    return f"{head}.{tail.split('.', 1)[1]}" if tail else name


def restacked(name: str, tensor: Tensor, found: list[Tensor]) -> Tensor:
    """What belongs in a tensor of this name, from the stacked matrix, or from its parts in order."""
    if not tensor.ndim:
        return found[0]
    whole = torch.cat(found)
    if stacked_name(name) == name:
        return whole
    number = int(name.partition(".parts.")[2].split(".", 1)[0])
    return whole[number * len(tensor) : (number + 1) * len(tensor)]


def stack(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """By the names of a network that is not cut: parts, which must be whole and in order, put together again."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        found.setdefault(stacked_name(name), []).append(tensor)
    return {name: those[0] if len(those) == 1 else torch.cat(those) for name, those in found.items()}
