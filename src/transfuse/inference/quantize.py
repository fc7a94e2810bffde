"""Weights in eight bits, by torchao (extra: `quantize`): the blocks' linear maps, and nothing else.

    int8     CPU or CUDA: whole numbers, one scale an output, multiplied in the model's dtype
    float8   CUDA from compute capability 8.9 on: e4m3, likewise

Embedding, head and patch layers keep their bits: they are few, and what they round is seen. A quarter of float32's
bytes, and not faster by itself. Products are torch's own, not oneDNN's packed ones: a row's last bits depend on its
batch.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import nn

from ..errors import UserError
from ..model import Transfusion

Quantize = Literal["int8", "float8"]
CONFIGS: dict[Quantize, str] = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
"""torchao's, for weights alone"""
OLDEST = (8, 9)
"""compute capability that has products of float8"""


def check_quantize(kind: Quantize, device: torch.device) -> Any:
    """torchao's quantization, where it can do what is asked for. Raises UserError, before any weight is read."""
    if kind not in CONFIGS:
        raise UserError(f"quantize: expected {' or '.join(CONFIGS)}, found {kind}")
    if kind == "float8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < OLDEST):
        raise UserError(f"quantize: float8: expected CUDA with compute capability 8.9 or newer, found {device.type}")
    try:
        return importlib.import_module("torchao.quantization")
    except ImportError:
        raise UserError("quantize: expected torchao, found none; pip install 'transfuse[quantize]'") from None


def quantize(model: Transfusion, kind: Quantize, torchao: Any) -> None:
    """Replace the weights of the blocks' linear maps, in place. torchao: as `check_quantize` gives it."""
    torchao.quantize_(
        model.transformer.blocks, getattr(torchao, CONFIGS[kind])(), lambda m, _: isinstance(m, nn.Linear)
    )
