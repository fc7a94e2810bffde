"""Classifier-free guidance: `u + scale * (c - u)` (Ho & Salimans 2022).

The null branch sees what training showed when it dropped a caption: the same function builds both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sequence import Document, Grammar, Image, lay_out, unconditional


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Scale 0 is the null branch exactly, 1 the conditional one (which the engine then computes alone)."""
    return null + scale * (conditional - null)


def null_prefix(grammar: Grammar, channels: int) -> list[int]:
    """Tokens before the patches in the null branch: the prefix of a training sample whose caption was dropped."""
    image = Image(torch.zeros(channels, grammar.patch_size, grammar.patch_size))
    layout = lay_out(unconditional(Document([image])), grammar)
    return layout.token[: layout.spans[0].start].tolist()
