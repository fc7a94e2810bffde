"""The trivial autoencoder: latents are the pixels themselves, scaled to [-1, 1]. For images of 32 or 64 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def images_to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 `[image, row, column, 3]` to float32 `[image, 3, row, column]` in [-1, 1].

    Raises ValueError for another dtype or shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
    return scaled(torch.from_numpy(images))


def scaled(pixels: Tensor) -> Tensor:
    """Convert a uint8 tensor like `images_to_tensor`, on its device."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def tensor_to_images(x: Tensor) -> np.ndarray:
    """Convert a tensor in [-1, 1] back to uint8 images, rounded and clipped."""
    pixels = x.detach().float().cpu().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Pixels:
    """The identity autoencoder: latents are float32 pixels `[image, 3, row, column]` in [-1, 1]."""

    name: str = "pixels"
    fingerprint: str = "pixels"
    channels: int = 3
    factor: int = 1
    """pixels per latent element, along each side"""

    def encode(self, images: np.ndarray) -> Tensor:
        return images_to_tensor(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        return tensor_to_images(latents)
