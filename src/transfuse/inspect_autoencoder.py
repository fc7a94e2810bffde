"""`transfuse autoencoder inspect`: one page with an image autoencoder's quality, latents and codes, and a JSON file.

report = inspect_autoencoder(autoencoder, images, names, Path("runs/kl/inspection"), held_apart={"unseen": others})

index.html      quality next to that of a plain resize, originals next to reconstructions, what each channel carries
report.json     every figure, and those of each image
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .autoencoders import Autoencoder, Pixels
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
from .io import atomic_json
from .log import logger, progress
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
    with_interval,
    write_page,
)
from .train_autoencoder import unseen_world
from .version import __version__

BATCH = 32  # images encoded at once
WORST, REGULAR = 8, 12  # images shown: those with the lowest PSNR, and a sample evenly spread over all
AMPLIFIED = 5  # factor by which differences are enlarged
CHANNELS_SHOWN = 16  # more channels are folded away
CURVE_POINTS = 400


@dataclass(unsafe_hash=True)
class Resized(Pixels):
    """The plain alternative to an autoencoder: images shrunk to `size` (rows, columns) and enlarged again."""

    size: tuple[int, int] = (1, 1)

    def decode(self, latents: Tensor) -> np.ndarray:
        images = super().decode(latents)
        lanczos, (rows, columns) = PIL.Image.Resampling.LANCZOS, images.shape[1:3]
        small = [PIL.Image.fromarray(image).resize(self.size[::-1], lanczos) for image in images]
        return np.stack([np.asarray(image.resize((columns, rows), lanczos)) for image in small])


def plain_resize(autoencoder: Autoencoder, rows: int, columns: int) -> Resized | None:
    """Return the resize that keeps as many numbers of an image as a latent has; None if that is all of them.

    Numbers of 8 bits are counted for a codebook, whose latent is as many bits as its codes need.
    """
    codes = getattr(autoencoder, "codebook_size", None)
    per_place = autoencoder.channels if codes is None else math.log2(codes) / 8
    side = math.sqrt(per_place / 3) / autoencoder.factor
    if side >= 1:
        return None
    return Resized("resize", size=(max(1, round(side * rows)), max(1, round(side * columns))))


def inspect_autoencoder(
    autoencoder: Autoencoder,
    images: np.ndarray,
    names: list[str],
    out: Path,
    features: Features | None = None,
    held_apart: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Measure uint8 images `[image, row, column, 3]`; write `index.html` and `report.json`, whose content is returned.

    names        one for each image
    held_apart   further images by the name of their set, measured for comparison

    Raises ValueError for images that cannot be measured, and UserError for a folder that cannot be written.
    """
    if len(names) != len(images):
        raise ValueError(f"names: expected one for each of {len(images)} images, found {len(names)}")
    resize = plain_resize(autoencoder, *images.shape[1:3])
    measured = _measured(autoencoder, images, features, "reconstruct")
    report: dict[str, Any] = {
        "version": __version__,
        "autoencoder": measured.name,
        "factor": autoencoder.factor,
        "channels": autoencoder.channels,
        "image_size": list(images.shape[1:3]),
        "device": measured.device,
        "threads": torch.get_num_threads(),
        **_figures(measured),
        "resize": None,
        "held_apart": {},
    }
    if resize is not None:
        report["resize"] = {"size": list(resize.size), **_quality(_measured(resize, images, features, "resize"))}
    for name, more in (held_apart or {}).items():
        other = _measured(autoencoder, more, features, name)
        difference = with_interval("psnr_difference", _difference(measured.psnr, other.psnr))
        plain = None if resize is None else _quality(_measured(resize, more, None, "resize"))
        report["held_apart"][name] = {**_figures(other), **difference, "resize": plain}
    encoded = channel_images(autoencoder, len(images))
    with progress("channels", encoded * (1 + 2 * autoencoder.channels), unit="images") as bar:
        channels = channel_losses(autoencoder, images, BATCH, bar.advance)
    empty = [
        f"channel {number} carries nothing: without it PSNR falls by {loss.least:.2f} dB, less than {CARRIES_NOTHING}"
        for number, loss in enumerate(channels)
        if loss.least < CARRIES_NOTHING
    ]
    for line in empty:
        logger.info(line)
    report |= {
        "channel_loss_images": encoded,
        "channel_loss": [
            {"db_lost": loss.least} | with_interval("by_mean", loss.by_mean) | with_interval("by_noise", loss.by_noise)
            for loss in channels
        ],
        "empty_channels": empty,
        "names": list(names),
        "psnr_by_image": measured.psnr_by_image.tolist(),
        "ssim_by_image": measured.ssim_by_image.tolist(),
        "codebook_counts": None if measured.codebook_counts is None else measured.codebook_counts.tolist(),
    }
    order = np.argsort(measured.psnr_by_image, kind="stable")[:WORST]
    spread = np.unique(np.linspace(0, len(images) - 1, min(REGULAR, len(images))).round().astype(int))
    worst, regular = (_cards(autoencoder, resize, images, names, chosen) for chosen in (order, spread))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: inspection not written ({error.strerror or error})") from None
    atomic_json(out / "report.json", report, allow_nan=False)
    write_page(out / "index.html", _page(report, channels, worst, regular))
    return report


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


