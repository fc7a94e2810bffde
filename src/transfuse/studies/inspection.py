"""An image autoencoder looked at: one page with its figures, what it spoils, and what lies between; and a JSON file.

report = inspect_autoencoder(autoencoder, images, names, Path("runs/kl/inspection"), held_apart={"unseen": others})

index.html      figures, originals beside reconstructions, latents, use of the codebook; needs nothing else
report.json     every figure, and those of each image
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoji_scenes import World

from ..autoencoders import Autoencoder
from ..errors import UserError
from ..evaluation.confidence import Estimate
from ..evaluation.reconstruction import (
    BEST_PSNR,
    CARRIES_NOTHING,
    ChannelLoss,
    Features,
    Reconstruction,
    channel_images,
    channel_losses,
    evaluate_reconstruction,
    psnr,
)
from ..images import fit, image_files, read_image
from ..log import ProgressTask, logger, progress
from ..presets.autoencoders import ImagesConfig, unseen_world
from ..version import __version__
from .charts import Curve, chart, histogram
from .page import card, columns, folded, grid, image, page, section, table

BATCH = 32
"""images encoded at once"""
WORST, REGULAR = 8, 12
"""images shown: those that come back worst, and every so-many-th of all"""
AMPLIFIED = 5
"""times that differences are enlarged"""
SMOOTH_FROM = 128
"""pixels a side from which the browser may smooth: smaller images are shown pixel by pixel"""
CHANNELS_SHOWN = 16
"""more channels are folded away"""
CURVE_POINTS = 400

# What the frame's style lacks: three pictures in a row, tables of several columns.
_STYLE = """<style>
.triples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.triples .card { display: flex; flex-direction: column; }
.triple { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; margin-top: auto; }
.triple img { width: 100%; height: auto; outline: 1px solid var(--line); outline-offset: -1px; }
.triple span { display: block; font-size: 12.5px; color: var(--soft); margin-top: 5px; }
.smooth img { image-rendering: auto; }
.said-of { display: flex; gap: 14px; justify-content: space-between; margin: 0 0 10px; }
.said-of b { font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.many td { white-space: nowrap; } .many th { min-width: 5em; }
</style>"""

_FIGURES = (
    "PSNR and SSIM compare pixel with pixel, as means over images with their 95 % intervals; more is better. Of L1 and "
    "of the Fréchet distance less is better."
)
_APART = (
    "The same measures on images that are kept apart. The difference is theirs less that of the first row, with its "
    "95 % interval: below 0, they come back worse."
)
_WORST = "Those with the lowest PSNR, the worst first. " + (
    f"The difference is the reconstruction less the original, {AMPLIFIED} times enlarged around grey: grey is equal."
)
_REGULAR = "Spread evenly over all images in the order they came, none picked."
_SPREAD = (
    f"How the images share in the means, which the lines mark. PSNR is at most {BEST_PSNR:g} dB, that of equal images."
)
_LATENTS = (
    "What a model of latents has to learn: over all images and places, the mean and the standard deviation of each "
    "channel. Training goes best where they are near 0 and 1. The dB lost without a channel is the fall in PSNR where "
    "its values are replaced by their mean, or by noise of their mean and deviation, with 95 % intervals."
)

_CODEBOOK = (
    "How often each code is used. Perplexity is how many codes would say as much if all were used alike; codes that "
    "are never used say nothing."
)


def inspect_autoencoder(
    autoencoder: Autoencoder,
    images: np.ndarray,
    names: list[str],
    out: Path,
    features: Features | None = None,
    held_apart: dict[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Measure uint8 images `[image, row, column, 3]`, named one by one, and write `index.html` and `report.json`.

    held_apart: further images by the name of their set, measured beside the first. Returns what `report.json` holds.
    Raises ValueError for images that cannot be measured or names that do not fit, UserError for a folder that cannot
    be written.
    """
    if len(names) != len(images):
        raise ValueError(f"names: expected one for each of {len(images)} images, found {len(names)}")
    found = _measured(autoencoder, images, features, "reconstruct")
    others = {name: _measured(autoencoder, some, features, name) for name, some in (held_apart or {}).items()}
    channels = _channels(autoencoder, images)
    report = {
        "version": __version__,
        "autoencoder": found.name,
        "factor": autoencoder.factor,
        "channels": autoencoder.channels,
        "image_size": list(images.shape[1:3]),
        "device": found.device,
        "threads": torch.get_num_threads(),
        **_figures(found),
        "held_apart": {
            name: {**_figures(other), **_named("psnr_difference", _difference(found.psnr, other.psnr))}
            for name, other in others.items()
        },
        "channel_loss_images": channel_images(autoencoder, len(images)),
        "channel_loss": [
            {"db_lost": loss.least, **_named("by_mean", loss.by_mean), **_named("by_noise", loss.by_noise)}
            for loss in channels
        ],
        "empty_channels": _empty(channels),
        "names": list(names),
        "psnr_by_image": found.psnr_by_image.tolist(),
        "ssim_by_image": found.ssim_by_image.tolist(),
        "codebook_counts": None if found.codebook_counts is None else found.codebook_counts.tolist(),
    }
    for line in _empty(channels):
        logger.info(line)
    html = _page(report, found, channels, _triples(autoencoder, images, names, found))
    _write(out, {"index.html": html, "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n"})
    return report


# --- figures ----------------------------------------------------------------------------------------------------------


def _measured(autoencoder: Autoencoder, images: np.ndarray, features: Features | None, title: str) -> Reconstruction:
    def batches(bar: ProgressTask) -> Iterator[np.ndarray]:
        for start in range(0, len(images), BATCH):
            yield images[start : start + BATCH]
            bar.advance(min(BATCH, len(images) - start))

    with progress(title, len(images)) as bar:
        return evaluate_reconstruction(autoencoder, batches(bar), features)


def _channels(autoencoder: Autoencoder, images: np.ndarray) -> list[ChannelLoss]:
    decoded = channel_images(autoencoder, len(images)) * (1 + 2 * autoencoder.channels)
    with progress("channels", decoded) as bar:
        return channel_losses(autoencoder, images, BATCH, bar.advance)


def _empty(channels: Sequence[ChannelLoss]) -> list[str]:
    """One line for each channel that carries nothing."""
    return [
        f"channel {number} carries nothing: without it PSNR falls by {loss.least:.2f} dB, less than {CARRIES_NOTHING}"
        for number, loss in enumerate(channels)
        if loss.least < CARRIES_NOTHING
    ]


def _figures(found: Reconstruction) -> dict[str, Any]:
    return {
        "images": found.count,
        **_named("psnr", found.psnr),
        **_named("ssim", found.ssim),
        **_named("l1", found.l1),
        "frechet": found.frechet,
        "features": found.features,
        "codebook_size": found.codebook_size,
        "codebook_use": found.codebook_use,
        "codebook_perplexity": found.codebook_perplexity,
        "latent_mean": found.latent_mean.tolist(),
        "latent_std": found.latent_std.tolist(),
        "encode_images_per_second": found.encode_images_per_second,
        "decode_images_per_second": found.decode_images_per_second,
    }


def _named(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.value, f"{name}_interval": [found.low, found.high]}


def _difference(first: Estimate, other: Estimate) -> Estimate:
    """`other - first` of two independent means, its interval from theirs (Zou and Donner 2008)."""
    value = other.value - first.value
    below = math.hypot(other.value - other.low, first.high - first.value)
    above = math.hypot(other.high - other.value, first.value - first.low)
    return Estimate(value, value - below, value + above, other.count)


def _write(out: Path, files: dict[str, str]) -> None:
    """Each of the files, whole or not at all."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            partial = out / f"{name}.partial"
            partial.write_text(text)
            os.replace(partial, out / name)
    except OSError as error:
        raise UserError(f"{out}: inspection not written ({error.strerror or error})") from None


# --- pictures ---------------------------------------------------------------------------------------------------------


def _triples(
    autoencoder: Autoencoder, images: np.ndarray, names: Sequence[str], found: Reconstruction
) -> tuple[list[str], list[str]]:
    """Cards of the worst images and of a regular sample; nothing that was rebuilt was kept, so these are once more."""
    worst = np.argsort(found.psnr_by_image, kind="stable")[:WORST]
    regular = np.unique(np.linspace(0, len(images) - 1, min(REGULAR, len(images))).round().astype(int))
    return tuple(  # type: ignore[return-value]
        [
            _triple(images[index], rebuilt, names[index])
            for index, rebuilt in zip(chosen, _rebuilt(autoencoder, images[chosen]), strict=True)
        ]
        for chosen in (worst, regular)
    )


@torch.inference_mode()
def _rebuilt(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    return autoencoder.decode(autoencoder.encode(images))


def _triple(original: np.ndarray, rebuilt: np.ndarray, name: str) -> str:
    """One card; its PSNR is that of the very pictures shown."""
    decibels = psnr(original[None], rebuilt[None])[0]
    pictures = [
        ("original", original),
        ("reconstruction", rebuilt),
        (f"difference \u00d7 {AMPLIFIED}", amplified(original, rebuilt)),
    ]
    smooth = " smooth" if min(original.shape[:2]) >= SMOOTH_FROM else ""
    shown = "".join(f"<div>{image(p, f'{name}, {kind}')}<span>{kind}</span></div>" for kind, p in pictures)
    return (
        f'<figure class="card"><figcaption class="said-of"><span>{escape(name)}</span><b>{_decibels(decibels)}</b>'
        f'</figcaption><div class="triple{smooth}">{shown}</div></figure>'
    )


def amplified(original: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """uint8 of one shape: `AMPLIFIED` times what was added, around grey 128, clipped."""
    difference = rebuilt.astype(np.int16) - original
    return (128 + AMPLIFIED * difference).clip(0, 255).astype(np.uint8)


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(
    report: dict[str, Any],
    found: Reconstruction,
    channels: Sequence[ChannelLoss],
    triples: tuple[list[str], list[str]],
) -> str:
    rows, columns = report["image_size"]
    worst, regular = triples
    lead = (
        f"{found.count:,} images of {rows} \u00d7 {columns} pixels, encoded and decoded again: what comes back, and "
        "what lies between."
    )
    sections = [
        _STYLE + section("What comes back", _FIGURES, _cards(report)),
        section("Held apart", _APART, _apart(report)) if report["held_apart"] else "",
        section(f"The {len(worst)} worst", _WORST, grid("triples", worst)),
        section("A regular sample", _REGULAR, grid("triples", regular)),
        section("Image by image", _SPREAD, _spread(report, found)),
        section("Latents", _LATENTS, _latents(found, channels)),
        section("Codebook", _CODEBOOK, _codebook(found)) if found.codebook_counts is not None else "",
        section("How it was measured", "", _made(report)),
    ]
    footer = f"Made by Transfuse {escape(report['version'])}. Every number was measured by the run it describes."
    return page(f"Autoencoder {found.name}", lead, sections, footer)


def _cards(report: dict[str, Any]) -> str:
    low, high = report["psnr_interval"]
    least, most = report["ssim_interval"]
    fewest, greatest = report["l1_interval"]
    threads = report["threads"]
    where = f"on {threads} thread{'' if threads == 1 else 's'}" if report["device"] == "cpu" else report["device"]
    cards = [
        card("PSNR", _decibels(report["psnr"]), f"95 % interval {low:.2f} to {high:.2f}"),
        card("SSIM", f"{report['ssim']:.4f}", f"95 % interval {least:.4f} to {most:.4f}; 1 is equal"),
        card("L1", f"{report['l1']:.2f} <small>of 255</small>", f"95 % interval {fewest:.2f} to {greatest:.2f}"),
        card("Latent", *_latent_size(report)),
        card("Encodes", _speed(report["encode_images_per_second"]), where),
        card("Decodes", _speed(report["decode_images_per_second"]), where),
    ]
    if report["frechet"] is not None:
        beside = f"by {report['features']}, over {report['images']:,} images: compare at equal numbers only"
        cards.insert(3, card("Fréchet distance", f"{report['frechet']:.4g}", beside))
    if report["codebook_size"] is not None:
        cards.append(
            card(
                "Codes used",
                f"{100 * report['codebook_use']:.1f}\u202f%",
                f"of {report['codebook_size']:,}; perplexity {report['codebook_perplexity']:,.1f}",
            )
        )
    return grid("cards", cards)


def _latent_size(report: dict[str, Any]) -> tuple[str, str]:
    """Its places, and how much smaller it is than the image: in bits where it is codes, else in numbers."""
    factor, channels, size = report["factor"], report["channels"], report["codebook_size"]
    rows, columns = (side // factor for side in report["image_size"])
    each = f"places of {channels} number{'' if channels == 1 else 's'}"
    if size is None:
        ratio = 3 * factor**2 / channels
        beside = f"{each}; {_times(ratio)} fewer numbers than the image" if ratio > 1 else f"{each}, no fewer"
    else:
        bits = math.log2(size)
        beside = f"{each}, or of one code of {bits:.4g} bits"
        beside += f"; {_times(24 * factor**2 / bits)} fewer bits than the image" if bits else ""
    return f"{rows} \u00d7 {columns}", beside


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def _speed(images_per_second: float) -> str:
    return f"{images_per_second:,.{0 if images_per_second >= 100 else 1}f} <small>images/s</small>"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _decibels(value: float) -> str:
    return f"{value:.2f}\u202fdB"


def _apart(report: dict[str, Any]) -> str:
    heads = ["set", "images", "PSNR, dB", "difference, dB", "SSIM", "L1"]
    heads += ["Fréchet"] if report["frechet"] is not None else []
    rows = []
    for name, figures in [("these images", report), *report["held_apart"].items()]:
        low, high = figures["psnr_interval"]
        row = [name, f"{figures['images']:,}", f"{figures['psnr']:.2f} ({low:.2f} to {high:.2f})", "\u2013"]
        if "psnr_difference" in figures:
            low, high = figures["psnr_difference_interval"]
            row[-1] = f"{_signed(figures['psnr_difference'], 2)} ({_signed(low, 2)} to {_signed(high, 2)})"
        row += [f"{figures['ssim']:.4f}", f"{figures['l1']:.2f}"]
        rows.append([*row, f"{figures['frechet']:.4g}"] if figures["frechet"] is not None else row)
    return columns(heads, rows)


def _spread(report: dict[str, Any], found: Reconstruction) -> str:
    panels = [
        ("PSNR, dB", histogram("Images by PSNR", report["psnr_by_image"], "dB", found.psnr.value)),
        ("SSIM", histogram("Images by SSIM", report["ssim_by_image"], "SSIM", found.ssim.value)),
    ]
    by_image = zip(report["names"], report["psnr_by_image"], report["ssim_by_image"], strict=True)
    rows = [[name, f"{decibels:.2f}", f"{similar:.4f}"] for name, decibels, similar in by_image]
    return grid("charts", [f'<div class="card"><h3>{title}</h3>{svg}</div>' for title, svg in panels]) + folded(
        "Every image", columns(["image", "PSNR, dB", "SSIM"], rows)
    )


def _latents(found: Reconstruction, channels: Sequence[ChannelLoss]) -> str:
    rows = [
        [f"channel {number}", _signed(mean, 4), f"{std:.4f}", _lost(loss.by_mean), _lost(loss.by_noise)]
        for number, (mean, std, loss) in enumerate(zip(found.latent_mean, found.latent_std, channels, strict=True))
    ]
    heads = ["", "mean", "standard deviation", "dB lost without it: its mean", "dB lost without it: noise"]
    empty = "".join(f"<p>{escape(line.capitalize())}.</p>" for line in _empty(channels))
    whole = columns(heads, rows)
    if len(rows) <= CHANNELS_SHOWN:
        return empty + whole
    mean, std = np.abs(found.latent_mean).max(), found.latent_std
    said = (
        f"{len(rows)} channels: no mean further from 0 than {mean:.3f}, deviations {std.min():.3f} to {std.max():.3f}, "
        f"each worth {min(loss.least for loss in channels):.2f} dB or more."
    )
    return f"<p>{said}</p>{empty}{folded('Every channel', whole)}"


def _lost(loss: Estimate) -> str:
    return f"{loss.value:.2f} ({loss.low:.2f} to {loss.high:.2f})"


def _codebook(found: Reconstruction) -> str:
    """How often each code is used, from the most used to the least; the curve falls to the floor at the unused."""
    assert found.codebook_counts is not None
    counts = np.sort(found.codebook_counts)[::-1]
    shown = np.unique(np.linspace(0, len(counts) - 1, CURVE_POINTS).astype(int))
    even = float(counts.mean())
    curves = [
        Curve("if all were used alike", [(1, 1.0), (len(counts), 1.0)], "var(--warm)"),
        Curve("used", [(int(rank) + 1, float(counts[rank] / even)) for rank in shown], "var(--accent)"),
    ]
    svg = chart("Use of each code, the most used first", curves, "codes, the most used first", logarithmic=True)
    legend = "".join(f'<li><i style="background:{curve.colour}"></i>{curve.name}</li>' for curve in curves)
    drawn = f'<div class="card"><h3>Use, in parts of an even share</h3>{svg}<ul class="legend">{legend}</ul></div>'
    rows = [
        ("codes", f"{len(counts):,}"),
        ("never used", f"{int((counts == 0).sum()):,}"),
        ("perplexity", f"{found.codebook_perplexity:,.1f}"),
        ("the most used", f"{100 * counts[0] / counts.sum():.2f}\u202f% of all uses"),
        ("uses", f"{int(counts.sum()):,}"),
    ]
    return grid("charts", [*([drawn] if svg else []), f'<div class="card">{table(rows)}</div>'])


def _made(report: dict[str, Any]) -> str:
    long = ("names", "psnr_by_image", "ssim_by_image", "codebook_counts", "held_apart", "channel_loss")
    rows = [(name.replace("_", " "), _plain(value)) for name, value in report.items() if name not in long]
    for name, figures in report["held_apart"].items():
        rows += [(f"{name}: {key.replace('_', ' ')}", _plain(value)) for key, value in figures.items()]
    settings = [
        ("PSNR", f"of each image, peak 255, at most {BEST_PSNR:g} dB; then the mean"),
        ("SSIM", "Wang et al. 2004, Gaussian window of 11 pixels and deviation 1.5, mean of red, green and blue"),
        ("Fréchet distance", report["features"] or "not measured: no network of features was given"),
        (
            "dB lost without a channel",
            f"of the first {report['channel_loss_images']:,} images, each compared with itself",
        ),
        ("speed", f"batches of {BATCH}, the first left out where there are others; device {report['device']}"),
    ]
    return table(settings) + folded("Every figure, as in report.json", table(rows))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value)
    return value if isinstance(value, str) else json.dumps(value)


def inspected_images(source: str, size: int, count: int) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """What to inspect: uint8 images `[n, size, size, 3]`, a name for each, and further sets to measure beside.

    source "world": held-out combinations of the bundled world, and beside them scenes of nouns that the presets'
    training never shows. Else a file or folder; what can not be read, or is smaller than size, is named and left out.
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
