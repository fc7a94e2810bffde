"""The settings of an image: plain JSON with all that its pixels depend on, from which it can be drawn again.

settings = settings_of(request, pipe.exported)                   # complete: `images.save_png` keeps it in the file
request = request_again(parse_settings(settings, "a.png"), pipe.exported)                       # the same request
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import from_dict, to_dict
from ..diffusion import Sampler, SamplerConfig
from ..errors import UserError
from ..export import Exported
from ..images import ImageSource, fit, read_mask
from ..sequence import Document, Image, Text
from ..version import __version__
from .sequence_state import Request, Start


@dataclass(frozen=True)
class TextPart:
    """Text of a prompt. ids: its tokens, where encoding the text would give others."""

    text: str
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ImagePart:
    """An image of a prompt: the fingerprint of its latent, and its size in pixels (rows, columns)."""

    image: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """Everything that one image depends on: the request, which of its images it is, the model, and how it computes.

    Fields are those of `Request` and of `SamplerConfig` by the same names; None: the model or the request has none.
    """

    prompt: str  # all text of the prompt, as the model reads it
    parts: tuple[TextPart | ImagePart, ...]
    seed: int
    draw: str
    max_tokens: int
    max_images: int
    size: tuple[int, int]
    guidance_scale: float
    temperature: float
    top_p: float
    reuse: bool
    image_index: int  # its number among the images of the reply
    model: str  # fingerprint of the weights; the next three as `Exported.fingerprints` has them
    config: str
    tokenizer: str
    autoencoder: str
    device: Literal["cpu", "cuda", "mps"]
    precision: Literal["float32", "bfloat16", "float16", "float64"]
    version: str
    quantize: str | None = None
    compiled: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    first: int | None = None
    code_temperature: float | None = None
    code_top_p: float | None = None
    negative_prompt: str | None = None  # the text of `Request.negative`; its images are the prompt's
    start: str | None = None  # fingerprint of the latent it begins from
    strength: float | None = None
    mask: str | None = None  # fingerprint of the latent's mask
    masked: bool | None = None
    images_in_prompt: int | None = None
    begins: int | None = None  # id that begins the prompt in place of BOS, as in a chat template


def settings_of(request: Request, exported: Exported, image_index: int = 0) -> dict[str, Any]:
    """Return the `Settings` of an image of a request as plain JSON, without those that are None."""
    tokenizer, factor = exported.tokenizer, exported.autoencoder.factor
    parts: list[dict[str, Any]] = []
    for part in request.document.parts:
        if isinstance(part, Image):
            size = [side * factor for side in part.latent.shape[-2:]]
            parts.append({"image": _fingerprint(part.latent), "size": size})
        else:
            text = tokenizer.decode(part.ids)
            parts.append({"text": text} | ({} if tokenizer.encode(text) == tuple(part.ids) else {"ids": part.ids}))
    values = {field.name: getattr(request, field.name, None) for field in fields(Settings)}
    values |= exported.fingerprints | {
        "prompt": "".join(part.get("text", "") for part in parts),
        "parts": parts,
        "image_index": image_index,
        "images_in_prompt": len(request.document.images) or None,
        "begins": request.document.first,
        "device": next(exported.model.parameters()).device.type,
        "precision": str(exported.model.compute_dtype).removeprefix("torch."),
        "quantize": exported.quantize,
        "compiled": exported.compiled or None,
        "version": __version__,
        "sampler": None,
        "start": None,
    }
    if exported.model.config.images == "latents":
        values |= {"sampler" if name == "name" else name: value for name, value in to_dict(request.sampler).items()}
        values |= {"code_temperature": None, "code_top_p": None}
    for name in ("presence_penalty", "frequency_penalty", "stop"):  # change the words before an image
        values[name] = getattr(request, name) or None
    if request.negative is not None:
        words = (part.ids for part in request.negative.parts if isinstance(part, Text))
        values["negative_prompt"] = "".join(map(tokenizer.decode, words))
    if (start := request.start) is not None:
        values |= {"start": _fingerprint(start.latent), "strength": start.strength}
        values |= {} if start.mask is None else {"mask": _fingerprint(start.mask), "masked": True}
    known = {name: value for name, value in values.items() if value is not None}
    plain = to_dict(from_dict(Settings, known, "settings"))
    plain["parts"] = [{name: value for name, value in part.items() if value is not None} for part in plain["parts"]]
    return {name: value for name, value in plain.items() if value is not None}


def parse_settings(values: dict[str, Any], where: str) -> Settings:
    """Read settings that `settings_of` returned. Raises UserError, one line that begins with `where`."""
    needed = [field.name for field in fields(Settings) if field.default is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where}: expected all settings of a drawing, found none for {', '.join(missing)}")
    return from_dict(Settings, values, where)


def request_again(
    settings: Settings,
    exported: Exported,
    images: Sequence[np.ndarray] = (),
    mask: ImageSource | None = None,
    where: str = "settings",
) -> Request:
    """Return the request that settings describe.

    images: those of the prompt and the start, in any order, as their files have them; mask: likewise.

    Raises UserError, one line that begins with `where`, for another model, and for images that are missing or differ.
    """
    for name, fingerprint in exported.fingerprints.items():
        if (expected := getattr(settings, name)) != fingerprint:
            raise UserError(f"{where}: {name}: expected {expected}, as it was drawn with, found {fingerprint}")
    encoded = _encode(settings, exported, images, where)
    parts = [
        Image(encoded[part.image][0], target=False)
        if isinstance(part, ImagePart)
        else Text(exported.tokenizer.encode(part.text) if part.ids is None else part.ids)
        for part in settings.parts
    ]
    area = None
    if settings.start is not None and settings.mask is not None and mask is not None:
        pixels = read_mask(mask, encoded[settings.start][1].shape[:2])
        area = latent_mask(fit(pixels, settings.size), exported.autoencoder.factor)
    given = None if mask is None else "another" if area is None else _fingerprint(area)
    if settings.mask != given:
        raise UserError(
            f"{where}: mask: expected {settings.mask or 'none'}, as it was drawn with, found {given or 'none'}"
        )
    start = None
    if settings.start is not None:
        start = Start(encoded[settings.start][0], 1.0 if settings.strength is None else settings.strength, area)
    sampler = exported.generation.sampler  # has no effect where the model does not denoise
    if exported.model.config.images == "latents":
        try:
            values = {"name": settings.sampler, "steps": settings.steps, "eta": settings.eta, "first": settings.first}
            sampler = Sampler(exported.process, from_dict(SamplerConfig, values, where)).config
        except ValueError as error:
            raise UserError(f"{where}: sampler: {error}") from None
    negative = None
    if settings.negative_prompt is not None:
        shown = [part for part in parts if isinstance(part, Image)]
        words = Text(exported.tokenizer.encode(settings.negative_prompt))
        negative = Document([*shown, words], closed=False)
    same = {field.name for field in fields(Request)} - {"document", "sampler", "start", "negative"}
    known = {name: value for name in same if (value := getattr(settings, name, None)) is not None}
    document = Document(parts, closed=False, first=settings.begins)
    return Request(document, sampler=sampler, start=start, negative=negative, **known)


def _encode(
    settings: Settings, exported: Exported, images: Sequence[np.ndarray], where: str
) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Return the latents that settings name, by their fingerprints, each with the image it was encoded from."""
    wanted = {part.image: part.size for part in settings.parts if isinstance(part, ImagePart)}
    wanted |= {} if settings.start is None else {settings.start: settings.size}
    encoded: dict[str, tuple[Tensor, np.ndarray]] = {}
    for size in sorted(set(wanted.values())):
        for image in images:
            latent = exported.autoencoder.encode(fit(image, size)[None])[0]
            if wanted.get(_fingerprint(latent)) == size:
                encoded[_fingerprint(latent)] = latent, image
    if missing := [name for name in wanted if name not in encoded]:
        names, other = ", ".join(missing), "others" if images else "none"
        raise UserError(
            f"{where}: images: expected those it was drawn from ({names}), found {other}; --images takes them"
        )
    if len(images) > len(wanted):
        raise UserError(f"{where}: images: expected {len(wanted)}, as it was drawn from, found {len(images)}")
    return encoded


def latent_mask(mask: np.ndarray, factor: int) -> Tensor:
    """Reduce a mask of pixels to one of latent elements, bool `[row, column]`: True where any of its pixels is."""
    rows, columns = (side // factor for side in mask.shape)
    cells = mask[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    return torch.from_numpy(cells.any((1, 3)))


def _fingerprint(tensor: Tensor) -> str:
    """Return sixteen hexadecimal digits of the hash of a tensor's elements."""
    return hashlib.sha256(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data).hexdigest()[:16]
