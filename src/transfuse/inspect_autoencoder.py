"""`transfuse autoencoder inspect`: one page with an image autoencoder's quality, latents and codes, and a JSON file.

report = inspect_autoencoder(autoencoder, images, names, Path("runs/kl/inspection"), held_apart={"unseen": others})

index.html      figures, originals next to reconstructions, latents, use of the codebook
report.json     every figure, and those of each image
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .autoencoders import Autoencoder
from .autoencoders.features import Features
from .charts import ACCENT, WARM, histogram, line_chart
from .data.bundled import World
from .errors import UserError
from .evaluation.confidence import Estimate
from .evaluation.reconstruction import (
    BEST_PSNR,
    CARRIES_NOTHING,
    ChannelLoss,
    Reconstruction,
    channel_images,
    channel_losses,
    evaluate_reconstruction,
    psnr,
)
from .images import fit, image_files, read_image
from .io import atomic_write
from .log import ProgressTask, logger, progress
from .recipes.autoencoders import ImagesConfig
from .report import (
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Charts,
    Details,
    Numbers,
    Page,
    Section,
    Table,
    Text,
    leaves,
    percent,
    write_page,
)
from .train_autoencoder import unseen_world
from .version import __version__

BATCH = 32
"""images encoded at once"""
WORST, REGULAR = 8, 12
"""images shown: those with the lowest PSNR, and a sample evenly spread over all"""
AMPLIFIED = 5
"""factor by which differences are enlarged"""
CHANNELS_SHOWN = 16
"""more channels are folded away"""
CURVE_POINTS = 400

_FIGURES = (
    f"Means over images with 95 % intervals. PSNR and SSIM compare pixel with pixel; the reference is that of equal "
    f"images, {BEST_PSNR:g} dB and 1."
)
_APART = (
    "The same measures on further images. The difference is their PSNR minus that of the first row, with its 95 % "
    "interval: below 0, they are reconstructed worse."
)
_WORST = (
    "Those with the lowest PSNR, the worst first. The difference is the reconstruction minus the original, enlarged "
    f"{AMPLIFIED} times around grey: grey is equal."
)
_REGULAR = "Spread evenly over all images in their order."
_SPREAD = f"PSNR is at most {BEST_PSNR:g} dB, that of equal images."
_LATENTS = (
    "The mean and the standard deviation of each channel over all images and places. A model of latents trains best "
    "where they are near 0 and 1. The dB lost without a channel is the fall in PSNR when its values are replaced by "
    "their mean, or by noise of their mean and deviation, with 95 % intervals."
)
_CODEBOOK = (
    "How often each code is used. Perplexity is the number of codes that would carry as much if all were used equally."
)


def inspect_autoencoder(
    autoencoder: Autoencoder,
    images: np.ndarray,
    names: list[str],
    out: Path,
    features: Features | None = None,
    held_apart: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Metric uint8 images `[image, row, column, 3]`, named one by one, and write `index.html` and `report.json`.

    held_apart   further images by the name of their set, measured for comparison

    Returns the content of `report.json`.

    Raises:
        ValueError: images that cannot be measured, or names that do not fit.
        UserError: a folder that cannot be written.
    """
    if len(names) != len(images):
        raise ValueError(f"names: expected one for each of {len(images)} images, found {len(names)}")
    measured = _measured(autoencoder, images, features, "reconstruct")
    others = {name: _measured(autoencoder, more, features, name) for name, more in (held_apart or {}).items()}
    channels = _channels(autoencoder, images)
    report = {
        "version": __version__,
        "autoencoder": measured.name,
        "factor": autoencoder.factor,
        "channels": autoencoder.channels,
        "image_size": list(images.shape[1:3]),
        "device": measured.device,
        "threads": torch.get_num_threads(),
        **_figures(measured),
        "held_apart": {
            name: {**_figures(other), **_named("psnr_difference", _difference(measured.psnr, other.psnr))}
            for name, other in others.items()
        },
        "channel_loss_images": channel_images(autoencoder, len(images)),
        "channel_loss": [
            {"db_lost": loss.least, **_named("by_mean", loss.by_mean), **_named("by_noise", loss.by_noise)}
            for loss in channels
        ],
        "empty_channels": _empty(channels),
        "names": list(names),
        "psnr_by_image": measured.psnr_by_image.tolist(),
        "ssim_by_image": measured.ssim_by_image.tolist(),
        "codebook_counts": None if measured.codebook_counts is None else measured.codebook_counts.tolist(),
    }
    for line in _empty(channels):
        logger.info(line)
    order = np.argsort(measured.psnr_by_image, kind="stable")[:WORST]
    spread = np.unique(np.linspace(0, len(images) - 1, min(REGULAR, len(images))).round().astype(int))
    worst, regular = (_cards(autoencoder, images, names, chosen) for chosen in (order, spread))
    page = autoencoder_page(report, measured, channels, worst, regular)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "report.json", lambda path: path.write_text(text))
    except OSError as error:
        raise UserError(f"{out}: inspection not written ({error.strerror or error})") from None
    write_page(out / "index.html", page)
    return report


