"""Images to latents and back. Today `Pixels`; the KL and VQ autoencoders share its two methods."""

from .pixels import Pixels

__all__ = ["Pixels"]