# --- figures ----------------------------------------------------------------------------------------------------------


def _measured(autoencoder: Autoencoder, images: np.ndarray, features: Features | None, title: str) -> Reconstruction:
    with progress(title, len(images), unit="images") as bar:

        def batches() -> Iterator[np.ndarray]:
            for start in range(0, len(images), BATCH):
                yield images[start : start + BATCH]
                bar.advance(min(BATCH, len(images) - start))

        return evaluate_reconstruction(autoencoder, batches(), features)


def _quality(measured: Reconstruction) -> dict[str, Any]:
    quality: dict[str, Any] = {}
    for name in ("psnr", "ssim", "l1", "frechet"):
        estimate = getattr(measured, name)
        quality |= {name: None} if estimate is None else with_interval(name, estimate)
    return quality


def _figures(measured: Reconstruction) -> dict[str, Any]:
    return {
        "images": measured.count,
        **_quality(measured),
        "features": measured.features,
        "codebook_size": measured.codebook_size,
        "codebook_use": measured.codebook_use,
        "codebook_perplexity": measured.codebook_perplexity,
        "latent_mean": measured.latent_mean.tolist(),
        "latent_std": measured.latent_std.tolist(),
        "encode_images_per_second": measured.encode_images_per_second,
        "decode_images_per_second": measured.decode_images_per_second,
    }


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


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(report: dict[str, Any], channels: Sequence[ChannelLoss], worst: list[Card], regular: list[Card]) -> Page:
    """Return the page: quality and latent size first, then images, then channels, tables and settings."""
    rows, columns = report["image_size"]
    lead = f"{report['images']:,} images of {rows} × {columns} pixels, encoded and decoded again."
    charts = [
        ("PSNR by image, dB; the line is the mean", histogram(report["psnr_by_image"], "dB")),
        ("SSIM by image; the line is the mean", histogram(report["ssim_by_image"], "SSIM")),
    ]
    by_image = zip(report["names"], report["psnr_by_image"], report["ssim_by_image"], strict=True)
    listed = Table(["image", "PSNR, dB", "SSIM"], [[name, f"{db:.2f}", f"{ssim:.4f}"] for name, db, ssim in by_image])
    sections = [
        Section(
            f"The {len(worst)} worst",
            "Those with the lowest PSNR, the worst first. The difference is the reconstruction minus the original, "
            f"enlarged {AMPLIFIED} times around grey: grey is equal.",
            [Cards(worst, "", "wide")],
        ),
        Section("A regular sample", "Spread evenly over all images in their order.", [Cards(regular, "", "wide")]),
        Section(
            "What each channel carries",
            "The PSNR that the images lose when one channel's values are replaced, by their mean or by noise of their "
            "mean and deviation, whichever costs less, with 95 % intervals. A model of latents spends as much on a "
            "channel that carries nothing as on any other.",
            _latents(report, channels),
        ),
    ]
    if report["held_apart"]:
        note = (
            "The same measures on further images. The difference is their PSNR minus that of the first row, with its "
            "95 % interval; a plain resize tells how much of it comes from the images."
        )
        sections.append(Section("Held apart", note, [_apart(report)]))
    if report["codebook_counts"]:
        note = (
            "How often each code is used. Perplexity is the number of codes that would carry as much if all were used "
            "equally."
        )
        sections.append(Section("Codebook", note, _codebook(report)))
    sections.append(Section("Image by image", "", [Charts(charts), Details("Every image", [listed])]))
    long = ("names", "psnr_by_image", "ssim_by_image", "codebook_counts", "channel_loss")
    definitions = [
        ["PSNR", f"of each image, peak 255, at most {BEST_PSNR:g} dB; then the mean"],
        ["SSIM", "Wang et al. 2004, Gaussian window of 11 pixels and deviation 1.5, mean of red, green and blue"],
        ["Fréchet distance", report["features"] or "not measured: no feature network was given"],
        ["plain resize", "Lanczos down and up; as many numbers as a latent, or as many bytes as its codes"],
        ["dB lost without a channel", f"of the first {report['channel_loss_images']:,} images"],
        ["speed", f"batches of {BATCH}, the first left out if there are others; device {report['device']}"],
    ]
    numbers = list(leaves({name: value for name, value in report.items() if name not in long}))
    provenance: list[Block] = [
        Details("Definitions of the measures", [Table([], definitions)]),
        Details("Every number", [Table([], numbers)]),
    ]
    return Page(f"Autoencoder {report['autoencoder']}", lead, _summary(report), sections, provenance)


