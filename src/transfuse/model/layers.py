"""The parts every network here is made of. Shapes: N positions, C channels, H heads, D channels per head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input, whatever dtype its weights are kept in.

    Master weights stay float32 while the residual stream is bfloat16: explicit, and cheaper on CPU than autocast.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # No `.to` of the same dtype: quantised weights do not support it.
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dim() == 2:
            return F.linear(x, weight, bias)
        # torch multiplies more dimensions in another way, with other last bits, where the weight needs no gradient.
        return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class PackedLinear(nn.Module):
    """A linear map for CPU inference whose weight is stored in oneDNN's layout: up to three times as fast.

    A plain product converts the weight at every call, or reads it inefficiently. Only oneDNN's operators accept it.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.outputs = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.outputs)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return result


def pack(module: nn.Module) -> None:
    """Prepare a module for CPU inference, in place: pack linear maps where oneDNN can, and fold norms into them.

    A module whose norms feed one linear map each lists the pairs in `normed`. Quantised weights are left alone.
    """
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)):
        return
    for norm, linear in getattr(module, "normed", ()):
        norm_module, reader = module.get_submodule(norm), module.get_submodule(linear)
        if isinstance(norm_module, RMSNorm) and isinstance(reader, Linear) and _plain(reader):
            setattr(module, norm, FoldedNorm(norm_module, reader))
    for name, child in module.named_children():
        if isinstance(child, Linear):
            if _plain(child) and child.weight.device.type == "cpu" and _can_pack(child.weight.dtype):
                setattr(module, name, PackedLinear(child))
        else:
            pack(child)


def _plain(linear: Linear) -> bool:
    """Return True for an ordinary weight, False for a tensor subclass such as a quantised one."""
    return type(linear.weight.data) is Tensor


def _can_pack(dtype: torch.dtype) -> bool:
    """Return True if oneDNN packs weights of this dtype here: bfloat16 needs AVX-512 or newer."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, taken in float32 and rounded once, to the dtype of the input."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or self.weight.requires_grad:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed `[N, C]`, and what its vectors were multiplied by, `[N, 1]` in float32 at least."""
    # Written out: on CPU torch's own rms_norm is made of more, and slower, steps.
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = length.square().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """`_rms_norm`, which keeps its input alone for the backward pass, where autograd would keep float32 products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        scale, wide = scale.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        unit, weighted = x * scale, gradient * weight.to(x.dtype)
        along = (weighted * unit).mean(-1, keepdim=True, dtype=wide).to(x.dtype)
        of_weight = (gradient * unit).flatten(0, -2).sum(0, dtype=wide).to(weight.dtype)
        return torch.addcmul(weighted, unit, along, value=-1).mul_(scale), of_weight, None


class HeadNorm(nn.Module):
    """The weights and biases of one LayerNorm per head; `norm_heads` applies them."""

    def __init__(self, heads: int, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        # Flat, so that weight decay, which is for matrices, passes them by.
        self.weight = nn.Parameter(torch.ones(heads * channels))
        self.bias = nn.Parameter(torch.zeros(heads * channels))


def norm_heads(x: Tensor, *norms: HeadNorm) -> Tensor:
    """Apply LayerNorm to each head of `[N, H, D]`; H is the sum of the norms' heads.

    One call for queries and keys: on CPU two calls and a concatenation cost half as much again.
    """
    weight = torch.cat([norm.weight for norm in norms]).to(x.dtype).view(x.shape[1:])
    bias = torch.cat([norm.bias for norm in norms]).to(x.dtype).view(x.shape[1:])
    return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=norms[0].eps), weight)


class FoldedNorm(nn.Module):
    """An `RMSNorm` for inference, its weight multiplied into the linear map that alone reads it: `x / |x|`, no more."""

    def __init__(self, norm: RMSNorm, linear: Linear) -> None:
        super().__init__()
        channels = norm.weight.shape[0]
        # x / sqrt(|x|^2 / C + eps) = sqrt(C) x / hypot(|x|, sqrt(C eps))
        self.floor = torch.tensor(math.sqrt(channels * norm.eps), dtype=norm.weight.dtype, device=norm.weight.device)
        scale = norm.weight.detach().float() * math.sqrt(channels)
        with torch.no_grad():
            linear.weight.copy_(linear.weight.float() * scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.floor)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, because one large product is faster than two."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(channels, 2 * hidden)
        self.down = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.down(_GatedSiLU.apply(gate_up) if gate_up.requires_grad else _gated_silu(gate_up))


def _gated_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up` of `[gate, up]`; the backward pass computes silu again rather than keep it in memory."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated_silu(gate_up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)], dim=-1)


def rotary_table(positions: Tensor, head_channels: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[N, 1, D]` of the rotary embedding (Su et al. 2021; halves rotated, as in Llama).

    The sines of the first half are negative already, so that rotating takes one product less.
    """
    frequency = theta ** -(
        torch.arange(0, head_channels, 2, device=positions.device, dtype=torch.float32) / head_channels
    )
    angle = positions.to(torch.float32)[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    both = torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
    return both[0][:, None].to(dtype), both[1][:, None].to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding to `[N, H, D]`."""
    cosine, sine = table
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron: `[I] -> [I, C]`.

    The paper names no size; a perceptron as wide as the model is what its Table 7 percentages imply.
    """

    sinusoids = 256

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = Linear(self.sinusoids, channels, bias=True)
        self.outer = Linear(channels, channels, bias=True)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.sinusoids // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
        angle = timesteps[:, None].float() * frequency
        return self.outer(F.silu(self.inner(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))))