# --- figures ----------------------------------------------------------------------------------------------------------


def _measured(autoencoder: Autoencoder, images: np.ndarray, features: Features | None, title: str) -> Reconstruction:
    def batches(bar: ProgressTask) -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH):
            yield images[start : start + BATCH]
            bar.advance(min(BATCH, len(images) - start))

    with progress(title, len(images), unit="images") as bar:
        return evaluate_reconstruction(autoencoder, batches(bar), features)


def _channels(autoencoder: Autoencoder, images: np.ndarray) -> list[ChannelLoss]:
    decoded = channel_images(autoencoder, len(images)) * (1 + 2 * autoencoder.channels)
    with progress("channels", decoded, unit="images") as bar:
        return channel_losses(autoencoder, images, BATCH, bar.advance)


def _empty(channels: Sequence[ChannelLoss]) -> list[str]:
    """Return one line for each channel that carries nothing."""
    return [
        f"channel {number} carries nothing: without it PSNR falls by {loss.least:.2f} dB, less than {CARRIES_NOTHING}"
        for number, loss in enumerate(channels)
        if loss.least < CARRIES_NOTHING
    ]


def _figures(measured: Reconstruction) -> dict[str, Any]:
    return {
        "images": measured.count,
        **_named("psnr", measured.psnr),
        **_named("ssim", measured.ssim),
        **_named("l1", measured.l1),
        "frechet": measured.frechet,
        "features": measured.features,
        "codebook_size": measured.codebook_size,
        "codebook_use": measured.codebook_use,
        "codebook_perplexity": measured.codebook_perplexity,
        "latent_mean": measured.latent_mean.tolist(),
        "latent_std": measured.latent_std.tolist(),
        "encode_images_per_second": measured.encode_images_per_second,
        "decode_images_per_second": measured.decode_images_per_second,
    }


def _named(name: str, measured: Estimate) -> dict[str, Any]:
    return {name: measured.value, f"{name}_interval": [measured.low, measured.high]}


def _difference(first: Estimate, other: Estimate) -> Estimate:
    """Return `other - first` of two independent means; the interval combines theirs (Zou and Donner 2008)."""
    value = other.value - first.value
    below = math.hypot(other.value - other.low, first.high - first.value)
    above = math.hypot(other.high - other.value, first.value - first.low)
    return Estimate(value, value - below, value + above, other.count)


