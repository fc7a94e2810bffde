"""Randomness by key: every draw is a function of numbers that name it, never of what was drawn before.

keyed(seed, "noise", sample, image)     the generator for that image's noise, on any rank, after any restart
"""

from __future__ import annotations

import hashlib

import torch


def keyed(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by a hash of the key; on CPU equal keys give equal draws on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
