"""Image quality of a set: Fréchet distance (FID), KID, precision and recall; of an autoencoder PSNR, SSIM and rFID.

    features = open_features("imagenet-mobilenet")     # or a weights file, or "recogniser" with a scorer's classifier
    a, b = features(images), features(others)          # float64 [image, channel]
    frechet(a, b), kernel_distance(a, b), precision_recall(a, b)

The Fréchet distance is called FID only with the Inception network of 2015. Each distance depends on the network and the
number of images: compare only where both are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from ..autoencoders.features import MOBILENET, Features, load_features, packaged_weights
from ..config import to_dict
from ..errors import UserError
from ..io import sha256
from ..log import progress
from .confidence import Estimate, bootstrap, share
from .context import EvalContext, Example, Metric, MetricResult, Result, Scorer, first_of
from .generate import Made, Outcome, Task
from .inception import FILE, check_inception, load_inception
from .pairs import Pairs, check_pairs, context_pairs
from .reconstruction import BEST_PSNR, frechet_distance, psnr, ssim

CLASSIFIER = "recogniser"
"""The name under which a scorer's classifier serves as the feature network."""
SIDE = 128
"""Pixels per side for ImageNet networks; images are resized to it, antialiased."""
RESAMPLES = 24
"""Bootstrap resamples for the interval of a Fréchet distance."""
BLOCK = 1000
"""Images per KID block; KID is the mean over blocks (Bińkowski et al. 2018)."""
LEAST = 4
"""Fewest images: with fewer there is no third neighbour."""
NEIGHBOUR = 3
"""The ball around an image reaches its third neighbour (Kynkäänniemi et al. 2019)."""
BATCH = 32
SHOWN_DRAWN, SHOWN_REBUILT = 24, 12


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
        return self.network.pooled(x.clamp(-1, 1)).double().cpu().numpy()


