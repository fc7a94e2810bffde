"""Images to latents, or codes, and back: pixels, and the paper's KL-VAE and VQ-VAE (Transfusion, Appendix A).

    autoencoder = load_autoencoder("runs/kl-f4/export")          # or a folder that diffusers wrote
    latents = autoencoder.encode(images)                         # uint8 [image, row, column, 3] -> normalised latents
    images = autoencoder.decode(latents)

A Transfusion trains on normalised latents: the Gaussian's mean, or the VQ-VAE's vectors *before* they are replaced by
the nearest codes (decoding replaces them, as in latent diffusion). A Chameleon trains on `codes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from .network import AutoencoderConfig, Decoder, Encoder, initialise

LOG_VARIANCE = (-30.0, 20.0)
"""bounds of the log variance, as in latent diffusion"""
FIRST_LOG_VARIANCE = -6.0
"""log variance at initialisation"""
MAX_PIXELS = 2**21
"""pixels encoded or decoded at once; larger batches are split, which bounds memory"""


# --- the interface to the rest of the code ----------------------------------------------------------------------------


class Autoencoder(Protocol):
    """Images to latents and back.

    name, fingerprint   its name, and a hash of its weights, equal for equal autoencoders
    channels, factor    channels of a latent; pixels per latent element, along each side
    """

    name: str
    fingerprint: str
    channels: int
    factor: int

    def encode(self, images: np.ndarray) -> Tensor:
        """Encode uint8 `[image, row, column, 3]` to float32 latents `[image, channel, row, column]` of unit scale."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode latents to uint8 `[image, row, column, 3]`."""


class VQTokenizer:
    """A VQ autoencoder whose latents are its codes, int64 `[image, row, column]`, for a Chameleon.

    Raises ValueError for an autoencoder without a codebook.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        size = getattr(autoencoder, "codebook_size", None)
        if size is None:
            raise ValueError(f'autoencoder: expected one with a codebook, found "{autoencoder.name}"')
        self.inner = cast(ImageAutoencoder, autoencoder)
        self.codebook_size: int = size
        self.name, self.fingerprint = autoencoder.name, autoencoder.fingerprint
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: np.ndarray) -> Tensor:
        return self.inner.codes(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        return self.inner.decode_codes(latents)


class DeferredEncoder:
    """The metadata of an autoencoder without its weights, for loaders whose images the trainer encodes on the GPU."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.name, self.fingerprint = autoencoder.name, autoencoder.fingerprint
        self.channels, self.factor = autoencoder.channels, autoencoder.factor

    def encode(self, images: np.ndarray) -> Tensor:
        raise NotImplementedError("the trainer encodes images")

    def decode(self, latents: Tensor) -> np.ndarray:
        raise NotImplementedError("the trainer encodes images")


# --- pixels -----------------------------------------------------------------------------------------------------------


@dataclass(unsafe_hash=True)
class Pixels:
    """The identity autoencoder: latents are float32 pixels `[image, 3, row, column]` in [-1, 1]."""

    name: str = "pixels"
    fingerprint: str = "pixels"
    channels: int = 3
    factor: int = 1

    def encode(self, images: np.ndarray) -> Tensor:
        return images_to_tensor(images)

    def latents(self, pixels: Tensor) -> Tensor:
        return images_to_tensor(pixels)

    def decode(self, latents: Tensor) -> np.ndarray:
        return tensor_to_images(latents)


