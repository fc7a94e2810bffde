"""Graphics cards (peak operations and memory), and traces of a few steps.

Figures are from the makers' data sheets: NVIDIA A100 (2021), H100 (2023: SXM, PCIe, NVL), H200 (2024, SXM), HGX B200
(2024), L40S (2023), L4 (2023), RTX A6000 (2020), and the white papers of Ampere, Ada and Blackwell for GeForce (dense,
with float32 sums). Figures "with sparsity" are halved. Memory is what the card is sold with, in units of 2^30 bytes,
less a sixteenth if error correction takes it (L4, L40S); the driver keeps another 1 or 2 %.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..config import nearest
from ..errors import UserError
from ..log import logger

ASSUMED_MFU = 0.40
"""assumed model FLOPs utilisation, usual for billions of parameters; small models reach less"""


@dataclass(frozen=True)
class Card:
    """A graphics card."""

    flops: float
    """peak dense bfloat16 operations per second"""
    memory: int
    """bytes"""
    device: str
    """pattern of the driver's name for it"""


CARDS = {
    "a100-40": Card(312e12, 40 << 30, r"A100-(SXM4|PCIE)-40GB"),
    "a100-80": Card(312e12, 80 << 30, r"A100-SXM4-80GB|A100 80GB PCIe"),
    "h100": Card(989.4e12, 80 << 30, r"H100 80GB HBM3"),
    "h100-pcie": Card(756e12, 80 << 30, r"H100 PCIe"),
    "h100-nvl": Card(835e12, 94 << 30, r"H100 NVL"),
    "h200": Card(989.4e12, 141 << 30, r"H200"),
    "b200": Card(2250e12, 180 << 30, r"B200"),
    "l40s": Card(362e12, 45 << 30, r"L40S"),
    "l4": Card(121e12, 45 << 29, r"L4"),
    "a6000": Card(154.8e12, 48 << 30, r"RTX A6000"),
    "rtx3090": Card(71e12, 24 << 30, r"GeForce RTX 3090"),
    "rtx4090": Card(165.2e12, 24 << 30, r"GeForce RTX 4090"),
    "rtx5090": Card(209.5e12, 32 << 30, r"GeForce RTX 5090"),
}
ALIASES = {"a100": "a100-80"}


def card(name: str) -> Card:
    """Return the card of that name, in any case. Raises UserError with the nearest known names."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in CARDS:
        raise UserError(f'gpu: unknown card "{name}"{nearest(name, [*CARDS, *ALIASES])}')
    return CARDS[key]


def peak_flops(device_name: str) -> float | None:
    """Return the peak operations per second by `torch.cuda.get_device_name()`; None for unknown cards.

    The whole name must match, because a slice of a card (MIG) or a laptop's card has another peak.
    """
    name = device_name.removeprefix("NVIDIA ").strip()
    return next((known.flops for known in CARDS.values() if re.fullmatch(known.device, name)), None)


SKIPPED, WARM = 5, 2
"""steps before a trace, in which kernels are prepared, and steps in which the profiler warms up"""


@contextmanager
def profiled(folder: Path, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; it writes a Chrome trace of `steps` steps to `folder/rank-N.json`.

    A run that ends earlier writes a shorter trace, or none, and logs that.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    path, traced = folder / f"rank-{rank}.json", 0

    def write(profiler: profile) -> None:
        nonlocal traced
        traced = profiler.step_num - SKIPPED - WARM
        if traced < 1:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            logger.info(f"{path}: {traced} steps, open it at ui.perfetto.dev")
        except OSError as error:
            logger.info(f"{path}: not written ({error.strerror or error})")

    plan = schedule(wait=SKIPPED, warmup=WARM, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
    if traced < 1:
        logger.info(
            f"{path}: no trace: it begins after {SKIPPED + WARM} steps, and the run had only {profiler.step_num}"
        )
