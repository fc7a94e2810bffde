"""`transfuse generate` and `transfuse caption`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..console import say
from ..devices import Device, Precision, for_inference
from ..errors import UserError
from ..folders import DEFAULT, bundled_models, draws, trained_exports
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
            say(f"{folder}: the model used, the newest export under runs/ that draws; --model names another")
            return folder
    there = "only models that draw nothing" if trained else "no models"
    if DEFAULT not in bundled_models():
        raise UserError(f"--model: expected an export folder, found {there} under runs/: train one first (make demo)")
    say(f"{DEFAULT}: the model used, the one in the package, for there are {there} under runs/; --model names another")
    return Path(DEFAULT)


@dataclass(frozen=True, kw_only=True)
class WithModel:
    """What every command that runs a model asks."""

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
    """Write a PNG that says how it was made; its path. Raises UserError where it can not be written."""
    from ..images import save_png

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path, settings)
    except OSError as error:
        raise UserError(f"{path.parent}: expected a folder to write to, found {error.strerror or error}") from None
    return str(path)


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
    """Go on from a prompt, in words and pictures: the model itself decides when to draw.

    transfuse generate "a crab on a blue background" --seed 7 --out pictures
    """

    prompt: tyro.conf.Positional[str]
    out: Path = Path("out")
    """folder for the pictures"""
    seed: int = 0
    steps: int | None = None
    """denoising steps; the model's own default if not given"""
    guidance_scale: float | None = None
    candidates: int = 1
    """answer so many times, and keep the picture that the model would itself likeliest describe by the prompt"""
    draw: Literal["auto", "force", "never"] = "auto"
    """force: a picture comes first; never: words only"""
    max_tokens: int | None = None
    """most tokens of text"""
    temperature: float | None = None
    """of the text; 0 is greedy"""
    json: bool = False
    """end with one line of JSON"""


def generate(arguments: Sequence[str]) -> int:
    """Go on from a prompt, in words and pictures."""
    asked = parse(Generate, arguments, "generate")
    if not asked.prompt.strip():
        raise UserError("generate: prompt: expected some text, found an empty one")
    pipe = asked.load()
    from dataclasses import replace

    from ..inference.pictures import settings_of

    request = replace(pipe.request([asked.prompt], asked.steps, asked.guidance_scale), seed=asked.seed, draw=asked.draw)
    if asked.max_tokens is not None:
        request = replace(request, max_tokens=asked.max_tokens)
    if asked.temperature is not None:
        request = replace(request, temperature=asked.temperature)
    reply = pipe.replies([request], asked.candidates)[0]
    request = replace(request, seed=reply.seed)
    parts: list[dict[str, str]] = []
    for part in reply.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            path = asked.out / f"seed-{reply.seed}-{sum(p['type'] == 'image' for p in parts)}.png"
            saved = save_picture(part, path, settings_of(request, pipe.exported))
            parts.append({"type": "image", "path": saved})
    if asked.json:
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
    asked = parse(Caption, arguments, "caption")
    pipe = asked.load()
    picture = read_picture(asked.image, pipe.exported.image_size, asked.resize)
    text = pipe.caption(picture, max_tokens=asked.max_tokens)[0]
    if asked.json:
        print_json({"caption": text, "image": str(asked.image)})
    else:
        print(text)
    return 0
