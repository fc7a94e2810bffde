"""Where a network computes, and in which dtype: what "auto" means on this machine. No torch until somebody asks."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


def pick_device(asked: Device) -> Literal["cpu", "cuda"]:
    """The device itself; auto: CUDA where there is one. Raises UserError where the one asked for is not there."""
    if asked == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UserError("device: expected a CUDA device, found none on this machine")
    return "cpu"


def training_precision(asked: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """auto: bfloat16 where it is the faster one: on CUDA, and on processors that multiply it natively."""
    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" or _cpu_multiplies_bfloat16() else "float32"


def for_inference(device: Device, precision: Precision) -> tuple[Literal["cpu", "cuda"], torch.dtype]:
    """Device and dtype that a model is loaded with. Raises UserError where the device asked for is not there."""
    import torch

    picked = pick_device(device)
    return picked, getattr(torch, inference_precision(precision, picked))


def inference_precision(asked: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """auto: bfloat16 on CUDA; float32 on the CPU, where a result is then the same bytes alone or among others."""
    if asked != "auto":
        return asked
    return "bfloat16" if device == "cuda" else "float32"


def processor_name() -> str:
    """Of this machine's processor, as its maker calls it where the system says so: seconds depend on it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cpu_multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))