def _summary(report: dict[str, Any]) -> list[Block]:
    """Return the first screen: each measure next to that of a plain resize, then the latent's size."""
    resize = report["resize"]
    bars = []
    for name, key, better in (
        ("PSNR, dB", "psnr", "higher"),
        ("SSIM", "ssim", "higher"),
        ("L1, of 255 levels", "l1", "lower"),
        ("Fréchet distance", "frechet", "lower"),
    ):
        if report[key] is not None:
            reference = None if resize is None else resize[key]
            low, high = report[f"{key}_interval"]
            bars.append(Bar(name, report[key], low, high, None, reference, better, percentage=False))
    explained = "Means over images."
    if resize is not None:
        rows, columns = resize["size"]
        keeps = "numbers" if report["codebook_size"] is None else "bytes"
        explained += f" A plain resize keeps as many {keeps} as the latent: {rows} × {columns} pixels."
    if report["features"]:
        explained += f" The Fréchet distance is by {report['features']}: compare at equal numbers of images only."
    threads = report["threads"]
    where = f"on {threads} thread{'' if threads == 1 else 's'}" if report["device"] == "cpu" else report["device"]
    speeds = [report[f"{way}_images_per_second"] for way in ("encode", "decode")]
    numbers = [("Latent", *_latent_size(report))]
    if report["codebook_size"] is not None:
        used = f"of {report['codebook_size']:,}; perplexity {report['codebook_perplexity']:,.1f}"
        numbers.append(("Codes used", percent(report["codebook_use"]), used))
    least = min(loss["db_lost"] for loss in report["channel_loss"])
    numbers.append(("Weakest channel", _decibels(least), f"of {report['channels']}: the PSNR lost without it"))
    for name, other in report["held_apart"].items():
        low, high = (_signed(end, 2) for end in other["psnr_difference_interval"])
        note = f"{low} to {high} dB: their PSNR minus that of these images"
        numbers.append((name.capitalize(), _signed(other["psnr_difference"], 2), note))
    numbers.append(("Encodes, decodes", " / ".join(f"{speed:,.0f}" for speed in speeds), f"images per second {where}"))
    return [Bars(bars, "this autoencoder", "a plain resize"), Text(explained), Numbers(numbers)]


