"""The trivial autoencoder: latents are the pixels themselves, scaled to [-1, 1]. For images of 32 or 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """`encode`: uint8 images `[image, row, column, 3]` -> float32 latents `[image, 3, row, column]`; `decode`: back."""

    channels: int = 3
    factor: int = 1
    """pixels per latent element, along each side"""

    def encode(self, images: np.ndarray) -> Tensor:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)

    def decode(self, latents: Tensor) -> np.ndarray:
        pixels = latents.detach().float().cpu().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous().numpy()