def pixels(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """Convert uint8 `[image, row, column, 3]` to float32 `[image, 3, row, column]` in [-1, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return values.to(torch.float32).div(127.5).sub(1.0)


# --- feature networks -------------------------------------------------------------------------------------------------


def check_features(name: str, scorer: Scorer | None = None) -> None:
    """Raise UserError, before any work, for a missing or wrong weights file."""
    if name == CLASSIFIER:
        if scorer is None:
            raise UserError(f'--features: expected "{MOBILENET}" or a file, found "{name}" for data without a scorer')
    elif name != MOBILENET and "inception" in Path(name).name:
        check_inception(Path(name))
    elif name != MOBILENET and not Path(name).is_file():
        raise UserError(
            f'--features: expected "{CLASSIFIER}", "{MOBILENET}", {FILE} or a file with weights of VGG16, ResNet-50 or '
            f"MobileNetV2, found no {name}"
        )
    else:
        load_features(name)


def open_features(name: str, device: torch.device | str = "cpu") -> ImageFeatures:
    """Return the network of a weights file, or "imagenet-mobilenet"."""
    if name != MOBILENET and "inception" in Path(name).name:
        return load_inception(Path(name), device)
    weights = packaged_weights() if name == MOBILENET else Path(name)
    return ImageNetFeatures(load_features(weights), sha256(weights)[:8], device)


def _context_features(context: EvalContext) -> ImageFeatures:
    """Return the feature network of the options; a scorer's classifier is trained first where it does not exist."""
    name = context.options.features
    if name == CLASSIFIER:
        return context.needs_scorer("--features").classifier(context.folder, context.options.judge_steps)
    return open_features(name, context.device)


def distance_name(network: str, fid: str = "FID", other: str = "FD") -> str:
    """Return "FID" for the Inception network of 2015, else a name with the network's."""
    return fid if network.startswith("inception") else f"{other}-{network}"


def _network_name(context: EvalContext) -> str:
    name = context.options.features
    return CLASSIFIER if name == CLASSIFIER else open_features(name).name


def all_features(network: ImageFeatures, picture: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Return float64 `[count, channel]` of images by number, computed batch by batch."""
    parts = []
    with progress(network.name, count) as bar:
        for start in range(0, count, BATCH):
            numbers = range(start, min(count, start + BATCH))
            parts.append(network.features(np.stack([picture(n) for n in numbers])).astype(np.float64))
            bar.advance(len(numbers))
    return np.concatenate(parts)


# --- distances --------------------------------------------------------------------------------------------------------


def frechet(drawn: np.ndarray, real: np.ndarray, resamples: int = RESAMPLES) -> Estimate:
    """Return the squared Fréchet distance of features `[image, channel]`, with a normal interval.

    The margin is 1.96 standard deviations over resamples of both sets. The mean of the resamples is not used: repeated
    images add to the distance, as too few images do.
    """
    generator = np.random.default_rng(0)
    value = frechet_distance(drawn, real)
    resampled = [
        frechet_distance(*(values[generator.integers(0, len(values), len(values))] for values in (drawn, real)))
        for _ in range(resamples)
    ]
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
    blocks = np.array_split(np.arange(len(drawn)), max(1, len(drawn) // block))
    estimates = [_discrepancy(drawn[numbers], real[numbers]) for numbers in blocks]
    value = float(np.mean([value for value, _ in estimates]))
    margin = 1.96 * float(np.sqrt(np.mean([variance for _, variance in estimates]) / len(estimates)))
    return Estimate(value, value - margin, value + margin, len(drawn))


def _discrepancy(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return the unbiased MMD of two sets `[n, channel]`, and its variance by leaving out one item of each set."""
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


# --- drawing: prompts drawn once, compared with the images they belong to ---------------------------------------------


def drawing_task(
    context: EvalContext,
    name: str,
    label: str,
    count: int,
    prompt: Callable[[int], Sequence[str | PIL.Image.Image]],
    record: Callable[[int], dict[str, Any]],
    candidates: int = 1,
) -> Task:
    """Return a task that answers each prompt with an image; image n has the seed `drawing.seed + n` in any batch.

    record      what is stored with image n
    candidates  images drawn per prompt, of which the model keeps one
    """
    drawing = context.drawing

    def work(numbers: Sequence[int]) -> list[Made]:
        requests = [
            replace(context.request(prompt(n)), draw="force", max_tokens=0, seed=drawing.seed + n) for n in numbers
        ]
        replies = context.pipe.replies(requests, candidates)
        return [Made(record(n), np.asarray(reply.images[0])) for n, reply in zip(numbers, replies, strict=True)]

    return Task(name, {"data": label, "drawing": to_dict(drawing)}, count, work)


def draw_prompts(context: EvalContext, name: str, label: str, ids: Sequence[str], prompts: Sequence[str]) -> Outcome:
    """Draw each prompt once, or read the images drawn before."""
    seed = context.drawing.seed
    task = drawing_task(
        context,
        name,
        label,
        len(prompts),
        lambda n: [prompts[n]],
        lambda n: {"id": ids[n], "prompt": prompts[n], "seed": seed + n},
        context.drawing.candidates,
    )
    return context.make(task)


def drawn_pairs(context: EvalContext) -> tuple[Pairs, Outcome]:
    """Return the pairs and the images drawn for their prompts, shared by `drawing` and `clip`."""
    pairs = context_pairs(context)
    return pairs, draw_prompts(context, "drawings", pairs.label, pairs.ids, pairs.prompts)


def _check_drawing(context: EvalContext) -> None:
    check_pairs(context, "drawing", LEAST)
    check_features(context.options.features, context.scorer)


def _drawing_titles(network: str) -> tuple[str, str, str, str]:
    return distance_name(network), distance_name(network, "KID", "KD"), "precision", "recall"


def _distances(a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES) -> list[Estimate]:
    return [frechet(a, b, resamples), kernel_distance(a, b), *precision_recall(a, b)]


def _score_drawing(context: EvalContext) -> MetricResult:
    pairs, drawn = drawn_pairs(context)
    network, count = _context_features(context), len(pairs.ids)
    a, b = all_features(network, drawn.image, count), all_features(network, pairs.picture, count)
    ceilings: list[float | None] = [None] * 4
    if context.options.captions is None:
        others = context.needs_scorer("drawing").pairs(2 * count, context.pipe.exported.image_size)
        c = all_features(network, lambda n: others.picture(count + n), count)
        ceilings = [estimate.value for estimate in _distances(c, b, 2)]
    implementation = f"{context.version}, features {network.name}@{network.digest}"
    numbers = zip(_drawing_titles(network.name), _distances(a, b), ceilings, strict=True)
    results = [
        Result.of(
            title,
            estimate,
            "higher" if title in ("precision", "recall") else "lower",
            implementation,
            pairs.whole_label,
            ceiling=ceiling,
        )
        for title, estimate, ceiling in numbers
    ]
    title = first_of(count, SHOWN_DRAWN, "drawings")
    examples = [
        Example(pairs.prompts[n], [(drawn.image(n), "drawn"), (pairs.picture(n), "real")], group=title)
        for n in range(min(SHOWN_DRAWN, count))
    ]
    return MetricResult(results, examples)


DRAWING = Metric(
    "drawing",
    "Fréchet distance, KID, precision and recall of drawings",
    _check_drawing,
    _score_drawing,
    lambda context: _drawing_titles(_network_name(context)),
    True,
    "Reference: other real pictures of the bundled world, as many, in place of the drawings, which can pass it.",
)


# --- autoencoder: what it keeps of images, without the model ----------------------------------------------------------


def _check_autoencoder(context: EvalContext) -> None:
    check_pairs(context, "autoencoder", LEAST)
    check_features(context.options.features, context.scorer)


def _autoencoder_titles(network: str) -> tuple[str, str, str]:
    return "PSNR in dB", "SSIM", distance_name(network, "rFID", "rFD")


def _score_autoencoder(context: EvalContext) -> MetricResult:
    pairs, autoencoder = context_pairs(context), context.pipe.exported.autoencoder

    def work(numbers: Sequence[int]) -> list[Made]:
        pictures = np.stack([pairs.picture(n) for n in numbers])
        rebuilt = autoencoder.decode(autoencoder.encode(pictures))
        scores = zip(psnr(pictures, rebuilt), ssim(pictures, rebuilt), rebuilt, strict=True)
        return [Made({"psnr": float(a), "ssim": float(b)}, image) for a, b, image in scores]

    label, count = pairs.whole_label, len(pairs.ids)
    made = context.make(Task("reconstructions", {"data": label}, count, work))
    network = _context_features(context)
    distance = frechet(all_features(network, made.image, count), all_features(network, pairs.picture, count))
    implementation = f"{context.version}, autoencoder {autoencoder.name}@{autoencoder.fingerprint}"
    decibels, similarity = ([record[key] for record in made.records] for key in ("psnr", "ssim"))
    titles = _autoencoder_titles(network.name)
    seen = f"{implementation}, features {network.name}@{network.digest}"
    results = [
        Result.of(titles[0], bootstrap(decibels), "higher", implementation, label, ceiling=BEST_PSNR),
        Result.of(titles[1], bootstrap(similarity), "higher", implementation, label, ceiling=1.0),
        Result.of(titles[2], distance, "lower", seen, label, ceiling=0.0),
    ]
    worst = np.argsort(decibels, kind="stable")[:SHOWN_REBUILT].tolist()
    title = f"The {len(worst)} with the lowest PSNR of {count:,} pictures"
    examples = [
        Example(f"{decibels[n]:.1f} dB", [(pairs.picture(n), "original"), (made.image(n), "comes back")], group=title)
        for n in worst
    ]
    return MetricResult(results, examples)


AUTOENCODER = Metric(
    "autoencoder",
    "PSNR, SSIM and Fréchet distance of reconstructions",
    _check_autoencoder,
    _score_autoencoder,
    lambda context: _autoencoder_titles(_network_name(context)),
    compared="Reference: the picture itself.",
)
