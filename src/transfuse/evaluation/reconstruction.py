"""Reconstruction quality of an image autoencoder: PSNR, SSIM, absolute error, Fréchet distance, use of its codebook.

    result = evaluate_reconstruction(autoencoder, batches)      # batches of uint8 images [image, row, column, 3]
    result.psnr                                                # Estimate(value=31.4, low=31.2, high=31.6, count=500)

A Fréchet distance needs a feature network and depends on it and on the number of images: with fewer images than the
network has channels it says little. Compare only distances that agree in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..autoencoders import Autoencoder, ImageAutoencoder, Pixels
from ..autoencoders.features import Features
from ..errors import UserError
from .confidence import Estimate, bootstrap
from .context import EvalContext, Example, Metric, MetricResult, Result
from .generate import Made, Task
from .image_quality import all_features, check_images, context_features, distance_name, frechet
from .pairs import context_pairs

BEST_PSNR = 100.0  # dB given to equal images, and the most that any image gets: a mean over images stays finite
WINDOW, SIGMA = 11, 1.5  # side and standard deviation of the Gaussian window of SSIM, in pixels
K1, K2, RANGE = 0.01, 0.03, 255.0
SSIM_IMAGES = 8  # images whose structural similarity is computed at once; bounds memory
DECODED = 512
"""Images decoded with each kind of channel replaced, over all channels: bounds the time of `channel_losses`."""
CARRIES_NOTHING = 0.1  # dB: a channel whose loss is below this carries nothing
SHOWN = 12


# --- pairs of images --------------------------------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio of uint8 `[image, row, column, 3]`, float64 `[image]` in dB."""
    _check_pairs("psnr", a, b)
    squared = np.square(a.astype(np.int32) - b).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(RANGE**2 / squared), BEST_PSNR)


