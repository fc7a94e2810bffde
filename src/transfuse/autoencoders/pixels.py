"""The trivial autoencoder: latents are the pixels themselves, scaled to [-1, 1]. For images of 32 or 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def images_to_tensor(images: np.ndarray) -> Tensor:
    """uint8 `[image, row, column, 3]` -> float32 `[image, 3, row, column]` in [-1, 1]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
    return scaled(torch.from_numpy(images))


def scaled(pixels: Tensor) -> Tensor:
    """The same of a tensor, on its device."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def tensor_to_images(x: Tensor) -> np.ndarray:
    """The way back, rounded, and clipped where a network went beyond."""
    pixels = x.detach().float().cpu().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Pixels:
    """`encode`: uint8 images `[image, row, column, 3]` -> float32 latents `[image, 3, row, column]`; `decode`: back."""

    name: str = "pixels"
    fingerprint: str = "pixels"
    channels: int = 3
    factor: int = 1
    """pixels per latent element, along each side"""

    def encode(self, images: np.ndarray) -> Tensor:
        return images_to_tensor(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        return tensor_to_images(latents)
