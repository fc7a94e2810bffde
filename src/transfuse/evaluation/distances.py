"""How far a set of pictures is from another, as a network sees them: Fréchet distance, KID, precision and recall.

    sees = open_features("recogniser" | "imagenet-mobilenet" | a file)
    a, b = sees(images), sees(others)                  # float64 [image, channel]
    frechet(a, b), kernel_distance(a, b), precision_recall(a, b)

Only with the Inception network of 2015 is the Fréchet distance called FID. Any of them depends on the network and the
number of pictures: compare only where both are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from ..autoencoders.features import MOBILENET, Features, load_features, packaged_weights
from ..errors import UserError
from ..io import sha256
from ..log import progress
from .confidence import Estimate, share
from .inception import FILE, check_inception, load_inception
from .recogniser import Recogniser, pixels
from .reconstruction import frechet_distance

RECOGNISER = "recogniser"
SIDE = 128
"""pixels a side at which ImageNet's networks look; pictures are resized to it, antialiased"""
RESAMPLES = 24
"""for the interval of a Fréchet distance"""
BLOCK = 1000
"""pictures whose kernels are found at once; KID is the mean over blocks, as Bińkowski et al. 2018 have it"""
LEAST = 4
"""pictures; fewer have no third neighbour"""
NEIGHBOUR = 3
"""the ball around a picture reaches its third neighbour (Kynkäänniemi et al. 2019)"""
BATCH = 32


class Sees(Protocol):
    """name and digest go with every number."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 `[image, row, column, 3]` -> float64 `[image, channel]`."""


class RecogniserFeatures:
    """What the judge of the bundled world sees."""

    name = RECOGNISER

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser, self.digest = recogniser, recogniser.digest

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.recogniser.features(images).astype(np.float64)


class ImageNetFeatures:
    """An ImageNet network of `autoencoders.features`, at `SIDE` pixels."""

    def __init__(self, features: Features, digest: str, device: torch.device | str) -> None:
        self.features, self.name, self.digest, self.device = features.to(device), features.name, digest, device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        x = pixels(images).to(self.device)
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return self.features.pooled(x.clamp(-1, 1)).double().cpu().numpy()


def check_features(name: str) -> None:
    """Raise UserError, before any work, where a network's file is missing or not what it must be."""
    if name == RECOGNISER:
        return
    if name != MOBILENET and "inception" in Path(name).name:
        check_inception(Path(name))
    elif name != MOBILENET and not Path(name).is_file():
        raise UserError(
            f'--features: expected "{RECOGNISER}", "{MOBILENET}", {FILE} or a file with weights of VGG16, ResNet-50 or '
            f"MobileNetV2, found no {name}"
        )
    else:
        load_features(name)


def features_name(name: str) -> str:
    """What the network of a name or file is called in results, without a judge being trained."""
    return RECOGNISER if name == RECOGNISER else open_features(name).name


def distance_name(network: str, fid: str = "FID", other: str = "FD") -> str:
    """FID only by the network that this name belongs to; else by the network's own."""
    return fid if network.startswith("inception") else f"{other}-{network}"


def open_features(name: str, recogniser: Recogniser | None = None, device: torch.device | str = "cpu") -> Sees:
    """The network of a name or file. `recogniser`: for the name of that judge."""
    if name == RECOGNISER:
        assert recogniser is not None
        return RecogniserFeatures(recogniser)
    if name != MOBILENET and "inception" in Path(name).name:
        return load_inception(Path(name), device)
    weights = packaged_weights() if name == MOBILENET else Path(name)
    return ImageNetFeatures(load_features(weights), sha256(weights)[:8], device)


def all_features(sees: Sees, picture: object, count: int) -> np.ndarray:
    """Of pictures by number, a batch at a time: float64 `[count, channel]`."""
    parts = []
    with progress(sees.name, count) as bar:
        for start in range(0, count, BATCH):
            numbers = range(start, min(count, start + BATCH))
            parts.append(sees(np.stack([picture(n) for n in numbers])))  # type: ignore[operator]
            bar.advance(len(numbers))
    return np.concatenate(parts)


# --- distances --------------------------------------------------------------------------------------------------------


def frechet(drawn: np.ndarray, real: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """The squared Fréchet distance of features `[image, channel]`, with a normal interval.

    Its width is 1.96 standard deviations over resamples of both sets; their mean is not used, since drawing a picture
    twice adds to the distance, as too few pictures do.
    """
    generator = np.random.default_rng(0)
    value = frechet_distance(drawn, real)
    found = [
        frechet_distance(*(some[generator.integers(0, len(some), len(some))] for some in (drawn, real)))
        for _ in range(resamples)
    ]
    margin = 1.96 * float(np.std(found, ddof=1))
    return Estimate(value, max(0.0, value - margin), value + margin, len(drawn))


def kernel_distance(drawn: np.ndarray, real: np.ndarray) -> Estimate:
    """KID: the squared maximum mean discrepancy with the kernel `(x.y / channels + 1)^3`, without bias; may be below 0.

    Sets of more than `BLOCK` pictures are cut into blocks, of which it is the mean. The interval is the jackknife's.
    """
    if len(drawn) != len(real) or len(drawn) < 3:
        raise ValueError(
            f"kernel_distance: expected two sets of equal size, 3 or more, found {len(drawn)}, {len(real)}"
        )
    blocks = np.array_split(np.arange(len(drawn)), max(1, len(drawn) // BLOCK))
    found = [_discrepancy(drawn[block], real[block]) for block in blocks]
    value = float(np.mean([value for value, _ in found]))
    margin = 1.96 * float(np.sqrt(np.mean([variance for _, variance in found]) / len(found)))
    return Estimate(value, value - margin, value + margin, len(drawn))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The unbiased estimate for `[n, channel]` and `[n, channel]`, and its variance by leaving out one of each set."""
    n, channels = x.shape
    kernels = [(a @ b.T / channels + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    inner = [kernel.sum(1) - kernel.diagonal() for kernel in kernels[:2]]
    cross = kernels[2].sum()
    value = sum(rows.sum() for rows in inner) / (n * (n - 1)) - 2 * cross / n**2
    variance = 0.0
    for rows, other, sums in ((inner[0], inner[1], kernels[2].sum(1)), (inner[1], inner[0], kernels[2].sum(0))):
        without = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2)) + other.sum() / (n * (n - 1))
        without -= 2 * (cross - sums) / (n * (n - 1))
        variance += (n - 1) / n * np.square(without - without.mean()).sum()
    return float(value), float(variance)


def precision_recall(drawn: np.ndarray, real: np.ndarray) -> tuple[Estimate, Estimate]:
    """The share of drawn pictures within the ball of some real one, and of real ones within that of a drawn one."""
    if min(len(drawn), len(real)) <= NEIGHBOUR:
        raise ValueError(f"precision_recall: expected more than {NEIGHBOUR} pictures, found {len(drawn)}, {len(real)}")
    return share(_within(drawn, real)), share(_within(real, drawn))


def _within(points: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Which of the points `[n, channel]` lie within a ball of `around`, that reaches its `NEIGHBOUR`-th neighbour."""
    centres = torch.from_numpy(np.ascontiguousarray(around))
    radii = torch.cat(
        [
            torch.cdist(some, centres, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(NEIGHBOUR + 1).values
            for some in centres.split(BLOCK)
        ]
    )
    parts = torch.from_numpy(np.ascontiguousarray(points)).split(BLOCK)
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([(torch.cdist(some, centres, compute_mode=exact) <= radii).any(1) for some in parts]).numpy()
