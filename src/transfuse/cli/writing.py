"""`transfuse generate`, `transfuse caption` and `transfuse edit`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..devices import Device, Precision, for_inference, pick_device
from ..errors import UserError
from ..folders import DEFAULT, bundled_models, draws, places, trained_exports
from ..io import sha256
from ..log import logger
from .options import Flat, Json, Positional, print_result

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


@dataclass(frozen=True)
class ModelOptions:
    """Options of every command that runs a model."""

    model: Path | None = None
    """export folder, or a bundled model's name; not given: the newest under runs/ that draws, else the bundled one"""
    device: Device = "auto"
    """where the network computes; auto: CUDA where there is one, else the CPU"""
    precision: Precision = "auto"
    """what it computes in; auto: bfloat16 on CUDA, float32 on the CPU"""

    def load(self) -> TransfusionPipeline:
        """Open the model. Raises UserError where there is none, or not on this device."""
        from .. import load

        device, dtype = for_inference(self.device, self.precision)
        return load(str(self.model or default_model()), device=device, dtype=dtype)


ModelChoice = Annotated[ModelOptions, Flat]
Steps = Annotated[int | None, tyro.conf.arg(help="denoising steps; the model's own default if not given")]
Resize = Annotated[
    bool, tyro.conf.arg(help="crop the middle square and resize it to the model's size, instead of refusing it")
]


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
class SampleOptions:
    """Options of a reply; None: the model's own default."""

    seed: int = 0
    steps: Steps = None
    guidance_scale: float | None = None
    candidates: int = 1
    """number of replies to draw; the one whose image the model would most probably caption with the prompt is kept"""
    draw: Literal["auto", "force", "never"] = "auto"
    """force: an image comes first; never: words only"""
    max_tokens: int | None = None
    """most tokens of text"""
    temperature: float | None = None
    """of the text; 0 is greedy"""
    strict: bool = False
    """refuse a prompt with words that the model has never seen in a caption"""


def generate(
    prompt: Positional[str] = "",
    *,
    model: ModelChoice,
    sample: Annotated[SampleOptions, Flat],
    out: Path = Path("out"),
    again: Path | None = None,
    images: tuple[Path, ...] = (),
    mask: Path | None = None,
    json: Json = False,
) -> int:
    """Continue a prompt in words and images: the model decides when to draw. Or draw an image again.

    $ transfuse generate "a crab on a blue background" --seed 7 --out pictures
    $ transfuse generate --again pictures/seed-7-0.png --out again

    Args:
        prompt: the text to continue, in quotes
        out: folder for the images; no image in it is replaced
        again: a PNG of generate, edit, chat or the server: draw it again by the settings in it, in place of a prompt
        images: with --again: the image files that it was drawn from, if there were any
        mask: with --again: the mask that it was drawn with, if there was one
    """
    if again is not None:
        given = {"prompt": prompt} if prompt else {}
        for part in (model, sample):
            given |= {name: value for name, value in vars(part).items() if value != getattr(type(part)(), name)}
        for name in given.keys() - {"model"}:
            raise UserError(f"generate: --again: expected no {name}, for the file's own is used, found one")
        report = _draw_again(again, model.model, out, images, mask)
        lines = [report["path"]]
    elif images or mask:
        raise UserError(f"generate: --{'images' if images else 'mask'}: expected --again with it, found none")
    elif not prompt.strip():
        raise UserError("generate: prompt: expected some text, found an empty one")
    else:
        report = _reply(model.load(), prompt, sample, out)
        lines = [part.get("text") or part["path"] for part in report["parts"]]
    return print_result(json, report, "\n".join(lines))


def _reply(pipe: TransfusionPipeline, prompt: str, sample: SampleOptions, out: Path) -> dict[str, Any]:
    """Draw a reply, save its images and return what is in it, as JSON."""
    from ..inference.settings import settings_of

    prompt = pipe.read_prompt(prompt, sample.strict, sample.draw).text
    if distilled := pipe.exported.distilled:
        logger.info(f"the model {distilled}")
    request = replace(pipe.request([prompt], sample.steps, sample.guidance_scale), seed=sample.seed, draw=sample.draw)
    if sample.max_tokens is not None:
        request = replace(request, max_tokens=sample.max_tokens)
    if sample.temperature is not None:
        request = replace(request, temperature=sample.temperature)
    reply = pipe.replies([request], sample.candidates)[0]
    if reply.images and sample.draw == "auto":
        pipe.read_prompt(prompt)  # now it was drawn: unknown words matter
    request = replace(request, seed=reply.seed)
    parts: list[dict[str, str]] = []
    for part in reply.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            number = sum(p["type"] == "image" for p in parts)
            settings = settings_of(request, pipe.exported, number)
            saved = save_picture(part, out / f"seed-{reply.seed}-{number}.png", settings)
            parts.append({"type": "image", "path": saved})
    return {
        "parts": parts,
        "seed": reply.seed,
        "steps": request.sampler.steps if pipe.exported.model.config.images == "latents" else None,
        "guidance_scale": request.guidance_scale,
        "stop": reply.done.reason,
        "text_tokens": reply.done.text_tokens,
    }


