"""Ways to make a loaded model faster, in place: weights packed for oneDNN or kept in eight bits, and compiled blocks.

A plain product on a CPU converts the weight at every call, or reads it inefficiently. In oneDNN's own layout it is up
to three times as fast, but only oneDNN's operators accept the layout, so a packed model is for inference alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, install_command
from ..model import Transfusion
from ..model.layers import Linear, RMSNorm, TiedLinear, TimestepModulation, Tower

Quantize = Literal["int8", "float8"]
TORCHAO: dict[Quantize, str] = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
"""torchao's formats for weights alone"""


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


def check_quantize(kind: Quantize, device: torch.device) -> Any:
    """Return torchao's quantization module, before any weight is read.

    Raises UserError where it is not installed, or float8 lacks CUDA of compute capability 8.9.
    """
    if kind not in TORCHAO:
        raise UserError(f"quantize: expected {' or '.join(TORCHAO)}, found {kind}")
    if kind == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(f"quantize: float8: expected CUDA with compute capability 8.9 or newer, found {device.type}")
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError:
        raise UserError(f"quantize: expected torchao, found none; {install_command('quantize')}") from None


def quantize_blocks(model: Transfusion, kind: Quantize, torchao: Any) -> None:
    """Replace the weights of the blocks' linear maps by eight bits, in place. torchao: from `check_quantize`.

        int8     CPU or CUDA: whole numbers, one scale per output, multiplied in the model's dtype
        float8   CUDA: e4m3, likewise

    Embedding, head and patch layers keep their precision: they are small, and rounding them is visible. Products are
    torch's, not oneDNN's packed ones: a sequence's last bits depend on its batch.
    """
    torchao.quantize_(
        model.transformer.blocks, getattr(torchao, TORCHAO[kind])(), lambda m, _: isinstance(m, nn.Linear)
    )


def compile_blocks(model: Transfusion, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a loaded model's blocks in place with torch.compile, when they first run.

    Only the code before and after attention is compiled: attention reads and writes the cache by slots. Both parts are
    the same code in every block and leave the number of positions open, so few graphs serve any depth and batch. torch
    keeps compiled code for the next start in TORCHINDUCTOR_CACHE_DIR. For its effect see docs/benchmarks.md.
    """
    names = ["project_qkv", "finish"]
    if model.config.experts != "shared":
        names += ["project_image_qkv", "finish_image"]
    for block in model.transformer.blocks:
        for name in names:
            setattr(block, name, torch.compile(getattr(block, name), dynamic=True, fullgraph=True, backend=backend))
