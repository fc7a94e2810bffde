"""Images to latents, or codes, and back: `Pixels`, the paper's KL-VAE and VQ-VAE, and any that diffusers knows."""

from .autoencoder import (
    Autoencoder,
    DeferredEncoder,
    ImageAutoencoder,
    Pixels,
    VQTokenizer,
    images_to_tensor,
)
from .folder import bundled, load_autoencoder, open_autoencoder, save_autoencoder
from .network import AutoencoderConfig

__all__ = [
    "Autoencoder", "AutoencoderConfig", "DeferredEncoder", "ImageAutoencoder", "Pixels", "VQTokenizer", "bundled",
    "images_to_tensor", "load_autoencoder", "open_autoencoder", "save_autoencoder",
]  # fmt: skip
