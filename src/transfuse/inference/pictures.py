"""Pictures at the edge of the engine: masks on the way in; on the way out, what makes a picture again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..export import Exported
from ..sequence import Text
from ..version import __version__
from .events import Request


def latent_mask(mask: np.ndarray, factor: int) -> Tensor:
    """Reduce a mask of pixels to one of latent elements, bool `[row, column]`: True where any of its pixels is."""
    rows, columns = (side // factor for side in mask.shape)
    cells = mask[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    return torch.from_numpy(cells.any((1, 3)))


def settings_of(request: Request, exported: Exported) -> dict[str, Any]:
    """What makes a request's pictures again: prompt, seed, steps, guidance, and the model's fingerprint."""
    texts = [part.ids for part in request.document.parts if isinstance(part, Text)]
    found: dict[str, Any] = {
        "prompt": " ".join(exported.tokenizer.decode(ids) for ids in texts),
        "seed": request.seed,
        "guidance_scale": request.guidance_scale,
        "model": exported.fingerprint,
        "version": __version__,
    }
    if exported.model.config.images == "latents":
        found |= {"steps": request.sampler.steps, "sampler": request.sampler.name}
    optional = {
        "image_guidance_scale": request.image_guidance_scale,
        "guidance_interval": request.guidance_interval,
        "strength": request.start.strength if request.start else None,
        "masked": True if request.start and request.start.mask is not None else None,
        "images_in_prompt": len(request.document.images) or None,
    }
    return found | {name: value for name, value in optional.items() if value is not None}
