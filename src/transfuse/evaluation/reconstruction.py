"""Reconstruction quality of an image autoencoder: PSNR, SSIM, absolute error, Fréchet distance, use of its codebook.

    result = evaluate_reconstruction(autoencoder, batches)      # batches of uint8 images [image, row, column, 3]
    result.psnr                                                # Estimate(value=31.4, low=31.2, high=31.6, count=500)

A Fréchet distance needs a network that sees, `features`, and depends on that network and on the number of images: with
fewer images than the network has channels it says little. Compare only distances that agree in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..autoencoders import Autoencoder, CodeAutoencoder, Pixels
from .confidence import Estimate, bootstrap

BEST_PSNR = 100.0
"""dB given to equal images, and the most that any image gets: a mean over images stays finite"""
WINDOW, SIGMA = 11, 1.5
"""side and standard deviation of the Gaussian window of SSIM, in pixels"""
K1, K2, RANGE = 0.01, 0.03, 255.0
DECODED = 512
"""images decoded with each kind of channel replaced, over all channels: bounds the time of `channel_losses`"""
CARRIES_NOTHING = 0.1
"""dB: a channel whose loss is below this carries nothing"""
SSIM_IMAGES = 8
"""images whose structural similarity is found at once; bounds memory"""


class Features(Protocol):
    """A network that sees, for the Fréchet distance; `name` goes with every distance."""

    @property
    def name(self) -> str: ...

    def pooled(self, images: Tensor) -> Tensor:
        """Map float32 `[image, 3, row, column]` in [-1, 1] to `[image, channel]`."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Reconstruction quality and statistics of the latents; arrays are by image, in order.

    psnr                  dB, at most `BEST_PSNR`: the mean over images of `psnr_by_image`
    ssim                  at most 1, the mean over images of `ssim_by_image`
    l1                    mean absolute difference in levels, 0 to 255
    frechet, features     distance of the images' features to the reconstructions', and the network's name; or None
    codebook_use          share of the codes used at all; codebook_perplexity: as in `codebook_use()`; None without one
    codebook_counts       how often each code was used, int64 `[code]`
    latent_mean, _std     float64 `[channel]`
    *_images_per_second   the first batch, which warms up, is not counted where there are others
    device                where the network ran, in words
    """

    name: str
    count: int
    psnr: Estimate
    ssim: Estimate
    l1: Estimate
    frechet: float | None
    features: str | None
    codebook_size: int | None
    codebook_use: float | None
    codebook_perplexity: float | None
    codebook_counts: np.ndarray | None
    latent_mean: np.ndarray
    latent_std: np.ndarray
    psnr_by_image: np.ndarray
    ssim_by_image: np.ndarray
    encode_images_per_second: float
    decode_images_per_second: float
    device: str


@dataclass(frozen=True)
class ChannelLoss:
    """PSNR in dB that images lose without one channel of their latents, which is replaced over all places.

    by_mean    by the channel's mean over the images
    by_noise   by Gaussian noise of the channel's mean and standard deviation over the images
    """

    by_mean: Estimate
    by_noise: Estimate

    @property
    def least(self) -> float:
        """The smaller of the two: what the channel is worth at least."""
        return min(self.by_mean.value, self.by_noise.value)


# --- measures of pairs ------------------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of uint8 `[image, row, column, 3]`: float64 `[image]` in dB, at most `BEST_PSNR`."""
    _check_pairs("psnr", a, b)
    squared = np.square(a.astype(np.int32) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(RANGE**2 / squared), BEST_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity of uint8 `[image, row, column, 3]`: float64 `[image]` in [-1, 1].

    Wang et al. 2004: Gaussian windows wholly inside the image, biased variances; the mean over windows, then over
    red, green and blue. ValueError for images smaller than a window.
    """
    _check_pairs("ssim", a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim: expected images of at least {WINDOW} x {WINDOW}, found {a.shape[1]} x {a.shape[2]}")
    down, across = _windows(a.shape[1]), _windows(a.shape[2]).T
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    values = []
    for start in range(0, len(a), SSIM_IMAGES):
        x, y = (
            torch.from_numpy(images[start : start + SSIM_IMAGES].astype(np.float64, order="C")).permute(0, 3, 1, 2)
            for images in (a, b)
        )
        mean_x, mean_y = down @ x @ across, down @ y @ across
        variances = down @ (x.square() + y.square()) @ across - mean_x.square() - mean_y.square()
        covariance = down @ (x * y) @ across - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        values.append((luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3)))
    return torch.cat(values).numpy()


def absolute_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean absolute difference of uint8 `[image, row, column, 3]`: float64 `[image]` in levels, 0 to 255."""
    _check_pairs("absolute_error", a, b)
    return np.abs(a.astype(np.int16) - b).mean((1, 2, 3), dtype=np.float64)


def _check_pairs(measure: str, a: np.ndarray, b: np.ndarray) -> None:
    for images in (a, b):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise ValueError(
                f"{measure}: expected uint8 [image, row, column, 3], none empty, found {images.dtype} {images.shape}"
            )
    if a.shape != b.shape:
        raise ValueError(f"{measure}: expected two of one shape, found {a.shape} and {b.shape}")


def _windows(side: int) -> Tensor:
    """Return float64 `[side - WINDOW + 1, side]`: row r is the Gaussian window that starts at pixel r.

    As a matrix, since double precision convolves many times slower than it multiplies.
    """
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    matrix = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    for offset, weight in enumerate(weights / weights.sum()):
        matrix.diagonal(offset).fill_(weight)
    return matrix


# --- measures of sets -------------------------------------------------------------------------------------------------


def frechet_distance(features_a: np.ndarray | Tensor, features_b: np.ndarray | Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the means and covariances of two sets `[image, channel]`.

    `|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))` (Dowson & Landau 1982; Heusel et al. 2017). ValueError for
    fewer than two images in a set, channels that differ, or values that are not finite.
    """
    means, factors = [], []
    for features in (features_a, features_b):
        x = np.asarray(features, dtype=np.float64)
        if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(f"frechet_distance: expected finite [2 or more images, channel], found {x.shape}")
        means.append(x.mean(0))
        factors.append(np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1))
    if len(means[0]) != len(means[1]):
        raise ValueError(f"frechet_distance: expected equal channels, found {len(means[0])} and {len(means[1])}")
    # With A = P'P and B = Q'Q the eigenvalues of (A B)^(1/2) are the singular values of P Q'. Forming A and B and
    # taking the root of their product would turn rounding errors of 1e-16 into ones of 1e-8 wherever they are singular.
    p, q = factors
    cross = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.square(p).sum() + np.square(q).sum() - 2 * cross
    return max(0.0, float(distance))


def codebook_use(codes: np.ndarray | Tensor, size: int) -> tuple[float, float]:
    """The share of `size` codes that occur in `codes` (integers of any shape), and their perplexity, from 1 to `size`.

    Perplexity: e to the entropy of how often each code is used; how many codes would say as much if used evenly.
    """
    return _use(_counts(codes, size))


def _counts(codes: np.ndarray | Tensor, size: int) -> np.ndarray:
    """Return how often each code occurs, int64 `[size]`."""
    flat = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes).ravel()
    if not np.issubdtype(flat.dtype, np.integer) or not len(flat) or flat.min() < 0 or flat.max() >= size:
        span = f"{flat.dtype} {flat.min()} to {flat.max()}" if len(flat) else "none"
        raise ValueError(f"codes: expected integers from 0 to {size - 1}, found {span}")
    return np.bincount(flat, minlength=size)


def _use(counts: np.ndarray) -> tuple[float, float]:
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / len(counts), float(np.exp(-(shares * np.log(shares)).sum()))


# --- an autoencoder ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate_reconstruction(
    autoencoder: Autoencoder, batches: Iterable[np.ndarray], features: Features | None = None
) -> Reconstruction:
    """Encode and decode batches of uint8 `[image, row, column, 3]`, each of any size, and measure what comes back.

    Raises ValueError for no images, images smaller than SSIM's window, or an autoencoder that returns other shapes.
    """
    tally = _Tally(autoencoder, features)
    for images in batches:
        tally.add(images)
    return tally.result()


class _Tally:
    """Running sums over batches: numbers and features, never images."""

    def __init__(self, autoencoder: Autoencoder, features: Features | None) -> None:
        self.autoencoder, self.features = autoencoder, features
        size: int | None = getattr(autoencoder, "codebook_size", None)
        self.counts = None if size is None else np.zeros(size, dtype=np.int64)
        self.psnr: list[np.ndarray] = []
        self.ssim: list[np.ndarray] = []
        self.l1: list[np.ndarray] = []
        self.seen: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        self.sums = torch.zeros(2, autoencoder.channels, dtype=torch.float64)
        self.elements = 0
        self.times: list[tuple[int, float, float]] = []
        self.device = torch.device("cpu")

    def add(self, images: np.ndarray) -> None:
        latents, rebuilt, seconds = self._timed(images)
        self._check_latents(images, latents)
        self.psnr.append(psnr(images, rebuilt))
        self.ssim.append(ssim(images, rebuilt))
        self.l1.append(absolute_error(images, rebuilt))
        self.times.append((len(images), *seconds))
        wide = latents.detach().to("cpu", torch.float64)
        self.sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        self.elements += wide[:, 0].numel()
        if self.counts is not None:
            self.counts += _counts(cast(CodeAutoencoder, self.autoencoder).codes(images), len(self.counts))
        if self.features is not None:
            for kept, pictures in zip(self.seen, (images, rebuilt), strict=True):
                kept.append(self.features.pooled(Pixels().encode(pictures)).detach().to("cpu", torch.float64).numpy())

    def result(self) -> Reconstruction:
        if not self.psnr:
            raise ValueError("evaluate_reconstruction: batches: expected at least one, found none")
        by_image = [np.concatenate(parts) for parts in (self.psnr, self.ssim, self.l1)]
        mean, square = (self.sums / self.elements).numpy()
        use, evenness = (None, None) if self.counts is None else _use(self.counts)
        images, encoding, decoding = (sum(column) for column in zip(*(self.times[1:] or self.times), strict=True))
        frechet = None
        if self.features is not None:
            frechet = frechet_distance(*(np.concatenate(kept) for kept in self.seen))
        return Reconstruction(
            name=self.autoencoder.name,
            count=len(by_image[0]),
            psnr=bootstrap(by_image[0]),
            ssim=bootstrap(by_image[1]),
            l1=bootstrap(by_image[2]),
            frechet=frechet,
            features=None if self.features is None else self.features.name,
            codebook_size=None if self.counts is None else len(self.counts),
            codebook_use=use,
            codebook_perplexity=evenness,
            codebook_counts=self.counts,
            latent_mean=mean,
            latent_std=np.sqrt(np.maximum(square - mean**2, 0)),
            psnr_by_image=by_image[0],
            ssim_by_image=by_image[1],
            encode_images_per_second=images / encoding,
            decode_images_per_second=images / decoding,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
        )

    def _timed(self, images: np.ndarray) -> tuple[Tensor, np.ndarray, tuple[float, float]]:
        """Latents, reconstructions, and the seconds that each of them took."""
        began = time.perf_counter()
        latents = self.autoencoder.encode(images)
        self.device = torch.device(getattr(self.autoencoder, "device", latents.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a GPU answers before it is done; `decode` ends on the host anyway
        between = time.perf_counter()
        rebuilt = self.autoencoder.decode(latents)
        return latents, rebuilt, (between - began, time.perf_counter() - between)

    def _check_latents(self, images: np.ndarray, latents: Tensor) -> None:
        factor = self.autoencoder.factor
        expected = (len(images), self.autoencoder.channels, images.shape[1] // factor, images.shape[2] // factor)
        if latents.shape != expected:
            raise ValueError(f"latents of {self.autoencoder.name}: expected {expected}, found {tuple(latents.shape)}")


@torch.inference_mode()
def channel_losses(
    autoencoder: Autoencoder, images: np.ndarray, batch: int = 32, advance: Callable[[int], None] = lambda count: None
) -> list[ChannelLoss]:
    """Return what each channel of the latents of uint8 images `[image, row, column, 3]` is worth, in order.

    Measured on the first `channel_images` images; the noise is the same in every call. `advance` is called with the
    count of images of each decoded batch.
    """
    images = images[: channel_images(autoencoder, len(images))]
    latents = torch.cat(
        [autoencoder.encode(part).detach().cpu() for part in np.split(images, range(batch, len(images), batch))]
    )
    generator = torch.Generator().manual_seed(0)

    def decibels(replaced: Tensor) -> np.ndarray:
        values = []
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            values.append(psnr(images[part], autoencoder.decode(replaced[part])))
            advance(len(values[-1]))
        return np.concatenate(values)

    whole, losses = decibels(latents), []
    for channel in range(latents.shape[1]):
        values = latents[:, channel].double()
        mean, deviation = values.mean(), values.std(correction=0)
        noise = mean + deviation * torch.randn(values.shape, generator=generator, dtype=torch.float64)
        pair = []
        for other in (mean.expand(values.shape), noise):
            replaced = latents.clone()
            replaced[:, channel] = other.to(latents.dtype)
            pair.append(bootstrap(whole - decibels(replaced)))
        losses.append(ChannelLoss(*pair))
    return losses


def channel_images(autoencoder: Autoencoder, count: int) -> int:
    """Return how many of `count` images `channel_losses` uses: fewer for more channels, at least 8 if available."""
    return min(count, max(8, DECODED // autoencoder.channels))
