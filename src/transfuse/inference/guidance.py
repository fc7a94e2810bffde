"""Classifier-free guidance (Ho & Salimans 2022): of what a diffusion step predicts, or of the next code's logits.

The null branch sees what training showed when it dropped a caption: the same function builds both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sequence import Document, Image, SequenceFormat, layout_document, unconditional


def guide(branches: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """What branches predict, pushed apart: the first sees the whole prompt, each next one less, the last nothing.

        conditional, null           null + scale * (conditional - null): at scale 0 the null branch exactly
        whole, images alone, null   null + image_scale * (images - null) + scale * (whole - images), as Chameleon has it

    scales: one for each neighbouring pair, in the same order.
    """
    out = branches[-1]
    for more, less, scale in zip(branches, branches[1:], scales, strict=False):
        out = out + scale * (more - less)
    return out


def null_prefix(grammar: SequenceFormat, channels: int) -> list[int]:
    """Tokens before the patches or codes in the null branch: the prefix of a sample whose caption was dropped."""
    image = Image(torch.zeros(channels, grammar.patch_size, grammar.patch_size))
    if grammar.first_code is not None:
        image = Image(torch.zeros(1, 1, dtype=torch.int64))
    layout = layout_document(unconditional(Document([image])), grammar)
    return layout.input_ids[: layout.spans[0].start].tolist()
