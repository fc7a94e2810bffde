"""The arguments of a pipeline's methods: their types, and checks of those that diffusers' pipelines take.

A wrong one is one line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from ..diffusion import SamplerConfig
from ..errors import UserError, shown
from ..images import ImageSource, decode_image
from ..sequence import Document
from .sequence_state import Start

StepEnd = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]
"""diffusers' callback_on_step_end: pipeline, number of the step from 0, its noise level, its tensors"""


ImageSources = ImageSource | Tensor | Sequence[ImageSource | Tensor]
"""One image or several: files, PIL images, arrays, tensors; a pipeline's outputs, stacked or listed, are some"""


class DrawOptions(TypedDict, total=False):
    """The keyword arguments of a pipeline's call (`TransfusionPipeline.__call__`), except `image`."""

    negative_prompt: str | Sequence[str] | None
    strength: float | None
    mask_image: ImageSource | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    num_images_per_prompt: int
    candidates: int
    generator: torch.Generator | int | Sequence[torch.Generator | int] | None
    sampler: str | None
    eta: float | None
    callback_on_step_end: StepEnd | None
    output_type: str
    strict: bool


class ReplySettings(TypedDict, total=False):
    """The fields of a `Request`, which explains them, except its document and `reuse`."""

    draw: str
    max_tokens: int
    max_images: int
    size: tuple[int, int]
    sampler: SamplerConfig
    guidance_scale: float
    image_guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    negative: Document | None
    start: Start | None
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    stop: tuple[str, ...]
    logprobs: int | None
    code_temperature: float
    code_top_p: float
    seed: int
    preview_every: int


def check_options(
    output_type: str, counts: dict[str, int | None], numbers: dict[str, float | None], step_end: StepEnd | None
) -> None:
    """Raise UserError for an unknown output_type, counts below 1 or not whole, no numbers, and a callback that is none.

    None passes for all but output_type; ranges of numbers are checked where they are known.
    """
    if step_end is not None and not callable(step_end):
        raise UserError(f"callback_on_step_end: expected a function, found {shown(step_end)}")
    if not isinstance(output_type, str) or output_type not in ("pil", "np", "pt", "latent"):
        raise UserError(f'output_type: expected "pil", "np", "pt" or "latent", found {shown(output_type)}')
    for name, count in counts.items():
        if not isinstance(count, Integral | None) or isinstance(count, bool) or (count is not None and count < 1):
            raise UserError(f"{name}: expected a whole number of at least 1, found {shown(count)}")
    for name, number in numbers.items():
        if not isinstance(number, Real | None) or isinstance(number, bool):
            raise UserError(f"{name}: expected a number, found {shown(number)}")


def read_images(images: ImageSources | None) -> list[np.ndarray]:
    """Decode images, uint8 `[row, column, 3]`; None: none.

    Tensors are `[3, row, column]` or `[image, 3, row, column]` of 0 to 1, arrays of floats the same with channels last.
    Raises UserError for what is no image.
    """
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [pixels for image in images for pixels in read_images(image)]
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        images = (tensor.movedim(-3, -1) if tensor.dim() > 2 else tensor).numpy()
    if isinstance(images, np.ndarray) and np.issubdtype(images.dtype, np.floating):
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise UserError(f"image: expected values from 0 to 1 where they are floats, found {low:g} to {high:g}")
        images = (images.astype(np.float64) * 255).round().astype(np.uint8)
    stacked: Any = images if isinstance(images, np.ndarray) and images.ndim == 4 else [images]
    return [decode_image(image) for image in stacked]


def each_image(images: ImageSources | None, drawings: int, times: int) -> list[np.ndarray]:
    """Return the image that belongs to each of `drawings`, `times` of which share a prompt; none for None.

    Raises UserError for a number that is neither 1 nor that of the prompts.
    """
    read = read_images(images)
    prompts = drawings // int(times)
    if images is not None and len(read) not in (1, prompts):
        raise UserError(f"image: expected 1{f' or {prompts}' * (prompts > 1)}, as prompts, found {len(read)}")
    return [read[min(number // times, len(read) - 1)] for number in range(drawings)] if read else []


def read_prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None, times: int
) -> tuple[list[str], list[str]]:
    """Return every prompt `times` times, and as many negative prompts, or none.

    Raises UserError for anything but text, and for another number of negative prompts.
    """
    read: list[list[str]] = []
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        listed = [texts] if isinstance(texts, str) else list(texts) if isinstance(texts, list | tuple) else []
        none_given = texts is None and name != "prompt"
        if not none_given and not (listed and all(isinstance(text, str) for text in listed)):
            raise UserError(f"{name}: expected text, or a list of texts, found {shown(texts)}")
        read.append(listed)
    prompts, negatives = read
    if len(negatives) not in (0, 1, len(prompts)):
        raise UserError(f"negative_prompt: expected 1 or {len(prompts)}, as prompts, found {len(negatives)}")
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    return [text for text in prompts for _ in range(times)], [text for text in negatives for _ in range(times)]


def read_seeds(generator: torch.Generator | int | Sequence[torch.Generator | int] | None, count: int) -> list[int]:
    """Return one seed per image: counted up from a number, or drawn (None: not reproducible). Raises UserError."""
    if isinstance(generator, list | tuple):
        if len(generator) != count:
            raise UserError(f"generator: expected {count}, as there are images, found {len(generator)}")
        return [seed for each in generator for seed in read_seeds(each, 1)]
    if isinstance(generator, Integral):
        return [int(generator) + number for number in range(count)]
    if not isinstance(generator, torch.Generator | None):
        raise UserError(f"generator: expected a torch.Generator, a seed or a list of them, found {shown(generator)}")
    device = None if generator is None else generator.device
    return torch.randint(2**31, (count,), generator=generator, device=device).tolist()
