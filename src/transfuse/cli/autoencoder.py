"""`transfuse autoencoder train | inspect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..errors import UserError
from ..log import logger
from .parsing import act, parse, parse_run, preset_name, print_json


def autoencoder(arguments: Sequence[str]) -> int:
    """Train an image autoencoder, or look at how well one does.

    transfuse autoencoder train kl-f4-small --run runs/kl
    transfuse autoencoder inspect runs/kl/export pictures/

    Then: transfuse data build pictures/ latents --autoencoder runs/kl/export
    """
    return act("autoencoder", arguments, ACTIONS, autoencoder.__doc__)


def train(arguments: Sequence[str]) -> int:
    """Train an autoencoder preset, or go on with a run; on the bundled world, or on a folder of images.

    transfuse autoencoder train kl-f4-small --run runs/kl --data.folder pictures/

    Every setting is an option. The same command resumes from the newest checkpoint; Ctrl-C saves and exits with 75.
    """
    from ..recipes.autoencoders import AUTOENCODERS, autoencoder_preset
    from ..train_autoencoder import train_autoencoder
    from ..training import stopped_code

    named = preset_name("autoencoder train", arguments, AUTOENCODERS, train.__doc__)
    if named is None:
        return 0
    name, rest = named
    recipe, run, as_json = parse_run("autoencoder train", autoencoder_preset(name), name, rest, train.__doc__)
    trainer, export = train_autoencoder(recipe, run)
    if export is None:
        return stopped_code(trainer.ranks)
    if not trainer.ranks.first:
        return 0
    logger.info(f"{export}: exported; look at it with: transfuse autoencoder inspect {export} world")
    if as_json:
        print_json({"run": str(run), "step": trainer.step, "export": str(export), **trainer.totals})
    return 0


@dataclass(frozen=True)
class Inspect:
    """Reconstruct images and report: pictures side by side, PSNR, SSIM, Frechet distance, what each channel is worth.

    transfuse autoencoder inspect runs/kl/export pictures/ --out report
    """

    autoencoder: tyro.conf.Positional[str]
    """a folder, ours or diffusers', or the name of a bundled one"""
    images: tyro.conf.Positional[str]
    """image files, taken recursively; or "world": held-out scenes of the bundled world, and nouns never trained on"""
    out: Path = Path("inspection")
    """folder for index.html and report.json"""
    size: int = 64
    """images are cut to their middle square and scaled to this many pixels"""
    count: int = 256
    """most images"""
    features: str | None = None
    """network for the Frechet distance: a local file or "imagenet-mobilenet"; none: left out"""
    json: bool = False
    """end with one line of JSON"""


def inspect(arguments: Sequence[str]) -> int:
    options = parse(Inspect, arguments, "autoencoder inspect")
    if options.count < 1:
        raise UserError(f"--count: expected at least 1, found {options.count}")
    from ..autoencoders import open_autoencoder
    from ..autoencoders.features import load_features
    from ..evaluation.image_quality import LEAST
    from ..inspect_autoencoder import inspect_autoencoder, inspected_images

    opened = open_autoencoder(options.autoencoder)
    if options.size < opened.factor or options.size % opened.factor:
        raise UserError(
            f"--size: expected a multiple of {opened.factor} for the autoencoder {opened.name}, found {options.size}"
        )
    features = None if options.features is None else load_features(options.features)
    images, names, held_apart = inspected_images(options.images, options.size, options.count)
    if features is not None and len(images) < LEAST:
        raise UserError(f"{options.images}: expected at least {LEAST} images for --features, found {len(images)}")
    report = inspect_autoencoder(opened, images, names, options.out, features, held_apart)
    if options.json:
        print_json({"report": str(options.out / "index.html"), **report})
    else:
        print(options.out / "index.html")
    return 0


ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {"train": train, "inspect": inspect}
