"""`transfuse autoencoder train` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..autoencoders import open_autoencoder
from ..autoencoders.features import load_features
from ..errors import UserError
from ..evaluation.image_quality import LEAST
from ..evaluation.reconstruction import WINDOW
from ..inspect_autoencoder import inspect_autoencoder, inspected_images
from ..log import logger
from ..recipes import AutoencoderRecipe
from ..train_autoencoder import train_autoencoder
from ..training import stopped_code
from .options import Config, Flat, Json, Positional, Preset, RunFolder, print_json, print_result, run_folder


def train(
    recipe: Annotated[AutoencoderRecipe, Flat],
    preset: Positional[Preset] = None,
    *,
    config: Config = None,
    run: RunFolder = None,
    json: Json = False,
) -> int:
    """Train an autoencoder preset, or resume a run; on the bundled world, or on a folder of images.

    $ transfuse autoencoder train kl-f4-small --run runs/kl --data.folder pictures/

    Every setting is an option. The same command resumes from the newest checkpoint; Ctrl-C saves and exits with 75.
    Then:

    $ transfuse data build pictures/ latents --autoencoder runs/kl/export
    """
    folder = run_folder(run, recipe.preset, config)
    trainer, export = train_autoencoder(recipe, folder)
    if export is None:
        return stopped_code(trainer.ranks)
    if not trainer.ranks.first:
        return 0
    logger.info(f"{export}: exported; look at it with: transfuse autoencoder inspect {export} world")
    if json:
        print_json({"run": str(folder), "step": trainer.step, "export": str(export), **trainer.totals})
    return 0


def inspect(
    autoencoder: Positional[str],
    images: Positional[str],
    *,
    out: Path = Path("inspection"),
    size: int = 64,
    count: int = 256,
    features: str | None = None,
    json: Json = False,
) -> int:
    """Reconstruct images and report: images side by side, PSNR, SSIM, Frechet distance, what each channel is worth.

    $ transfuse autoencoder inspect runs/kl/export pictures/ --out report

    Args:
        autoencoder: a folder, ours or diffusers', or the name of a bundled one
        images: image files, taken recursively; or "world": held-out scenes of the bundled world, and nouns never
            trained on
        out: folder for index.html and report.json
        size: images are cut to their middle square and scaled to this many pixels
        count: most images
        features: network for the Frechet distance: a local file or "imagenet-mobilenet"; none: left out
    """
    if count < 1:
        raise UserError(f"--count: expected at least 1, found {count}")
    opened = open_autoencoder(autoencoder)
    if size < opened.factor or size % opened.factor:
        raise UserError(
            f"--size: expected a multiple of {opened.factor} for the autoencoder {opened.name}, found {size}"
        )
    if size < WINDOW:
        raise UserError(f"--size: expected at least {WINDOW} pixels, the window of SSIM, found {size}")
    network = None if features is None else load_features(features)
    pixels, names, held_apart = inspected_images(images, size, count)
    if network is not None and len(pixels) < LEAST:
        raise UserError(f"{images}: expected at least {LEAST} images for --features, found {len(pixels)}")
    report = inspect_autoencoder(opened, pixels, names, out, network, held_apart)
    return print_result(json, {"report": str(out / "index.html"), **report}, out / "index.html")