def _latent_size(report: dict[str, Any]) -> tuple[str, str]:
    """Return the latent's places, and how much smaller it is than the image: in bits for codes, else in numbers."""
    factor, channels, size = report["factor"], report["channels"], report["codebook_size"]
    rows, columns = (side // factor for side in report["image_size"])
    note = f"places of {channels} number{'' if channels == 1 else 's'}"
    if size is None:
        ratio = 3 * factor**2 / channels
        note += f"; {ratio:.3g} times fewer numbers than the image" if ratio > 1 else ", no fewer"
    else:
        bits = math.log2(size)
        note += f", or of one code of {bits:.4g} bits"
        note += f"; {24 * factor**2 / bits:.3g} times fewer bits than the image" if bits else ""
    return f"{rows} × {columns}", note


def _cards(
    autoencoder: Autoencoder, resize: Resized | None, images: np.ndarray, names: Sequence[str], chosen: np.ndarray
) -> list[Card]:
    """Return the chosen images with their reconstructions and differences; the PSNR is that of the images shown."""
    originals = images[chosen]
    reconstructions = autoencoder.decode(autoencoder.encode(originals))
    resized = None if resize is None else resize.decode(resize.encode(originals))
    cards = []
    for place, number in enumerate(chosen):
        original, reconstruction = originals[place], reconstructions[place]
        shown = [(original, "original"), (reconstruction, "decoded")]
        shown += [] if resized is None else [(resized[place], "plain resize")]
        shown.append((amplified(original, reconstruction), f"difference × {AMPLIFIED}"))
        badge = _decibels(psnr(original[None], reconstruction[None])[0])
        cards.append(Card("", shown, title=names[number], badge=badge))
    return cards


def _latents(report: dict[str, Any], channels: Sequence[ChannelLoss]) -> list[Block]:
    """Return a bar for each channel, and a table of its statistics and of both replacements."""
    bars, rows = [], []
    for number, loss in enumerate(channels):
        least = min(loss.by_mean, loss.by_noise, key=lambda estimate: estimate.value)
        value, low, high = (max(0.0, end) for end in (least.value, least.low, least.high))
        bars.append(Bar(f"channel {number}, dB", value, low, high, percentage=False))
        lost = [f"{e.value:.2f} ({e.low:.2f} to {e.high:.2f})" for e in (loss.by_mean, loss.by_noise)]
        mean, std = report["latent_mean"][number], report["latent_std"][number]
        rows.append([f"channel {number}", _signed(mean, 4), f"{std:.4f}", *lost])
    top = 1.05 * max(bar.high or 0.0 for bar in bars)
    head = ["", "mean", "standard deviation", "dB lost without it: its mean", "dB lost without it: noise"]
    blocks: list[Block] = [Text(f"{line.capitalize()}.") for line in report["empty_channels"]]
    drawn = Bars([replace(bar, scale=(0.0, top)) for bar in bars] if top > 0 else bars, "dB lost without the channel")
    if len(bars) > CHANNELS_SHOWN:
        means, deviations = np.abs(report["latent_mean"]), report["latent_std"]
        summary = Text(
            f"{len(bars)} channels: means at most {means.max():.3f} from 0, deviations {min(deviations):.3f} to "
            f"{max(deviations):.3f}, each worth {min(loss.least for loss in channels):.2f} dB or more."
        )
        return [summary, *blocks, Details("Every channel", [drawn, Table(head, rows)])]
    return [*blocks, drawn, Details("Means, deviations and both replacements", [Table(head, rows)])]


def _apart(report: dict[str, Any]) -> Table:
    """Return the measures of each set of images, the first row being the images of the page."""
    head = ["set", "images", "PSNR, dB", "difference, dB", "plain resize, dB", "SSIM", "L1"]
    head += ["Fréchet"] if report["frechet"] is not None else []
    rows = []
    for name, figures in [("these images", report), *report["held_apart"].items()]:
        low, high = figures["psnr_interval"]
        row = [name, f"{figures['images']:,}", f"{figures['psnr']:.2f} ({low:.2f} to {high:.2f})", "\u2013"]
        if "psnr_difference" in figures:
            low, high = (_signed(end, 2) for end in figures["psnr_difference_interval"])
            row[-1] = f"{_signed(figures['psnr_difference'], 2)} ({low} to {high})"
        row.append("\u2013" if figures["resize"] is None else f"{figures['resize']['psnr']:.2f}")
        row += [f"{figures['ssim']:.4f}", f"{figures['l1']:.2f}"]
        rows.append([*row, f"{figures['frechet']:.4g}"] if figures["frechet"] is not None else row)
    return Table(head, rows)


def _codebook(report: dict[str, Any]) -> list[Block]:
    """Return how often each code is used, from the most used to the least."""
    counts = np.sort(report["codebook_counts"])[::-1]
    shown = np.unique(np.linspace(0, len(counts) - 1, CURVE_POINTS).astype(int))
    even = float(counts.mean())
    curves = [
        ("if all were used equally", [(1.0, 1.0), (float(len(counts)), 1.0)], WARM),
        ("used", [(float(rank) + 1, float(counts[rank] / even)) for rank in shown], ACCENT),
    ]
    rows = [
        ["codes", f"{len(counts):,}"],
        ["never used", f"{int((counts == 0).sum()):,}"],
        ["perplexity", f"{report['codebook_perplexity']:,.1f}"],
        ["the most used", f"{percent(counts[0] / counts.sum())} of all uses"],
        ["uses", f"{int(counts.sum()):,}"],
    ]
    chart = line_chart(curves, "codes, the most used first", logarithmic=True)
    return [Charts([("Use of each code, in parts of an even share", chart)]), Table([], rows)]


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _decibels(value: float) -> str:
    return f"{value:.2f}\u202fdB"
