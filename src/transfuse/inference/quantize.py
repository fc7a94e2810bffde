"""Blocks whose weights are kept in eight bits, by torchao (extra `quantize`)."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError, install_command
from ..model import Transfusion

Quantize = Literal["int8", "float8"]
TORCHAO: dict[Quantize, str] = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
"""torchao's formats for weights alone"""


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