def absolute_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the mean absolute difference of uint8 `[image, row, column, 3]`, float64 `[image]` in levels, 0 to 255."""
    _check_pairs("absolute_error", a, b)
    return np.abs(a.astype(np.int16) - b).mean((1, 2, 3), dtype=np.float64)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the structural similarity of uint8 `[image, row, column, 3]`, float64 `[image]` in [-1, 1].

    Wang et al. 2004: Gaussian windows wholly inside the image, biased variances; the mean over windows, then over
    red, green and blue. Raises ValueError for images smaller than a window.
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


def _check_pairs(measure: str, a: np.ndarray, b: np.ndarray) -> None:
    for images in (a, b):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            raise ValueError(
                f"{measure}: expected uint8 [image, row, column, 3], none empty, found {images.dtype} {images.shape}"
            )
    if a.shape != b.shape:
        raise ValueError(f"{measure}: expected two of one shape, found {a.shape} and {b.shape}")


# --- codes ------------------------------------------------------------------------------------------------------------


def code_counts(codes: np.ndarray | Tensor, size: int) -> np.ndarray:
    """Return how often each code occurs in integers of any shape, int64 `[size]`. Raises ValueError for other codes."""
    flat = np.asarray(codes.cpu() if isinstance(codes, Tensor) else codes).ravel()
    if not np.issubdtype(flat.dtype, np.integer) or not len(flat) or flat.min() < 0 or flat.max() >= size:
        span = f"{flat.dtype} {flat.min()} to {flat.max()}" if len(flat) else "none"
        raise ValueError(f"codes: expected integers from 0 to {size - 1}, found {span}")
    return np.bincount(flat, minlength=size)


def codebook_use(counts: np.ndarray) -> tuple[float, float]:
    """Return the share of codes that occur, and their perplexity, from 1 to the codebook's size.

    Perplexity is e to the entropy of `counts`: how many codes would say as much if used evenly.
    """
    shares = counts[counts > 0] / counts.sum()
    return len(shares) / len(counts), float(np.exp(-(shares * np.log(shares)).sum()))


# --- an autoencoder ---------------------------------------------------------------------------------------------------


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
    frechet: Estimate | None
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


@torch.inference_mode()
def evaluate_reconstruction(
    autoencoder: Autoencoder,
    batches: Iterable[np.ndarray],
    features: Features | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Reconstruction:
    """Encode and decode batches of uint8 `[image, row, column, 3]`, each of any size, and measure the results.

    Keeps numbers and features of past batches, never images. Raises ValueError for no images, images smaller than
    SSIM's window, or an autoencoder that returns other shapes.
    """
    size: int | None = getattr(autoencoder, "codebook_size", None)
    counts = None if size is None else np.zeros(size, dtype=np.int64)
    by_image: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    sums, elements = torch.zeros(2, autoencoder.channels, dtype=torch.float64), 0
    times: list[tuple[int, float, float]] = []
    device = torch.device("cpu")
    for images in batches:
        began = clock()
        latents = autoencoder.encode(images)
        device = torch.device(getattr(autoencoder, "device", latents.device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a GPU answers before it is done; `decode` ends on the host anyway
        between = clock()
        rebuilt = autoencoder.decode(latents)
        times.append((len(images), between - began, clock() - between))
        factor = autoencoder.factor
        expected = (len(images), autoencoder.channels, images.shape[1] // factor, images.shape[2] // factor)
        if latents.shape != expected:
            raise ValueError(f"latents of {autoencoder.name}: expected {expected}, found {tuple(latents.shape)}")
        by_image.append((psnr(images, rebuilt), ssim(images, rebuilt), absolute_error(images, rebuilt)))
        wide = latents.detach().to("cpu", torch.float64)
        sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        elements += wide[:, 0].numel()
        if counts is not None:
            counts += code_counts(cast(ImageAutoencoder, autoencoder).codes(images), len(counts))
        if features is not None:
            for kept, pictures in zip(seen, (images, rebuilt), strict=True):
                kept.append(features.pooled(Pixels().encode(pictures)).detach().to("cpu", torch.float64).numpy())
    if not by_image:
        raise ValueError("evaluate_reconstruction: batches: expected at least one, found none")
    decibels, similarity, error = (np.concatenate(parts) for parts in zip(*by_image, strict=True))
    mean, square = (sums / elements).numpy()
    use, evenness = (None, None) if counts is None else codebook_use(counts)
    count, encoding, decoding = (sum(column) for column in zip(*(times[1:] or times), strict=True))
    return Reconstruction(
        name=autoencoder.name,
        count=len(decibels),
        psnr=bootstrap(decibels),
        ssim=bootstrap(similarity),
        l1=bootstrap(error),
        frechet=None if features is None else frechet(np.concatenate(seen[1]), np.concatenate(seen[0]), paired=True),
        features=None if features is None else features.name,
        codebook_size=size,
        codebook_use=use,
        codebook_perplexity=evenness,
        codebook_counts=counts,
        latent_mean=mean,
        latent_std=np.sqrt(np.maximum(square - mean**2, 0)),
        psnr_by_image=decibels,
        ssim_by_image=similarity,
        encode_images_per_second=count / encoding,
        decode_images_per_second=count / decoding,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    )


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


# --- the metric: what the model's autoencoder keeps of images, without the model --------------------------------------


def _names(context: EvalContext) -> tuple[str, str, str]:
    return "PSNR in dB", "SSIM", distance_name(context, "rFID", "rFD")


def _score(context: EvalContext) -> MetricResult:
    pairs, autoencoder = context_pairs(context), context.pipe.exported.autoencoder

    def work(numbers: Sequence[int]) -> list[Made]:
        pictures = np.stack([pairs.picture(n) for n in numbers])
        rebuilt = autoencoder.decode(autoencoder.encode(pictures))
        scores = zip(psnr(pictures, rebuilt), ssim(pictures, rebuilt), rebuilt, strict=True)
        return [Made({"psnr": float(a), "ssim": float(b)}, image) for a, b, image in scores]

    label, count = pairs.whole_label, len(pairs.ids)
    made = context.make(Task("reconstructions", {"data": label}, count, work))
    network = context_features(context)
    rebuilt, original = all_features(network, made.image, count), all_features(network, pairs.picture, count)
    distance = frechet(rebuilt, original, paired=True)
    code = f"{context.version}, autoencoder {autoencoder.name}@{autoencoder.fingerprint}"
    decibels, similarity = ([record[key] for record in made.records] for key in ("psnr", "ssim"))
    names, with_network = _names(context), f"{code}, features {network.name}@{network.digest}"
    results = [
        Result.of(names[0], bootstrap(decibels), "higher", code, label, ceiling=BEST_PSNR),
        Result.of(names[1], bootstrap(similarity), "higher", code, label, ceiling=1.0),
        Result.of(names[2], distance, "lower", with_network, label, ceiling=0.0),
    ]
    worst = np.argsort(decibels, kind="stable")[:SHOWN].tolist()
    title = f"The {len(worst)} with the lowest PSNR of {count:,} pictures"
    examples = [
        Example(f"{decibels[n]:.1f} dB", [(pairs.picture(n), "original"), (made.image(n), "comes back")], group=title)
        for n in worst
    ]
    return MetricResult(results, examples)


def _check(context: EvalContext) -> None:
    size = context.pipe.exported.image_size
    if size < WINDOW:
        raise UserError(f"autoencoder: expected a model of at least {WINDOW} pixels, SSIM's window, found {size}")
    check_images(context, "autoencoder")


AUTOENCODER = Metric(
    "autoencoder",
    "PSNR, SSIM and Fréchet distance of reconstructions",
    _check,
    _score,
    _names,
    compared="Reference: the picture itself.",
)
