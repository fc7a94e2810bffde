"""The configuration of an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_BLOCKS = 100  # per resolution, far more than any network has: a damaged file may ask for more than can be built


@dataclass(frozen=True)
class AutoencoderConfig:
    """The fields of diffusers' `AutoencoderKL` and `VQModel`, with fewer names.

    kind              "kl": a Gaussian; "vq": the nearest of `codebook_size` vectors of `code_channels`
    widths            channels of each resolution, finest first; the image shrinks by two between them
    blocks            residual blocks of each resolution in the encoder; the decoder has one more
    attended          resolutions (indices of widths) whose blocks are followed by attention
    middle_attention  attention between encoder and bottleneck, and between bottleneck and decoder
    groups            groups of the group norms
    quant_conv, post_quant_conv   1 x 1 convolutions before and after the bottleneck (a "vq" always has both)
    scaling_factor, shift_factor, latents_mean, latents_std
                      normalisation: `(z - mean) / std * scaling_factor` if mean and std are given, by channel, else
                      `(z - shift_factor) * scaling_factor`

    Raises ValueError, naming the field, for values out of range.
    """

    kind: Literal["kl", "vq"] = "kl"
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 8
    groups: int = 32
    attended: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    codebook_size: int = 16_384
    code_channels: int = 8
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "latent_channels", "groups", "codebook_size", "code_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"blocks: expected at most {MAX_BLOCKS}, found {self.blocks}")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"widths: expected multiples of groups ({self.groups}), found {self.widths}")
        if any(not 0 <= level < len(self.widths) for level in self.attended):
            raise ValueError(f"attended: expected resolutions 0 to {len(self.widths) - 1}, found {self.attended}")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean: expected together with latents_std, found one of the two")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.bottleneck_channels:
                raise ValueError(f"{name}: expected {self.bottleneck_channels} numbers, found {len(values)}")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"latents_std: expected positive numbers, found {self.latents_std}")

    @property
    def factor(self) -> int:
        """Pixels per latent element, along each side."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def bottleneck_channels(self) -> int:
        """Channels of a latent."""
        return self.latent_channels if self.kind == "kl" else self.code_channels
