"""Graphics cards: how fast they multiply at best, and how much they hold.

From the makers' data sheets: NVIDIA A100 (2021), H100 (2023: SXM, PCIe, NVL), H200 (2024, SXM), HGX B200 (2024), L40S
(2023), L4 (2023), RTX A6000 (2020), and the white papers of Ampere, Ada and Blackwell for GeForce (dense, with sums in
float32). Sheets that give a figure "with sparsity" give twice the dense one, which stands here. Memory is what the card
is sold with, in units of 2^30 bytes, less a sixteenth where error correction takes it (L4, L40S); the driver keeps
another 1 or 2 %.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..config import nearest
from ..errors import UserError

ASSUMED_MFU = 0.40
"""share of the peak that training reaches: an assumption, usual for billions of parameters; small ones reach less"""


@dataclass(frozen=True)
class Card:
    """flops: dense bfloat16 operations a second at most. memory: bytes. device: pattern of the driver's name for it."""

    flops: float
    memory: int
    device: str


CARDS: dict[str, Card] = {
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
    """The card of a name, in any case. Raises UserError with the nearest name, or the list."""
    key = ALIASES.get(name.lower(), name.lower())
    if key not in CARDS:
        raise UserError(f'gpu: unknown card "{name}"{nearest(name, [*CARDS, *ALIASES])}')
    return CARDS[key]


def peak_flops(device_name: str) -> float | None:
    """Operations a second of a card by the name `torch.cuda.get_device_name()` gives; None where it is not known.

    Names must be met whole: a slice of a card (MIG) or a laptop's has another peak.
    """
    name = device_name.removeprefix("NVIDIA ").strip()
    return next((found.flops for found in CARDS.values() if re.fullmatch(found.device, name)), None)


def peak_of(device: torch.device) -> float | None:
    """`peak_flops` of a device; None where it is no card, or not a known one."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_used(device: torch.device) -> int | None:
    """Most bytes that tensors took at a time, since the start; None where the device is no card."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
