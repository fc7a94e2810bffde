"""Distances between sets of images: Fréchet distance (FID), KID, precision and recall, and the networks they need.

    network = open_features("imagenet-mobilenet")     # or a weights file, or "recogniser" with a scorer's classifier
    a, b = network.features(images), network.features(others)      # float64 [image, channel]
    frechet(a, b), kernel_distance(a, b), precision_recall(a, b)

The Fréchet distance is called FID only with the Inception network of 2015. Each distance depends on the network and the
number of images: compare only where both are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autoencoders.features import MOBILENET, Features, load_features, packaged_weights
from ..errors import UserError
from ..io import sha256
from ..log import progress
from .confidence import Estimate, share
from .context import EvalContext
from .pairs import check_pairs

CLASSIFIER = "recogniser"  # the name under which a scorer's classifier serves as the feature network
SIDE = 128  # pixels per side for ImageNet networks; images are resized to it, antialiased
RESAMPLES = 24  # bootstrap resamples for the interval of a Fréchet distance
BLOCK = 1000  # images per KID block; KID is the mean over blocks (Bińkowski et al. 2018)
LEAST = 4  # fewest images: with fewer there is no third neighbour
NEIGHBOUR = 3  # the ball around an image reaches its third neighbour (Kynkäänniemi et al. 2019)
BATCH = 32
FID_FILE = "weights-inception-2015-12-05-6726825d.pth"
FID_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FID_FILE}"


# --- distances --------------------------------------------------------------------------------------------------------


def frechet_distance(features_a: np.ndarray | Tensor, features_b: np.ndarray | Tensor) -> float:
    """Return the squared Fréchet distance of the Gaussians with the means and covariances of two sets.

    `|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))` of features `[image, channel]` (Heusel et al. 2017). Raises
    ValueError for fewer than two images in a set, channels that differ, or values that are not finite.
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
    # With A = P'P and B = Q'Q the eigenvalues of (A B)^(1/2) are the singular values of P Q'. The root of the product
    # A B would turn rounding errors of 1e-16 into ones of 1e-8 wherever it is singular.
    p, q = factors
    cross = np.linalg.svd(p @ q.T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.square(p).sum() + np.square(q).sum() - 2 * cross
    return max(0.0, float(distance))


def frechet(drawn: np.ndarray, real: np.ndarray, resamples: int = RESAMPLES, paired: bool = False) -> Estimate:
    """Return the squared Fréchet distance of features `[image, channel]`, with a normal interval.

    The margin is 1.96 standard deviations over resamples of both sets, of the same images if they are `paired`. The
    mean of the resamples is not used: repeated images add to the distance, as too few images do.
    """
    generator = np.random.default_rng(0)
    value = frechet_distance(drawn, real)
    resampled = []
    for _ in range(resamples):
        a, b = (generator.integers(0, len(values), len(values)) for values in (drawn, real))
        resampled.append(frechet_distance(drawn[a], real[a if paired else b]))
    margin = 1.96 * float(np.std(resampled, ddof=1))
    return Estimate(value, max(0.0, value - margin), value + margin, len(drawn))


def kernel_distance(drawn: np.ndarray, real: np.ndarray, block: int = BLOCK) -> Estimate:
    """Return KID: the unbiased squared MMD with the kernel `(x.y / channels + 1)^3`; it may be negative.

    Sets of more than `block` images are split into blocks and the result is their mean. The interval is a jackknife.
    Raises ValueError for sets of different sizes or fewer than 3 images.
    """
    if len(drawn) != len(real) or len(drawn) < 3:
        raise ValueError(
            f"kernel_distance: expected two sets of equal size, 3 or more, found {len(drawn)}, {len(real)}"
        )
    values, variances = [], []
    for numbers in np.array_split(np.arange(len(drawn)), max(1, len(drawn) // block)):
        x, y = drawn[numbers], real[numbers]
        n, channels = x.shape
        kernels = [(a @ b.T / channels + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        inner = [kernel.sum(1) - kernel.diagonal() for kernel in kernels[:2]]
        cross = kernels[2].sum()
        values.append(float(sum(rows.sum() for rows in inner) / (n * (n - 1)) - 2 * cross / n**2))
        variance = 0.0  # by leaving out one image of each set
        for rows, other, sums in ((inner[0], inner[1], kernels[2].sum(1)), (inner[1], inner[0], kernels[2].sum(0))):
            without = (rows.sum() - 2 * rows) / ((n - 1) * (n - 2)) + other.sum() / (n * (n - 1))
            without -= 2 * (cross - sums) / (n * (n - 1))
            variance += (n - 1) / n * np.square(without - without.mean()).sum()
        variances.append(float(variance))
    value = float(np.mean(values))
    margin = 1.96 * float(np.sqrt(np.mean(variances) / len(variances)))
    return Estimate(value, value - margin, value + margin, len(drawn))


def precision_recall(drawn: np.ndarray, real: np.ndarray) -> tuple[Estimate, Estimate]:
    """Return the share of drawn images inside the ball of a real one, and of real ones inside that of a drawn one.

    Raises ValueError where a set has no `NEIGHBOUR`-th neighbour.
    """
    if min(len(drawn), len(real)) <= NEIGHBOUR:
        raise ValueError(f"precision_recall: expected more than {NEIGHBOUR} pictures, found {len(drawn)}, {len(real)}")
    return share(_within(drawn, real)), share(_within(real, drawn))


def _within(points: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Return bool `[n]`: the points inside any ball that reaches from `around` to its `NEIGHBOUR`-th neighbour."""
    exact = "donot_use_mm_for_euclid_dist"
    centres = torch.from_numpy(np.ascontiguousarray(around))
    radii = torch.cat(
        [torch.cdist(part, centres, compute_mode=exact).kthvalue(NEIGHBOUR + 1).values for part in centres.split(BLOCK)]
    )
    parts = torch.from_numpy(np.ascontiguousarray(points)).split(BLOCK)
    return torch.cat([(torch.cdist(part, centres, compute_mode=exact) <= radii).any(1) for part in parts]).numpy()


# --- feature networks -------------------------------------------------------------------------------------------------


class ImageFeatures(Protocol):
    """A feature network. Its name and the digest of its weights accompany every number."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return float64 `[image, channel]` of uint8 images `[image, row, column, 3]`."""


class ImageNetFeatures:
    """An ImageNet network of `autoencoders.features`, at `SIDE` pixels."""

    def __init__(self, network: Features, digest: str, device: torch.device | str) -> None:
        self.network, self.name, self.digest, self.device = network.to(device), network.name, digest, device

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        x = pixels(images).to(self.device)
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        return self.network.pooled(x.clamp(-1, 1)).cpu().double().numpy()


class InceptionFeatures:
    """FID's network."""

    name = "inception-2015-12-05"

    def __init__(self, network: Inception, digest: str) -> None:
        self.network, self.digest = network.eval().requires_grad_(False), digest

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        device = next(self.network.parameters()).device
        return self.network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device)).cpu().double().numpy()


def pixels(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """Convert uint8 `[image, row, column, 3]` to float32 `[image, 3, row, column]` in [-1, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return values.to(torch.float32).div(127.5).sub(1.0)


def check_images(context: EvalContext, metric: str) -> None:
    """Raise UserError, before any work, for too few images, or a missing or wrong weights file."""
    check_pairs(context, metric, LEAST)
    name = context.options.features
    if name == CLASSIFIER:
        if context.scorer is None:
            raise UserError(f'--features: expected "{MOBILENET}" or a file, found "{name}" for data without a scorer')
    elif name != MOBILENET and "inception" not in Path(name).name and not Path(name).is_file():
        raise UserError(
            f'--features: expected "{CLASSIFIER}", "{MOBILENET}", {FID_FILE} or a file with weights of VGG16, '
            f"ResNet-50 or MobileNetV2, found no {name}"
        )
    else:
        open_features(name)


def open_features(name: str, device: torch.device | str = "cpu") -> ImageFeatures:
    """Return the network of a weights file, or "imagenet-mobilenet". Raises UserError for a missing or wrong file."""
    path = packaged_weights() if name == MOBILENET else Path(name)
    if name == MOBILENET or "inception" not in path.name:
        return ImageNetFeatures(load_features(path), sha256(path)[:8], device)
    expected = FID_FILE.removesuffix(".pth").rpartition("-")[2]
    if not path.is_file():
        raise UserError(
            f"{path}: expected {FID_FILE} (SHA-256 {expected}...), found no file; people get it from {FID_URL}"
        )
    digest = sha256(path)
    if not digest.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}..., found {digest[:16]}...; people get it from {FID_URL}")
    network = Inception()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("fc.")})
    return InceptionFeatures(network.to(device), digest[:8])


def context_features(context: EvalContext) -> ImageFeatures:
    """Return the feature network of the options; a scorer's classifier is trained first where it does not exist."""
    name = context.options.features
    if name == CLASSIFIER:
        return context.needs_scorer("--features").classifier(context.folder, context.options.judge_steps)
    return open_features(name, context.device)


def distance_name(context: EvalContext, fid: str = "FID", other: str = "FD") -> str:
    """Return "FID" for the Inception network of 2015, else a name with the network's."""
    name = context.options.features
    name = name if name == CLASSIFIER else open_features(name).name
    return fid if name == InceptionFeatures.name else f"{other}-{name}"


def all_features(network: ImageFeatures, picture: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Return float64 `[count, channel]` of images by number, computed batch by batch."""
    parts = []
    with progress(network.name, count, unit="images") as bar:
        for start in range(0, count, BATCH):
            numbers = range(start, min(count, start + BATCH))
            parts.append(network.features(np.stack([picture(n) for n in numbers])).astype(np.float64))
            bar.advance(len(numbers))
    return np.concatenate(parts)


# --- Inception-v3 of FID: TensorFlow's graph of 2015-12-05, with the names of torch-fidelity's file -------------------

Layer = tuple[int, int | tuple[int, int]] | tuple[int, int, int]
"""Output channels and kernel of a convolution, and its stride if it has one."""
Branches = dict[str, list[Layer]]
ACROSS, DOWN = (1, 7), (7, 1)
FORK = 0  # in place of a kernel: two convolutions, 1 x 3 and 3 x 1, of the same input


class Convolution(nn.Module):
    """Convolution, norm and ReLU; same padding, or none where it strides."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int, padded: bool) -> None:
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions with concatenated outputs.

    branches   the layers of each by its name in the file; "branch_pool" reads the pooled input
    pool       "average" (without the padding) or "max"; "shrink": the input itself, halved, is a further output
    """

    def __init__(self, inputs: int, branches: Branches, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.steps: list[list[list[str]]] = []  # by branch and layer: one name, or two of a fork
        self.channels = inputs if pool == "shrink" else 0
        for name, layers in branches.items():
            before, steps = inputs, []
            for number, (outputs, kernel, *strides) in enumerate(layers, 1):
                label = name if len(layers) == 1 else f"{name}_{number}"
                ends = {label: kernel} if kernel != FORK else {f"{label}a": (1, 3), f"{label}b": (3, 1)}
                for end, size in ends.items():
                    self.add_module(end, Convolution(before, outputs, size, strides[0] if strides else 1, not strides))
                before = outputs * len(ends)
                steps.append(list(ends))
            self.steps.append(steps)
            self.channels += before

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.steps:
            y = x
            if steps == [["branch_pool"]]:
                average = self.pool == "average"
                y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else F.max_pool2d(x, 3, 1, 1)
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "shrink":
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, 1)


def _inception_blocks() -> dict[str, tuple[Branches, str]]:
    """Return the branches and the pool of each block, by the end of its name."""

    def a(pooled: int) -> Branches:
        return {
            "branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pooled, 1)],
        }

    def c(width: int) -> Branches:
        return {
            "branch1x1": [(192, 1)],
            "branch7x7": [(width, 1), (width, ACROSS), (192, DOWN)],
            "branch7x7dbl": [(width, 1), (width, DOWN), (width, ACROSS), (width, DOWN), (192, ACROSS)],
            "branch_pool": [(192, 1)],
        }

    b: Branches = {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
    d: Branches = {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, ACROSS), (192, DOWN), (192, 3, 2)],
    }
    e: Branches = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, FORK)],
        "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)],
        "branch_pool": [(192, 1)],
    }
    blocks = {"5b": (a(32), "average"), "5c": (a(64), "average"), "5d": (a(64), "average"), "6a": (b, "shrink")}
    blocks |= {f"6{name}": (c(width), "average") for name, width in zip("bcde", (128, 160, 160, 192), strict=True)}
    return {**blocks, "7a": (d, "shrink"), "7b": (e, "average"), "7c": (e, "max")}


class Inception(nn.Module):
    """Inception-v3 without its classifier: uint8 `[image, 3, row, column]` to float32 `[image, 2048]`.

    Not torchvision's: average pools leave the padding out, the last block takes a maximum, images are enlarged as
    TensorFlow 1 did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, 1, False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 1, True)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, 1, False)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, 1, False)
        channels = 192
        for name, (branches, pool) in _inception_blocks().items():
            block = Mixed(channels, branches, pool)
            self.add_module(f"Mixed_{name}", block)
            channels = block.channels

    def forward(self, images: Tensor) -> Tensor:
        x = (enlarged(images.float(), 299) - 128) / 128
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean((2, 3))


def enlarged(x: Tensor, side: int) -> Tensor:
    """Resize bilinearly as TensorFlow 1: output pixel n is at `n * size / side`, no half-pixel shift, no smoothing."""
    for dimension in (-2, -1):
        size = x.shape[dimension]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
        low = at.floor().long().clamp_max(size - 1)
        high = (low + 1).clamp_max(size - 1)
        weight = (at - low).to(x.dtype)
        weight = weight[:, None] if dimension == -2 else weight
        below = x.index_select(dimension, low)
        x = below + (x.index_select(dimension, high) - below) * weight
    return x
