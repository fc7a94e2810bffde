"""`transfuse generate` and `transfuse caption`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..devices import Device, Precision, for_inference, pick_device
from ..errors import UserError
from ..folders import DEFAULT, bundled_models, draws, places, trained_exports
from ..io import sha256
from ..log import logger
from .parsing import parse, print_json

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    from ..inference import TransfusionPipeline


def default_model() -> Path:
    """The model that a command uses where `--model` names none; it and the reason are reported on standard error.

    It is the newest export under runs/ that draws, else the bundled model. Raises UserError where there is neither.
    """
    trained = trained_exports()
    for folder in trained:
        if draws(folder):
            logger.info(f"{folder}: the model used, the newest export under runs/ that draws; --model names another")
            return folder
    there = "only models that draw nothing" if trained else "no models"
    if DEFAULT not in bundled_models():
        raise UserError(f"--model: expected an export folder, found {there} under runs/: train one first (make demo)")
    logger.info(
        f"{DEFAULT}: the model used, the bundled one, because there are {there} under runs/; --model names another"
    )
    return Path(DEFAULT)


@dataclass(frozen=True, kw_only=True)
class WithModel:
    """Options of every command that runs a model."""

    model: Path | None = None
    """export folder, or a bundled model's name; not given: the newest under runs/ that draws, else the bundled one"""
    device: Device = "auto"
    """where the network computes; auto: CUDA where there is one, else the CPU"""
    precision: Precision = "auto"
    """what it computes in; auto: bfloat16 on CUDA, float32 on the CPU"""

    def load(self) -> TransfusionPipeline:
        from .. import load

        device, dtype = for_inference(self.device, self.precision)
        return load(str(self.model or default_model()), device=device, dtype=dtype)