def _draw_again(file: Path, model: Path | None, out: Path, images: Sequence[Path], mask: Path | None) -> dict[str, Any]:
    """Draw the image in a file by the settings in it, save it by the same name and return its path and settings."""
    import numpy as np
    import torch

    from .. import load
    from ..images import read_image, read_settings
    from ..inference import ImageEnd
    from ..inference.settings import parse_settings, request_again, settings_of

    settings = parse_settings(read_settings(file), str(file))
    shown = [read_image(path) for path in images]
    device, dtype = pick_device(settings.device), getattr(torch, settings.precision)
    path = str(model or _model_with(settings.model, file))
    how = {"quantize": settings.quantize, "compile": bool(settings.compiled)}
    pipe = load(path, device=device, dtype=dtype, **how)  # type: ignore[arg-type]
    request = request_again(settings, pipe.exported, shown, mask, str(file))
    drawn = (event for event in pipe.stream(request) if isinstance(event, ImageEnd))
    latent = next((event.latent for event in drawn if event.image == settings.image_index), None)
    if latent is None:
        raise UserError(f"{file}: image_index: expected an image {settings.image_index} in the reply, found none")
    image = pipe.picture(latent)
    if not np.array_equal(read_image(file), np.asarray(image)):
        logger.info(f"{file}: drawn again with other pixels: by another machine, version or number of threads")
    record = settings_of(request, pipe.exported, settings.image_index)
    return {"path": save_picture(image, out / file.name, record), **record}


def _model_with(fingerprint: str, file: Path) -> Path:
    """Return the export under runs/, or the bundled model, with these weights. Raises UserError where there is none."""
    for model in [*trained_exports(), *map(Path, bundled_models())]:
        weights = places(model)["model.safetensors"]
        if weights.is_file() and sha256(weights).startswith(fingerprint):
            logger.info(f"{model}: the model used, whose weights drew {file}")
            return model
    raise UserError(
        f"{file}: model: expected {fingerprint} under runs/ or in the package, found none; --model names it"
    )


def caption(
    image: Positional[Path],
    *,
    model: ModelChoice,
    resize: Resize = False,
    max_tokens: int = 64,
    json: Json = False,
) -> int:
    """Describe an image.

    $ transfuse caption picture.png

    Args:
        image: an image file
        max_tokens: most tokens of the caption
    """
    pipe = model.load()
    text = pipe.caption(read_picture(image, pipe.exported.image_size, resize), max_tokens=max_tokens)[0]
    return print_result(json, {"caption": text, "image": str(image)}, text)


def edit(
    image: Positional[Path],
    prompt: Positional[str],
    *,
    model: ModelChoice,
    out: Path = Path("out"),
    strength: float | None = None,
    mask: Path | None = None,
    seed: int = 0,
    steps: Steps = None,
    guidance_scale: float | None = None,
    image_guidance_scale: float | None = None,
    resize: Resize = False,
    strict: bool = False,
    json: Json = False,
) -> int:
    """Change an image: by an instruction, by redrawing it from part of the way, or only where a mask selects.

    $ transfuse edit picture.png "make the background red" --out pictures
    $ transfuse edit picture.png "a crab on a red background" --strength 0.6

    Args:
        image: an image file
        prompt: an instruction; with --strength or --mask a description of the result
        out: folder for the image
        strength: begin from the image, noised: 1 is noise alone, 0 changes nothing
        mask: an image of the same size: its transparent area is redrawn, or, if it is opaque, the white one
        strict: refuse words that the model has never seen in a caption or an instruction
        image_guidance_scale: for instructions: how far to push towards the image, apart from the words
    """
    if not prompt.strip():
        raise UserError("edit: prompt: expected some text, found an empty one")
    if not image.exists() and Path(prompt).is_file():
        raise UserError(f'edit: expected the image first, found the prompt: transfuse edit {prompt} "{image}"')
    pipe = model.load()
    prompt = pipe.read_prompt(prompt, strict).text
    from ..images import fit, read_image, read_mask
    from ..inference.sequence_state import with_image_guidance
    from ..inference.settings import settings_of

    side = pipe.exported.image_size
    pixels = read_image(image)
    area = None if mask is None else read_mask(mask, pixels.shape[:2])
    if area is not None and resize:
        area = fit(area, side)
    shown = to_side(pixels, image, side, resize)
    start = None
    if strength is not None or area is not None:
        start = pipe.start(shown, 1.0 if strength is None else strength, area)
    parts: list[str | np.ndarray] = [prompt] if start else [shown, prompt]
    request = with_image_guidance(pipe.request(parts, steps, guidance_scale), image_guidance_scale)
    request = replace(request, draw="force", max_tokens=0, start=start, seed=seed)
    settings = settings_of(request, pipe.exported)
    drawn = pipe.replies([request])[0].images[0]
    path = save_picture(drawn, out / f"{image.stem}-seed-{seed}.png", settings)
    return print_result(json, {"path": path, "image": str(image), **settings}, path)
