"""Images to latents, or codes, and back: `Pixels`, the paper's KL-VAE and VQ-VAE, and any that diffusers knows."""

from .autoencoder import Autoencoder, BottleneckOutput, CodeAutoencoder, DeferredEncoder, ImageAutoencoder, VQTokenizer
from .config import AutoencoderConfig
from .folder import bundled, load_autoencoder, open_autoencoder, save_autoencoder
from .pixels import Pixels

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "BottleneckOutput",
    "CodeAutoencoder",
    "VQTokenizer",
    "ImageAutoencoder",
    "DeferredEncoder",
    "Pixels",
    "bundled",
    "load_autoencoder",
    "open_autoencoder",
    "save_autoencoder",
]