def save_picture(picture: PIL.Image.Image, path: Path, settings: dict[str, Any]) -> str:
    """Write a PNG that says how it was made; return its path.

    No file is replaced: where another is at `path`, the name gets a number (`crab-2.png`); a file of equal bytes is the
    same picture, and stays. Raises UserError where it cannot be written.
    """
    from ..images import save_png

    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, found a folder")
    content, place, number = io.BytesIO(), path, 1
    save_png(picture, content, settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not (place.is_file() and place.read_bytes() == content.getvalue()):
            try:
                _write_new(place, content.getvalue())
            except FileExistsError:
                number += 1
                place = path.with_stem(f"{path.stem}-{number}")
    except OSError as error:
        raise UserError(f"{path.parent}: expected a folder to write to, found {error.strerror or error}") from None
    return str(place)


def _write_new(path: Path, content: bytes) -> None:
    """Write a new file, whole or not at all. Raises FileExistsError, OSError."""
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def read_picture(path: Path, side: int, resize: bool) -> np.ndarray:
    """A picture file for a model of that size. Raises UserError where it has another and is not to be fitted."""
    from ..images import read_image

    return to_side(read_image(path), path, side, resize)


def to_side(pixels: np.ndarray, path: Path, side: int, resize: bool) -> np.ndarray:
    """Fit the pixels of a file to a model's size. Raises UserError as `read_picture`."""
    from ..images import fit

    if resize:
        pixels = fit(pixels, side)
    height, width = pixels.shape[:2]
    if (height, width) != (side, side):
        raise UserError(f"{path}: expected {side}x{side} pixels, found {width}x{height}; --resize fits it")
    return pixels


@dataclass(frozen=True)
class Generate(WithModel):
    """Go on from a prompt, in words and pictures: the model itself decides when to draw. Or draw a picture again.

    transfuse generate "a crab on a blue background" --seed 7 --out pictures
    transfuse generate --again pictures/seed-7-0.png --out again
    """

    prompt: tyro.conf.Positional[str] = ""
    out: Path = Path("out")
    """folder for the pictures; no picture in it is replaced"""
    seed: int = 0
    steps: int | None = None
    """denoising steps; the model's own default if not given"""
    guidance_scale: float | None = None
    candidates: int = 1
    """number of replies to draw; the one whose image the model would most probably caption with the prompt is kept"""
    draw: Literal["auto", "force", "never"] = "auto"
    """force: a picture comes first; never: words only"""
    max_tokens: int | None = None
    """most tokens of text"""
    temperature: float | None = None
    """of the text; 0 is greedy"""
    again: Path | None = None
    """a PNG of generate, edit, chat or the server: draw it again by the settings in it, in place of a prompt"""
    images: tuple[Path, ...] = ()
    """with --again: the image files that it was drawn from, if there were any"""
    mask: Path | None = None
    """with --again: the mask that it was drawn with, if there was one"""
    json: bool = False
    """end with one line of JSON"""


AGAIN = ("model", "out", "again", "images", "mask", "json")
"""options that go with --again: all others are in the file"""


def generate(arguments: Sequence[str]) -> int:
    """Go on from a prompt, in words and pictures, or draw a picture again."""
    options = parse(Generate, arguments, "generate")
    if options.again is not None:
        for field in fields(options):
            if field.name not in AGAIN and getattr(options, field.name) != field.default:
                raise UserError(f"generate: --again: expected no {field.name}, for the file's own is used, found one")
        return _again(options, options.again)
    if options.images or options.mask:
        raise UserError(f"generate: --{'images' if options.images else 'mask'}: expected --again with it, found none")
    if not options.prompt.strip():
        raise UserError("generate: prompt: expected some text, found an empty one")
    return _generate(options)


def _generate(options: Generate) -> int:
    pipe = options.load()
    from dataclasses import replace

    from ..inference.pictures import settings_of

    request = replace(
        pipe.request([options.prompt], options.steps, options.guidance_scale), seed=options.seed, draw=options.draw
    )
    if options.max_tokens is not None:
        request = replace(request, max_tokens=options.max_tokens)
    if options.temperature is not None:
        request = replace(request, temperature=options.temperature)
    reply = pipe.replies([request], options.candidates)[0]
    request = replace(request, seed=reply.seed)
    parts: list[dict[str, str]] = []
    for part in reply.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            number = sum(p["type"] == "image" for p in parts)
            settings = settings_of(request, pipe.exported, number)
            saved = save_picture(part, options.out / f"seed-{reply.seed}-{number}.png", settings)
            parts.append({"type": "image", "path": saved})
    if options.json:
        print_json(
            {
                "parts": parts,
                "seed": reply.seed,
                "steps": request.sampler.steps if pipe.exported.model.config.images == "latents" else None,
                "guidance_scale": request.guidance_scale,
                "stop": reply.done.reason,
                "text_tokens": reply.done.text_tokens,
            }
        )
    else:
        print("\n".join(part.get("text") or part["path"] for part in parts))
    return 0


def _again(options: Generate, file: Path) -> int:
    """Draw the picture in a file by the settings in it, and save it by the same name in the folder for pictures."""
    import numpy as np
    import torch

    from .. import load
    from ..images import read_image, read_settings
    from ..inference import ImageEnd
    from ..inference.pictures import parse_settings, request_again, settings_of

    settings = parse_settings(read_settings(file), str(file))
    images = [read_image(path) for path in options.images]
    device, dtype = pick_device(settings.device), getattr(torch, settings.precision)
    model = options.model or _model_with(settings.model, file)
    pipe = load(str(model), device=device, dtype=dtype, quantize=settings.quantize, compile=bool(settings.compiled))
    request = request_again(settings, pipe.exported, images, options.mask, str(file))
    drawn = (event for event in pipe.stream(request) if isinstance(event, ImageEnd))
    latent = next((event.latent for event in drawn if event.image == settings.image_index), None)
    if latent is None:
        raise UserError(f"{file}: image_index: expected an image {settings.image_index} in the reply, found none")
    picture = pipe.picture(latent)
    if not np.array_equal(read_image(file), np.asarray(picture)):
        logger.info(f"{file}: drawn again with other pixels: by another machine, version or number of threads")
    record = settings_of(request, pipe.exported, settings.image_index)
    path = save_picture(picture, options.out / file.name, record)
    if options.json:
        print_json({"path": path, **record})
    else:
        print(path)
    return 0


def _model_with(fingerprint: str, file: Path) -> Path:
    """The export under runs/, or the bundled model, with these weights. Raises UserError where there is none."""
    for model in [*trained_exports(), *map(Path, bundled_models())]:
        weights = places(model)["model.safetensors"]
        if weights.is_file() and sha256(weights).startswith(fingerprint):
            logger.info(f"{model}: the model used, whose weights drew {file}")
            return model
    raise UserError(
        f"{file}: model: expected {fingerprint} under runs/ or in the package, found none; --model names it"
    )


@dataclass(frozen=True)
class Caption(WithModel):
    """Describe a picture.

    transfuse caption picture.png
    """

    image: tyro.conf.Positional[Path]
    resize: bool = False
    """crop the middle square and resize it to the model's size, instead of refusing it"""
    max_tokens: int = 64
    json: bool = False
    """end with one line of JSON"""


def caption(arguments: Sequence[str]) -> int:
    """Describe a picture."""
    options = parse(Caption, arguments, "caption")
    pipe = options.load()
    picture = read_picture(options.image, pipe.exported.image_size, options.resize)
    text = pipe.caption(picture, max_tokens=options.max_tokens)[0]
    if options.json:
        print_json({"caption": text, "image": str(options.image)})
    else:
        print(text)
    return 0
