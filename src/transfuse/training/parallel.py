"""Parallelism, compilation and activation checkpointing of a network, apart from the model's own files.

The order matters: tensor parallel, activation checkpointing, compilation, sharding; then storage, weights, optimizer.

Tensor parallel shares every matrix among the ranks of a group, and the positions between matrices:

    norm [N / T, C] -> gather -> qkv, gate_up: a T-th of the heads and of the hidden channels, for all N
                              -> out, down: sums over the ranks, scattered by position -> [N / T, C]

(Megatron, arXiv 1909.08053, for the matrices; arXiv 2205.05198 for the positions of norms and residual stream.) Before
and after the transformer all ranks of a group compute the same.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..devices import on_meta
from ..errors import UserError, install_command
from ..model import ModelConfig, Transfusion
from ..model.costs import Checkpointing
from ..model.layers import Linear, Modulation, Tower
from .distributed import Distributed


class Parts(nn.Module):
    """A stacked matrix split into separate linear maps, outputs concatenated: `[N, C] -> [N, parts * D]`."""

    def __init__(self, stacked: Linear, count: int) -> None:
        super().__init__()
        with on_meta():
            self.parts = nn.ModuleList(Linear(stacked.in_features, stacked.out_features // count) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def check_tensor_parallel(config: ModelConfig, ranks: int) -> None:
    """Raise UserError unless the transformer's matrices divide among `ranks` processes."""
    for fits, expected in (
        (config.n_heads % ranks == 0, f"a divisor of model.n_heads ({config.n_heads})"),
        (config.ffn_dim % ranks == 0, f"a divisor of the hidden channels ({config.ffn_dim})"),
        (config.image_ffn_dim % ranks == 0, f"a divisor of model.image_d_ff ({config.image_ffn_dim})"),
        (config.kv_heads == config.n_heads, "1 with model.n_kv_heads"),
        (not config.qk_norm, "1 with model.qk_norm"),
        (not config.qkv_bias, "1 with model.qkv_bias"),
        (config.timestep != "adaln", "1 with model.timestep adaln"),
        (not config.dropout, "1 with model.dropout"),
    ):
        if not fits:
            raise UserError(f"parallel.tensor: expected {expected}, found {ranks}")


def share_matrices(model: Transfusion, mesh: DeviceMesh) -> None:
    """Shard the transformer's matrices over a one-axis mesh. Raises UserError if they do not divide."""
    check_tensor_parallel(model.config, mesh.size())
    whole, rows = Replicate(), Shard(0)
    gathered = PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(whole,))
    column = ColwiseParallel(input_layouts=whole)
    row = RowwiseParallel(output_layouts=rows, use_local_output=False)
    norm = SequenceParallel(sequence_dim=0)
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
    for tower in [module for module in model.transformer.modules() if isinstance(module, Tower)]:
        own = plan
        if tower.has_attention:
            tower.qkv = Parts(tower.qkv, 3)  # type: ignore[assignment]
        else:
            own = {name: style for name, style in plan.items() if name.startswith("feed_forward")}
        tower.feed_forward.gate_up = Parts(tower.feed_forward.gate_up, 2)  # type: ignore[assignment]
        tower.n_heads, tower.kv_heads = tower.n_heads // mesh.size(), tower.kv_heads // mesh.size()
        parallelize_module(tower, mesh, own)
    parallelize_module(model.transformer, mesh, dict.fromkeys(("norm", "image_norm"), norm))

    def share_positions(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = tree_map(lambda part: DTensor.from_local(part, mesh, [whole], run_check=False), inputs[0])
        return tree_map(lambda part: part.redistribute(placements=[rows]), x), *inputs[1:]

    def gather_positions(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return tree_map(lambda part: part.redistribute(placements=[whole]).to_local(), output)

    # Hooks, because `PrepareModuleInput` does not look into `Towers`.
    model.transformer.register_forward_pre_hook(share_positions)
    model.transformer.register_forward_hook(gather_positions)


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
    """Placement of a run on processes; it changes speed and memory, not results, except for `float8`."""

    replicate: int = 1
    """number of copies of the network, each sharded over its processes (1: FSDP, more: HSDP)"""
    tensor: int = 1
    """number of processes that share every block's matrices and work on the same data (tensor parallel)"""
    activation_checkpointing: Checkpointing = "none"
    """activations recomputed in the backward pass; selective: all but matrix products and attention"""
    compile: bool = False
    """compile each block (torch.compile)"""
    float8: bool = False
    """matrix products of the blocks in 8-bit floating point, the same for the whole run (extra: quantize; NVIDIA Hopper
    or newer)"""

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
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError:
            install = install_command("quantize")
            raise UserError(f"parallel.float8: expected torchao, found none; {install}") from None
        for block in model.transformer.blocks:  # on a CPU the 8-bit products are emulated
            convert_to_float8_training(block, config=Float8LinearConfig(emulate=not torch.cuda.is_available()))
    windowed = model.config.windowed
    for layer, block in enumerate(model.transformer.blocks):
        if config.activation_checkpointing != "none":
            _recompute(block, config.activation_checkpointing)
        if config.compile:
            compile_block(block, windowed.index(windowed[layer]))
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


def compile_block(block: nn.Module, layer: int = 0, **options: Any) -> None:
    """Compile a block so that it shares a graph with all whose attention is like that of `layer`."""
    # torch 2.11 specialises on the layer number, and would compile a graph per block and stop at the eighth.
    block.layer = layer  # type: ignore[assignment]
    block.compile(**options)


def _recompute(block: nn.Module, kind: Checkpointing) -> None:
    """Make a block's backward pass recompute its activations: all, or all but the results of KEPT."""
    forward = block.forward

    def again(x: Any, rotary: Any, attend: Any, dropout: torch.Generator | None, modulation: Modulation | None) -> Any:
        state = None if dropout is None else dropout.get_state()

        def run(x: Any) -> Any:
            if dropout is not None and state is not None:  # the recomputation must drop the same elements
                dropout.set_state(state)
            return forward(x, rotary, attend, dropout, modulation)

        options: dict[str, Any] = {} if kind == "full" else {"context_fn": _selective}
        return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False, **options)

    block.forward = again


def _selective() -> Any:
    # At module level, because torch.compile looks it up by name.
    return create_selective_checkpoint_contexts(KEPT)
