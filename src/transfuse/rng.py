"""Random numbers by key: every draw depends on the key alone, never on what was drawn before.

generator_for(seed, "noise", sample, image)     the generator of that image's noise, on any rank, after any restart
"""

from __future__ import annotations

import hashlib

import torch


def generator_for(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by a hash of `key`; on the CPU equal keys give equal draws on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