def images_to_tensor(images: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 `[image, row, column, 3]` to float32 `[image, 3, row, column]` in [-1, 1], on its device.

    Raises ValueError for an array of another dtype or shape.
    """
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
        images = torch.from_numpy(images)
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0)


def tensor_to_images(x: Tensor) -> np.ndarray:
    """Convert a tensor in [-1, 1] back to uint8 images, rounded and clipped."""
    pixels = x.detach().float().cpu().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


# --- KL and VQ --------------------------------------------------------------------------------------------------------


@dataclass
class BottleneckOutput:
    """The bottleneck's output: `z` for the decoder, loss terms `[image]`, and codes `[image, row, column]` of a VQ."""

    z: Tensor
    kl: Tensor | None = None
    codebook: Tensor | None = None
    commitment: Tensor | None = None
    codes: Tensor | None = None


class Codebook(nn.Module):
    """A codebook: `embedding` holds vectors `[size, channel]`."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, channels)

    def nearest(self, z: Tensor) -> Tensor:
        """Return the nearest codes, int64 `[image, row, column]`, of vectors `[image, channel, row, column]`."""
        flat = z.detach().movedim(1, -1).flatten(0, -2).float()
        codes = self.embedding.weight.detach().float()
        # |z - e|^2 without |z|^2, which does not depend on e
        distance = torch.addmm(codes.square().sum(-1), flat, codes.t(), alpha=-2)
        return distance.argmin(-1).view(z.shape[0], *z.shape[2:])

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes, `[image, row, column]` to `[image, channel, row, column]`."""
        return self.embedding(codes).movedim(-1, 1)


class ImageAutoencoder(nn.Module):
    """A KL-VAE or VQ-VAE; `codebook_size` is None for a KL. A network in training has no fingerprint.

    max_pixels: the pixels encoded or decoded at once; it bounds memory and changes nothing else.
    """

    def __init__(
        self, config: AutoencoderConfig, name: str | None = None, fingerprint: str = "", max_pixels: int = MAX_PIXELS
    ) -> None:
        super().__init__()
        self.config, self.max_pixels = config, max_pixels
        self.name: str = name or config.kind
        self.fingerprint = fingerprint
        self.channels, self.factor = config.bottleneck_channels, config.factor
        vq = config.kind == "vq"
        self.codebook_size = config.codebook_size if vq else None
        moments = config.latent_channels if vq else 2 * config.latent_channels
        self.encoder = Encoder(config, moments)
        self.decoder = Decoder(config)
        self.quant_conv: nn.Conv2d | None = None
        self.post_quant_conv: nn.Conv2d | None = None
        if vq or config.quant_conv:
            self.quant_conv = nn.Conv2d(moments, config.code_channels if vq else moments, 1)
        if vq or config.post_quant_conv:
            self.post_quant_conv = nn.Conv2d(config.bottleneck_channels, config.latent_channels, 1)
        if vq:
            self.quantize = Codebook(config.codebook_size, config.code_channels)

    @property
    def device(self) -> torch.device:
        return self.decoder.conv_in.weight.device

    # --- as a network ---

    def moments(self, x: Tensor) -> Tensor:
        """Encode images in [-1, 1] to the bottleneck's input: mean and log variance of a KL, vectors of a VQ."""
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def bottleneck(self, h: Tensor, noise: Tensor | None = None) -> BottleneckOutput:
        """Return the KL's sample `mean + std * noise` (the mean without noise) or the VQ's nearest vectors, and losses.

        kl           divergence from N(0, 1), summed over an image's latent, in nats
        codebook     mean squared distance of the chosen vectors to the encoder's, which get no gradient
        commitment   the same distance without a gradient to the codebook (arXiv 1711.00937, equation 3, without beta)
        """
        if self.config.kind == "kl":
            mean, log_variance = h.chunk(2, dim=1)
            log_variance = log_variance.clamp(*LOG_VARIANCE)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)
            return BottleneckOutput(mean if noise is None else mean + (0.5 * log_variance).exp() * noise, kl=kl)
        codes = self.quantize.nearest(h)
        chosen = self.quantize.vectors(codes)
        return BottleneckOutput(
            h + (chosen - h).detach(),  # straight-through gradient
            codebook=(chosen - h.detach()).square().flatten(1).mean(1),
            commitment=(chosen.detach() - h).square().flatten(1).mean(1),
            codes=codes,
        )

    def reconstruct(self, z: Tensor) -> Tensor:
        """Decode the bottleneck's output to images, roughly in [-1, 1]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @torch.no_grad()
    def initialise(self, seed: int) -> ImageAutoencoder:
        """Initialise all weights from `seed` and return self.

        Images start near grey, codes spread like the encoder's first output, and a KL starts almost without noise,
        which would waste the first thousand steps.
        """
        initialise(self, seed)
        self.decoder.conv_out.weight.mul_(0.1)
        if self.config.kind == "vq":
            codes = self.quantize.embedding.weight
            codes.copy_(torch.empty(codes.shape).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed)))
        else:
            last = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
            log_variance = slice(self.config.latent_channels, None)
            last.weight[log_variance] *= 0.1
            last.get_parameter("bias")[log_variance] = FIRST_LOG_VARIANCE
        return self

    @torch.no_grad()
    def redraw_channels(self, channels: Sequence[int], seed: int) -> ImageAutoencoder:
        """Give a KL's latent `channels` new weights from `seed`, as `initialise` does, and return self.

        A channel that carries nothing but noise never recovers, because the decoder ignores it. If it is redrawn
        together with one that carries much, the two share what that one carried.
        """
        drawn = ImageAutoencoder(replace(self.config, quant_conv=False)).initialise(seed).to(self.device)
        last = self.encoder.conv_out
        bias = last.get_parameter("bias")
        if self.quant_conv is not None:
            # Folded into the convolution before it, so that each channel has a separate filter.
            mix = self.quant_conv.weight[:, :, 0, 0].clone()
            last.weight.copy_(torch.einsum("oi,ichw->ochw", mix, last.weight))
            bias.copy_(mix @ bias + self.quant_conv.get_parameter("bias"))
            self.quant_conv.weight[:, :, 0, 0] = torch.eye(len(mix))
            self.quant_conv.get_parameter("bias").zero_()
        rows = [*channels, *(channel + self.config.latent_channels for channel in channels)]
        last.weight[rows] = drawn.encoder.conv_out.weight[rows]
        bias[rows] = drawn.encoder.conv_out.get_parameter("bias")[rows]
        first, new = (a.decoder.conv_in if a.post_quant_conv is None else a.post_quant_conv for a in (self, drawn))
        first.weight[:, list(channels)] = new.weight[:, list(channels)]
        return self

    # --- as an `Autoencoder` ---

    def encode(self, images: np.ndarray) -> Tensor:
        """Encode uint8 `[image, row, column, 3]` to normalised latents. Raises ValueError for other input."""
        return self.latents(self._checked(images)).cpu()

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Encode a uint8 tensor `[image, row, column, 3]` on any device to latents on the network's device."""
        parts = self._parts(pixels, math.prod(pixels.shape[1:3]))
        return torch.cat([self.normalise(self._raw(part)).float() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decode normalised latents to uint8 `[image, row, column, 3]`."""
        images = []
        for part in self._parts(latents, self.factor**2 * math.prod(latents.shape[2:])):
            z = self.denormalise(part.to(device=self.device, dtype=self.decoder.conv_in.weight.dtype))
            if self.config.kind == "vq":
                z = self.quantize.vectors(self.quantize.nearest(z)).to(z.dtype)
            images.append(tensor_to_images(self.reconstruct(z.contiguous(memory_format=torch.channels_last))))
        return np.concatenate(images)

    @torch.no_grad()
    def codes(self, images: np.ndarray) -> Tensor:
        """Encode uint8 images to int64 codes `[image, row, column]`. Raises ValueError without a codebook."""
        self._check_codebook()
        parts = self._parts(self._checked(images), math.prod(images.shape[1:3]))
        return torch.cat([self.quantize.nearest(self._raw(part)).cpu() for part in parts])

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> np.ndarray:
        """Decode int64 codes `[image, row, column]` to uint8 images. Raises ValueError without a codebook."""
        self._check_codebook()
        return self.decode(self.normalise(self.quantize.vectors(codes.to(self.device))))

    def normalise(self, z: Tensor) -> Tensor:
        """Scale the encoder's latents to mean 0 and deviation 1, by the configuration's statistics."""
        shift, scale = self._statistics(z)
        return (z - shift) * scale

    def denormalise(self, z: Tensor) -> Tensor:
        """Undo `normalise`."""
        shift, scale = self._statistics(z)
        return z / scale + shift

    def with_statistics(self, mean: Tensor, std: Tensor) -> ImageAutoencoder:
        """Set the statistics for normalisation, `[channel]` each, and return self."""
        means, deviations = tuple(mean.tolist()), tuple(std.tolist())
        self.config = replace(
            self.config, latents_mean=means, latents_std=deviations, scaling_factor=1.0, shift_factor=0.0
        )
        return self

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        shift, deviation = (
            torch.tensor(values, dtype=z.dtype, device=z.device).view(-1, 1, 1)
            for values in (config.latents_mean or (config.shift_factor,), config.latents_std or (1.0,))
        )
        return shift, config.scaling_factor / deviation

    def _raw(self, pixels: Tensor) -> Tensor:
        """Encode uint8 pixels to latents before normalisation: a KL's mean, or a VQ's vectors before quantisation."""
        weight = self.decoder.conv_in.weight
        x = images_to_tensor(pixels.to(weight.device)).to(weight.dtype)
        h = self.moments(x.contiguous(memory_format=torch.channels_last))
        return h.chunk(2, dim=1)[0] if self.config.kind == "kl" else h

    def _parts(self, items: Tensor, pixels: int) -> Sequence[Tensor]:
        """Split images or latents, each of `pixels` pixels, into batches of at most `max_pixels`."""
        return items.split(max(1, self.max_pixels // pixels))

    def _checked(self, images: np.ndarray) -> Tensor:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(f"images: expected uint8 [image, row, column, 3], found {images.dtype} {images.shape}")
        if any(side % self.factor or not side for side in images.shape[1:3]):
            raise ValueError(f"images: expected sides that are multiples of {self.factor}, found {images.shape[1:3]}")
        return torch.from_numpy(images)

    def _check_codebook(self) -> None:
        if self.codebook_size is None:
            raise ValueError(f"autoencoder {self.name}: expected a codebook, found a KL autoencoder")
