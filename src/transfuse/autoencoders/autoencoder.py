"""The image autoencoders of the paper (Transfusion, Appendix A): a KL-VAE and a VQ-VAE, one but for the bottleneck.

    autoencoder = load_autoencoder("runs/kl-f4/export")          # or a folder that diffusers wrote
    latents = autoencoder.encode(images)                         # uint8 [n, row, column, 3] -> normalised latents
    images = autoencoder.decode(latents)

What a Transfusion sees is a normalised latent: of the Gaussian its mean, of the VQ-VAE the vector *before* it is
replaced by the nearest code (decoding replaces it, as latent diffusion does). A Chameleon sees `codes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from .config import AutoencoderConfig
from .network import Decoder, Encoder, initialise
from .pixels import scaled, tensor_to_images

LOG_VARIANCE = (-30.0, 20.0)
"""bounds within which a log variance is kept, as in latent diffusion"""
FIRST_LOG_VARIANCE = -6.0
"""where training starts"""
MOST_PIXELS = 2**21
"""pixels encoded or decoded at once: more images are taken in parts, so that memory stays bounded"""


class Autoencoder(Protocol):
    """What everybody else may know of an autoencoder."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Names the weights: a hash; equal for equal autoencoders."""

    @property
    def channels(self) -> int:
        """of a latent"""

    @property
    def factor(self) -> int:
        """pixels per latent element, along each side"""

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 images `[image, row, column, 3]` -> float32 latents `[image, channel, row, column]`, of unit scale."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Back to uint8 images."""


class CodeAutoencoder(Autoencoder, Protocol):
    """One with a codebook; `codebook_size` is None where there is none after all."""

    @property
    def codebook_size(self) -> int | None: ...

    def codes(self, images: np.ndarray) -> Tensor:
        """uint8 images -> int64 codes `[image, row, column]`."""

    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """int64 codes `[image, row, column]` -> uint8 images."""