def amplified(original: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Return `AMPLIFIED` times the difference of two uint8 images around grey 128, clipped."""
    difference = rebuilt.astype(np.int16) - original
    return (128 + AMPLIFIED * difference).clip(0, 255).astype(np.uint8)


def inspected_images(source: str, size: int, count: int) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Return uint8 images `[n, size, size, 3]` to inspect, a name for each, and further sets to compare with.

    source "world": held-out combinations of the emoji scenes, and scenes of nouns that the presets' training never
    shows. Otherwise a file or folder; unreadable images and images smaller than `size` are logged and left out.
    """
    if source == "world":
        trained = replace(ImagesConfig().world, size=size)
        heldout, unseen = World(replace(trained, split="heldout")), unseen_world(trained)
        sets = [np.stack([w.render(w.scene(number)) for number in range(count)]) for w in (heldout, unseen)]
        return sets[0], [f"scene {number}" for number in range(count)], {"nouns never trained on": sets[1]}
    images: list[np.ndarray] = []
    names: list[str] = []
    for path in image_files(Path(source)):
        try:
            images.append(fit(read_image(path), size, smallest=size))
            names.append(path.name)
        except UserError as error:
            logger.info(f"left out: {error}")
        except ValueError as error:
            logger.info(f"left out: {path}: {error}")
        if len(images) == count:
            break
    if not images:
        raise UserError(f"{source}: expected images of at least {size} pixels, found none that can be used")
    return np.stack(images), names, {}


# --- the page ---------------------------------------------------------------------------------------------------------


def autoencoder_page(
    report: dict[str, Any],
    reconstruction: Reconstruction,
    channels: Sequence[ChannelLoss],
    worst: list[Card],
    regular: list[Card],
) -> Page:
    """Return the page: quality and latent size first, then images, then channels, codes and settings."""
    rows, columns = report["image_size"]
    lead = f"{report['images']:,} images of {rows} × {columns} pixels, encoded and decoded again."
    charts = [
        ("PSNR by image, dB; the line is the mean", histogram(report["psnr_by_image"], "dB")),
        ("SSIM by image; the line is the mean", histogram(report["ssim_by_image"], "SSIM")),
    ]
    sections = [Section("Held apart", _APART, [_apart(report)])] if report["held_apart"] else []
    sections += [
        Section(f"The {len(worst)} worst", _WORST, [Cards(worst, "", "wide")]),
        Section("A regular sample", _REGULAR, [Cards(regular, "", "wide")]),
        Section("Image by image", _SPREAD, [Charts(charts), _by_image(report)]),
        Section("Latents", _LATENTS, _latents(reconstruction, channels)),
    ]
    if reconstruction.codebook_counts is not None:
        sections.append(Section("Codebook", _CODEBOOK, _codebook(reconstruction)))
    title = f"Autoencoder {reconstruction.name}"
    return Page(title, lead, [*_summary(report), Text(_FIGURES)], sections, _provenance(report))


def _summary(report: dict[str, Any]) -> list[Block]:
    threads = report["threads"]
    where = f"on {threads} thread{'' if threads == 1 else 's'}" if report["device"] == "cpu" else report["device"]
    bars = []
    for name, key, reference, better in (
        ("PSNR, dB", "psnr", BEST_PSNR, "higher"),
        ("SSIM", "ssim", 1.0, "higher"),
        ("L1, of 255", "l1", None, "lower"),
    ):
        low, high = report[f"{key}_interval"]
        bars.append(Bar(name, report[key], low, high, None, reference, better, percentage=False))
    numbers = [
        ("Latent", *_latent_size(report)),
        ("Encodes", f"{report['encode_images_per_second']:,.1f}", f"images per second {where}"),
        ("Decodes", f"{report['decode_images_per_second']:,.1f}", f"images per second {where}"),
    ]
    if report["frechet"] is not None:
        note = f"by {report['features']}, over {report['images']:,} images: compare at equal numbers only"
        numbers.append(("Fréchet distance", f"{report['frechet']:.4g}", note))
    if report["codebook_size"] is not None:
        note = f"of {report['codebook_size']:,}; perplexity {report['codebook_perplexity']:,.1f}"
        numbers.append(("Codes used", percent(report["codebook_use"]), note))
    return [Bars(bars, "this autoencoder", "equal images"), Numbers(numbers)]


def _latent_size(report: dict[str, Any]) -> tuple[str, str]:
    """Return the latent's places, and how much smaller it is than the image: in bits for codes, else in numbers."""
    factor, channels, size = report["factor"], report["channels"], report["codebook_size"]
    rows, columns = (side // factor for side in report["image_size"])
    each = f"places of {channels} number{'' if channels == 1 else 's'}"
    if size is None:
        ratio = 3 * factor**2 / channels
        note = f"{each}; {ratio:.3g} times fewer numbers than the image" if ratio > 1 else f"{each}, no fewer"
    else:
        bits = math.log2(size)
        note = f"{each}, or of one code of {bits:.4g} bits"
        note += f"; {24 * factor**2 / bits:.3g} times fewer bits than the image" if bits else ""
    return f"{rows} × {columns}", note


def _cards(autoencoder: Autoencoder, images: np.ndarray, names: Sequence[str], chosen: np.ndarray) -> list[Card]:
    """Return the chosen images with their reconstructions and differences; the PSNR is that of the images shown."""
    with torch.inference_mode():
        decoded = autoencoder.decode(autoencoder.encode(images[chosen]))
    cards = []
    for number, reconstruction in zip(chosen, decoded, strict=True):
        original = images[number]
        triple = [
            (original, "original"),
            (reconstruction, "reconstruction"),
            (amplified(original, reconstruction), f"difference × {AMPLIFIED}"),
        ]
        badge = _decibels(psnr(original[None], reconstruction[None])[0])
        cards.append(Card("", triple, title=names[number], badge=badge))
    return cards


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _decibels(value: float) -> str:
    return f"{value:.2f}\u202fdB"


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _apart(report: dict[str, Any]) -> Table:
    head = ["set", "images", "PSNR, dB", "difference, dB", "SSIM", "L1"]
    head += ["Fréchet"] if report["frechet"] is not None else []
    rows = []
    for name, figures in [("these images", report), *report["held_apart"].items()]:
        row = [name, f"{figures['images']:,}", _with_interval(figures["psnr"], *figures["psnr_interval"]), "\u2013"]
        if "psnr_difference" in figures:
            low, high = figures["psnr_difference_interval"]
            row[-1] = f"{_signed(figures['psnr_difference'], 2)} ({_signed(low, 2)} to {_signed(high, 2)})"
        row += [f"{figures['ssim']:.4f}", f"{figures['l1']:.2f}"]
        rows.append([*row, f"{figures['frechet']:.4g}"] if figures["frechet"] is not None else row)
    return Table(head, rows)


def _by_image(report: dict[str, Any]) -> Details:
    by_image = zip(report["names"], report["psnr_by_image"], report["ssim_by_image"], strict=True)
    rows = [[name, f"{decibels:.2f}", f"{ssim:.4f}"] for name, decibels, ssim in by_image]
    return Details("Every image", [Table(["image", "PSNR, dB", "SSIM"], rows)])


def _latents(reconstruction: Reconstruction, channels: Sequence[ChannelLoss]) -> list[Block]:
    mean, std = reconstruction.latent_mean, reconstruction.latent_std
    rows = [
        [
            f"channel {number}",
            _signed(mean[number], 4),
            f"{std[number]:.4f}",
            *[_with_interval(lost.value, lost.low, lost.high) for lost in (loss.by_mean, loss.by_noise)],
        ]
        for number, loss in enumerate(channels)
    ]
    head = ["", "mean", "standard deviation", "dB lost without it: its mean", "dB lost without it: noise"]
    empty = [Text(f"{line.capitalize()}.") for line in _empty(channels)]
    if len(rows) <= CHANNELS_SHOWN:
        return [*empty, Table(head, rows)]
    summary = (
        f"{len(rows)} channels: means at most {np.abs(mean).max():.3f} from 0, deviations {std.min():.3f} to "
        f"{std.max():.3f}, each worth {min(loss.least for loss in channels):.2f} dB or more."
    )
    return [Text(summary), *empty, Details("Every channel", [Table(head, rows)])]


def _codebook(reconstruction: Reconstruction) -> list[Block]:
    """Return how often each code is used, from the most used to the least."""
    assert reconstruction.codebook_counts is not None
    counts = np.sort(reconstruction.codebook_counts)[::-1]
    shown = np.unique(np.linspace(0, len(counts) - 1, CURVE_POINTS).astype(int))
    even = float(counts.mean())
    curves = [
        ("if all were used equally", [(1.0, 1.0), (float(len(counts)), 1.0)], WARM),
        ("used", [(float(rank) + 1, float(counts[rank] / even)) for rank in shown], ACCENT),
    ]
    rows = [
        ["codes", f"{len(counts):,}"],
        ["never used", f"{int((counts == 0).sum()):,}"],
        ["perplexity", f"{reconstruction.codebook_perplexity:,.1f}"],
        ["the most used", f"{percent(counts[0] / counts.sum())} of all uses"],
        ["uses", f"{int(counts.sum()):,}"],
    ]
    chart = line_chart(curves, "codes, the most used first", logarithmic=True)
    return [Charts([("Use of each code, in parts of an even share", chart)]), Table([], rows)]


def _provenance(report: dict[str, Any]) -> list[Block]:
    long = ("names", "psnr_by_image", "ssim_by_image", "codebook_counts", "channel_loss")
    settings = [
        ["PSNR", f"of each image, peak 255, at most {BEST_PSNR:g} dB; then the mean"],
        ["SSIM", "Wang et al. 2004, Gaussian window of 11 pixels and deviation 1.5, mean of red, green and blue"],
        ["Fréchet distance", report["features"] or "not measured: no feature network was given"],
        ["dB lost without a channel", f"of the first {report['channel_loss_images']:,} images"],
        ["speed", f"batches of {BATCH}, the first left out if there are others; device {report['device']}"],
    ]
    rows = list(leaves({name: value for name, value in report.items() if name not in long}))
    return [Details("Definitions of the measures", [Table([], settings)]), Details("Every number", [Table([], rows)])]
