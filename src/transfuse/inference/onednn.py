"""Weights in oneDNN's own layout, for inference on a CPU: up to three times as fast as plain products.

A plain product converts the weight at every call, or reads it inefficiently. Only oneDNN's operators accept the packed
layout, so a packed model is for inference alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..model.layers import Linear, RMSNorm, TiedLinear, TimestepModulation, Tower


class PackedLinear(nn.Module):
    """A linear map whose weight is stored in oneDNN's layout."""

    def __init__(self, linear: Linear | TiedLinear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.outputs)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


class FoldedNorm(nn.Module):
    """An `RMSNorm` whose weight is multiplied into the only linear map that reads it; what remains is `x / |x|`."""

    def __init__(self, norm: RMSNorm, reader: Linear) -> None:
        super().__init__()
        channels = norm.weight.shape[0]
        # x / sqrt(|x|^2 / C + eps) = sqrt(C) x / hypot(|x|, sqrt(C eps))
        self.floor = torch.tensor(math.sqrt(channels * norm.eps), dtype=norm.weight.dtype, device=norm.weight.device)
        scale = norm.weight.detach().float() * math.sqrt(channels)
        with torch.no_grad():
            reader.weight.copy_(reader.weight.float() * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)


def can_pack(dtype: torch.dtype) -> bool:
    """Return True if oneDNN packs weights of this dtype here: bfloat16 needs AVX-512 or newer."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(model: nn.Module) -> None:
    """Prepare a model for inference, in place: fold norms into linear maps, and pack those that are on the CPU.

    Quantised weights, which are tensor subclasses, are left alone. Does nothing where torch has no oneDNN.
    """
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)):
        return

    # Not of modulated blocks, where a shift comes between the norm and the map.
    modulated = any(isinstance(module, TimestepModulation) for module in model.modules())
    towers = [module for module in model.modules() if isinstance(module, Tower) and module.pre_norm]
    for tower in [] if modulated else towers:
        readers = {"feed_forward_norm": tower.feed_forward.gate_up}
        if tower.has_attention:
            readers["attention_norm"] = tower.qkv
        for norm, reader in readers.items():
            if type(reader.weight.data) is Tensor:
                setattr(tower, norm, FoldedNorm(getattr(tower, norm), reader))
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if not isinstance(child, Linear | TiedLinear) or type(child.weight.data) is not Tensor:
                continue
            if child.weight.device.type == "cpu" and can_pack(child.weight.dtype):
                setattr(parent, name, PackedLinear(child))