class Coded:
    """A VQ autoencoder whose latents are its codes, int64 `[image, row, column]`: what a Chameleon sees.

    Raises ValueError for an autoencoder without a codebook.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        size = getattr(autoencoder, "codebook_size", None)
        if size is None:
            raise ValueError(f'autoencoder: expected one with a codebook, found "{autoencoder.name}"')
        self.inner = cast(CodeAutoencoder, autoencoder)
        self.codebook_size: int = size
        self.name, self.fingerprint = autoencoder.name, autoencoder.fingerprint
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 images `[image, row, column, 3]` -> int64 codes `[image, row, column]`."""
        return self.inner.codes(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        """int64 codes `[image, row, column]` -> uint8 images."""
        return self.inner.decode_codes(latents)


class Later:
    """Of an autoencoder what a loader needs to lay pictures out that are encoded where the network trains: not what
    encodes them. On a GPU that is a hundred times as fast as in a loader's processes."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.name, self.fingerprint = autoencoder.name, autoencoder.fingerprint
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: np.ndarray) -> Tensor:
        raise NotImplementedError("pictures are encoded later")

    def decode(self, latents: Tensor) -> np.ndarray:
        raise NotImplementedError("pictures are encoded later")


@dataclass
class Bottled:
    """What passed the bottleneck: `z` for the decoder; loss terms `[image]`; codes `[image, row, column]` of a VQ."""

    z: Tensor
    kl: Tensor | None = None
    codebook: Tensor | None = None
    commitment: Tensor | None = None
    codes: Tensor | None = None


class Codebook(nn.Module):
    """Vectors to choose from, `embedding` `[size, channel]`."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)

    def nearest(self, z: Tensor) -> Tensor:
        """The code nearest to each vector of `[image, channel, row, column]`: int64 `[image, row, column]`."""
        flat = z.detach().movedim(1, -1).flatten(0, -2).float()
        codes = self.embedding.weight.detach().float()
        # |z - e|^2 without |z|^2, which is the same for every e
        distance = torch.addmm(codes.square().sum(-1), flat, codes.t(), alpha=-2)
        return distance.argmin(-1).view(z.shape[0], *z.shape[2:])

    def vectors(self, codes: Tensor) -> Tensor:
        """`[image, row, column]` -> `[image, channel, row, column]`."""
        return self.embedding(codes).movedim(-1, 1)


class ImageAutoencoder(nn.Module):
    """A KL-VAE or VQ-VAE. `name` and `fingerprint` are set where it is loaded; a network in training has none."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.name: str = config.kind
        self.fingerprint = ""
        moments = 2 * config.latent_channels if config.kind == "kl" else config.latent_channels
        vq = config.kind == "vq"
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv = (
            nn.Conv2d(moments, config.code_channels if vq else moments, 1) if vq or config.quant_conv else None
        )
        self.post_quant_conv = (
            nn.Conv2d(config.bottleneck_channels, config.latent_channels, 1) if vq or config.post_quant_conv else None
        )
        if vq:
            self.quantize = Codebook(config.codebook_size, config.code_channels)

    @property
    def channels(self) -> int:
        return self.config.bottleneck_channels

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def codebook_size(self) -> int | None:
        """Number of codes; None where there is no codebook."""
        return self.config.codebook_size if self.config.kind == "vq" else None

    # --- as a network ---

    def moments(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] -> what enters the bottleneck: mean and log variance of a KL, vectors of a VQ."""
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def bottleneck(self, h: Tensor, noise: Tensor | None = None) -> Bottled:
        """The KL's sample `mean + std * noise` (its mean without noise), or the VQ's nearest vectors, with losses.

        kl          sum over an image's latent of the divergence from N(0, 1), in nats
        codebook    mean squared distance of the chosen vectors to the encoder's, which are held; commitment: the same,
                    the codebook held (van den Oord et al. 2017, equation 3, without beta)
        """
        if self.config.kind == "kl":
            mean, log_variance = h.chunk(2, dim=1)
            log_variance = log_variance.clamp(*LOG_VARIANCE)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
            return Bottled(mean if noise is None else mean + (0.5 * log_variance).exp() * noise, kl=kl)
        codes = self.quantize.nearest(h)
        chosen = self.quantize.vectors(codes)
        return Bottled(
            h + (chosen - h).detach(),  # the gradient passes the choice as if it were the identity
            codebook=(chosen - h.detach()).square().flatten(1).mean(1),
            commitment=(chosen.detach() - h).square().flatten(1).mean(1),
            codes=codes,
        )

    def reconstruct(self, z: Tensor) -> Tensor:
        """What left the bottleneck -> images, about in [-1, 1]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def initialise(self, seed: int) -> ImageAutoencoder:
        """Draw all weights from `seed`. Returns self.

        Images start near grey, codes spread like what the encoder first gives, and a KL all but without noise: with it
        the first thousand steps teach little.
        """
        initialise(self, seed)
        with torch.no_grad():
            self.decoder.conv_out.weight.mul_(0.1)
            if self.config.kind == "vq":
                codes = self.quantize.embedding.weight
                drawn = torch.empty(codes.shape).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
                codes.copy_(drawn)
            else:
                last = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
                log_variance = slice(self.config.latent_channels, None)
                last.weight[log_variance] *= 0.1
                last.get_parameter("bias")[log_variance] = FIRST_LOG_VARIANCE
        return self

    @torch.no_grad()
    def redraw_channels(self, channels: Sequence[int], seed: int) -> ImageAutoencoder:
        """Give a KL's latent `channels` new weights from `seed`, as `initialise` does. Returns self.

        A channel that training left at nothing but noise stays there, since nothing is lost without it. Drawn again
        together with one that carries much, both learn what that one carried.
        """
        drawn = ImageAutoencoder(replace(self.config, quant_conv=False)).initialise(seed).to(self.device)
        last = self.encoder.conv_out
        if self.quant_conv is not None:  # its product with the convolution before it: each channel has its own filter
            mix = self.quant_conv.weight[:, :, 0, 0].clone()
            last.weight.copy_(torch.einsum("oi,ichw->ochw", mix, last.weight))
            last.get_parameter("bias").copy_(mix @ last.get_parameter("bias") + self.quant_conv.get_parameter("bias"))
            self.quant_conv.weight[:, :, 0, 0] = torch.eye(len(mix))
            self.quant_conv.get_parameter("bias").zero_()
        rows = [*channels, *(channel + self.config.latent_channels for channel in channels)]
        last.weight[rows] = drawn.encoder.conv_out.weight[rows]
        last.get_parameter("bias")[rows] = drawn.encoder.conv_out.get_parameter("bias")[rows]
        first, new = (a.decoder.conv_in if a.post_quant_conv is None else a.post_quant_conv for a in (self, drawn))
        first.weight[:, list(channels)] = new.weight[:, list(channels)]
        return self

    # --- as others use it ---

    def encode(self, images: np.ndarray) -> Tensor:
        self._check(images)
        return self.latents(torch.from_numpy(images)).cpu()

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """As `encode`, of a uint8 tensor `[image, row, column, 3]` on any device, to latents on the network's."""
        size = pixels[0][..., 0].numel()
        return torch.cat([self.normalise(self._raw(part)).float() for part in _parts(pixels, size)])

    def decode(self, latents: Tensor) -> np.ndarray:
        with torch.inference_mode():
            size = latents[0][0].numel() * self.factor**2
            return np.concatenate([tensor_to_images(self._decoded(part)) for part in _parts(latents, size)])

    def codes(self, images: np.ndarray) -> Tensor:
        """uint8 images -> int64 codes `[image, row, column]`. ValueError without a codebook."""
        self._check(images)
        self._needs_codebook()
        pixels = torch.from_numpy(images)
        with torch.inference_mode():
            return torch.cat(
                [self.quantize.nearest(self._raw(part)).cpu() for part in _parts(pixels, images[0][..., 0].size)]
            )

    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """int64 codes `[image, row, column]` -> uint8 images. ValueError without a codebook."""
        self._needs_codebook()
        with torch.inference_mode():
            return self.decode(self.normalise(self.quantize.vectors(codes.to(self.device))))

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    def normalise(self, z: Tensor) -> Tensor:
        """A latent as the encoder gives it -> of mean 0 and deviation 1, by the statistics of the configuration."""
        shift, scale = self._statistics(z)
        return (z - shift) * scale

    def denormalise(self, z: Tensor) -> Tensor:
        shift, scale = self._statistics(z)
        return z / scale + shift

    def with_statistics(self, mean: Tensor, std: Tensor) -> ImageAutoencoder:
        """Normalise by these from now on, `[channel]` each. Returns self."""
        self.config = replace(
            self.config,
            latents_mean=tuple(mean.tolist()),
            latents_std=tuple(std.tolist()),
            scaling_factor=1.0,
            shift_factor=0.0,
        )
        return self

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        mean = config.latents_mean or (config.shift_factor,)
        std = config.latents_std or (1.0,)
        shift = torch.tensor(mean, dtype=z.dtype, device=z.device).view(-1, 1, 1)
        return shift, config.scaling_factor / torch.tensor(std, dtype=z.dtype, device=z.device).view(-1, 1, 1)

    def _raw(self, pixels: Tensor) -> Tensor:
        """uint8 pixels -> latents, not yet normalised: the mean of a KL, the vectors of a VQ before the choice."""
        weight = self.decoder.conv_in.weight
        x = scaled(pixels.to(weight.device)).to(weight.dtype)
        h = self.moments(x.contiguous(memory_format=torch.channels_last))
        return h.chunk(2, dim=1)[0] if self.config.kind == "kl" else h

    def _decoded(self, latents: Tensor) -> Tensor:
        weight = self.decoder.conv_in.weight
        z = self.denormalise(latents.to(device=weight.device, dtype=weight.dtype))
        if self.config.kind == "vq":
            z = self.quantize.vectors(self.quantize.nearest(z)).to(weight.dtype)
        return self.reconstruct(z.contiguous(memory_format=torch.channels_last))

    def _check(self, images: np.ndarray) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
        if any(side % self.factor or not side for side in images.shape[1:3]):
            raise ValueError(f"images: expected sides that are multiples of {self.factor}, found {images.shape[1:3]}")

    def _needs_codebook(self) -> None:
        if self.codebook_size is None:
            raise ValueError(f"autoencoder {self.name}: expected a codebook, found a KL autoencoder")


def _parts(items: Tensor, pixels: int) -> list[Tensor]:
    """Cut images or latents, each of so many pixels, into parts of at most `MOST_PIXELS`."""
    step = max(1, MOST_PIXELS // pixels)
    return [items[start : start + step] for start in range(0, len(items), step)]
