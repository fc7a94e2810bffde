"""A request, the checks it passes, and the state of its sequence in the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..devices import out_of_memory
from ..diffusion import SamplerConfig, SamplerState
from ..errors import UserError
from ..export import MAX_SCALE, out_of_range
from ..sequence import Document, Image, Layout, Text, layout_document
from .detokenizer import Detokenizer
from .kv_cache import PrefixKeys, prefix_keys_of
from .model_runner import ModelRunner

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Start:
    """A clean latent `[channel, row, column]` from which the first image of a request is drawn, in place of noise.

    strength   share of the denoising steps taken: 1 begins from noise, 0 is the image itself
    mask       bool `[row, column]` of latent elements, True where it is redrawn; the rest stays. None: everywhere
    """

    latent: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to continue, and how.

    document         the prompt: an open document
    draw             "auto": the model decides (BOI is sampled); "force": an image comes first; "never": text only
    max_tokens       most text tokens to write; max_images: most images to draw
    size             pixels (rows, columns) of an image it draws
    guidance_scale   scale of classifier-free guidance towards the prompt; 1: none
    image_guidance_scale   the same towards the images before it alone; `guidance_scale` then counts for the text only
                     (`guide`). None: text and images are one condition
    guidance_interval   noise levels, as shares of all (0 clean, 1 noise), at which an image is guided; elsewhere only
                     the prompt's own branch is computed. None: everywhere
    start            where the first image begins; None: noise
    temperature      0 is greedy; top_p keeps the most probable tokens that make up this much probability
    code_temperature, code_top_p   the same for the codes of images, where images are codes
    preview_every    give the predicted clean latent after every `preview_every` steps; 0: never
    reuse            keep the cached positions for the next request with `reuse`, and resume from those that an earlier
                     one left where the prompts begin alike: the turns of a conversation
    """

    document: Document
    draw: str = "auto"
    max_tokens: int = 64
    max_images: int = 1
    size: tuple[int, int] = (32, 32)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=20))
    guidance_scale: float = 3.0
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    start: Start | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    code_temperature: float = 1.0
    code_top_p: float = 1.0
    seed: int = 0
    preview_every: int = 0
    reuse: bool = False

    def guided_at(self, level: float) -> bool:
        """Return True if an image is guided at this noise level, a share of all."""
        low, high = self.guidance_interval or (0, 1)
        return low <= level <= high


@dataclass(frozen=True)
class Branch:
    """One of the sequences that guide an image: the full sequence, or one that sees less of its prompt.

    The others are at the end of the same slot, from `origin`; `start`, counted from there, is where the image begins.
    """

    slot: int
    start: int
    origin: int = 0


@dataclass(eq=False)
class CodeDrawing:
    """An unfinished image of codes: the codes so far, and each branch's logits `[codebook_size]` of the next one."""

    generator: torch.Generator
    logits: list[Tensor] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class SequenceState:
    """A request and its progress."""

    number: int
    request: Request
    layout: Layout
    """layout of the prompt"""
    shape: tuple[int, int, int]
    """`[channel, row, column]` of the latents it draws"""
    patches: int
    """patches, or codes, per image that it draws"""
    max_len: int
    """the most positions it can take"""
    cfg_len: int
    """positions reserved at the end of its slot for the other branches of classifier-free guidance"""
    seen: list[Image]
    """images of the prompt, then those drawn so far"""
    detokenizer: Detokenizer
    """decodes the tokens it writes"""
    prefix_keys: PrefixKeys | None
    """describes its cached positions, if a later request may reuse them"""
    slot: int = -1
    length: int = 0
    written: int = 0
    next_token: int | None = None
    drawing: SamplerState | CodeDrawing | None = None
    branches: list[Branch] = field(default_factory=list)
    """while it draws: the full sequence, then those that see less"""
    scales: list[float] = field(default_factory=list)
    finished: Tensor | None = None
    """an image that is complete but not yet in the cache"""
    images: int = 0
    evaluations: int = 0
    too_large: bool = False
    """out of memory even when computed alone"""


def split_on_oom(
    rows: Sequence[SequenceState], work: Callable[[Sequence[SequenceState]], T]
) -> list[tuple[Sequence[SequenceState], T]]:
    """Run `work` on all rows at once, or out of memory on halves of them, down to one row; return each part's result.

    A row that does not fit alone is marked `too_large` and left out. `work` must be safe to run again after a failure.
    """
    try:
        return [(rows, work(rows))] if rows else []
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:
        rows[0].too_large = True
        return []
    middle = len(rows) // 2
    return split_on_oom(rows[:middle], work) + split_on_oom(rows[middle:], work)


def with_image_guidance(request: Request, scale: float | None) -> Request:
    """Return the request with `image_guidance_scale` set.

    Raises UserError if no image stands before the one to be drawn: the scale would have no effect.
    """
    if scale is not None and not request.document.images and request.max_images <= 1:
        raise UserError(f"image_guidance_scale: expected a picture before the words, found none (scale {scale:g})")
    return replace(request, image_guidance_scale=scale)


def accept(runner: ModelRunner, request: Request, number: int, where: str) -> SequenceState:
    """Return the initial state of a request. Raises UserError, one line that begins with `where`, if it is invalid."""
    if request.document.closed:
        raise ValueError(f"{where}: expected an open document, found a closed one")
    _check_settings(runner, request, where)
    _check_images(runner, request, where)
    layout = layout_document(request.document, runner.grammar)
    shape, patches = runner.drawn(request.size)
    context = runner.config.max_seq_len
    least = len(layout) + (patches + 2 if request.draw == "force" else 1)
    if least > context:
        raise UserError(f"{where}: prompt: expected at most {context} positions with what is to come, found {least}")
    draws = request.draw != "never" and runner.config.images != "none" and request.max_images > 0
    images = request.max_images * (patches + 2) if draws else 0
    last = request.document.parts[-1] if request.document.parts else None
    return SequenceState(
        number,
        request,
        layout,
        shape,
        patches,
        max_len=min(context, len(layout) + request.max_tokens + images + 1),
        cfg_len=_cfg_len(runner, request, patches) if draws else 0,
        seen=list(request.document.images),
        detokenizer=Detokenizer(runner.tokenizer, last.ids if isinstance(last, Text) else ()),
        prefix_keys=prefix_keys_of(layout) if request.reuse else None,
    )


def _check_settings(runner: ModelRunner, request: Request, where: str) -> None:
    images = runner.config.images
    if request.draw not in ("auto", "force", "never"):
        raise UserError(f'{where}: draw: expected "auto", "force" or "never", found {request.draw!r}')
    if images == "none" and (request.draw == "force" or request.document.images):
        found = "an image" if request.document.images else 'draw "force"'
        raise UserError(f"{where}: expected text alone, for the model knows no images, found {found}")
    if request.draw == "force" and request.max_images < 1:
        raise UserError(f"{where}: max_images: expected at least 1 where one is forced, found {request.max_images}")
    wrong = out_of_range(request)
    if wrong:
        raise UserError(f"{where}: {wrong}")
    if (scale := request.image_guidance_scale) is not None and not 0 <= scale <= MAX_SCALE:
        raise UserError(f"{where}: image_guidance_scale: expected 0 to {MAX_SCALE:g}, found {scale}")
    for name in ("max_images", "preview_every"):
        if getattr(request, name) < 0:
            raise UserError(f"{where}: {name}: expected at least 0, found {getattr(request, name)}")
    for name in ("guidance_interval", "start"):
        if images != "latents" and getattr(request, name) is not None:
            raise UserError(f"{where}: {name}: expected none, for the model does not denoise, found one")


def _check_images(runner: ModelRunner, request: Request, where: str) -> None:
    config = runner.config
    for image in request.document.images:
        if image.is_codes and not 0 <= int(image.latent.min()) <= int(image.latent.max()) < config.codebook_size:
            found = f"{int(image.latent.min())} to {int(image.latent.max())}"
            raise UserError(f"{where}: image: expected codes from 0 to {config.codebook_size - 1}, found {found}")
    factor = runner.exported.autoencoder.factor * config.patch_size if config.images != "none" else 1
    if min(request.size) < 1 or any(side % factor for side in request.size):
        raise UserError(f"{where}: image size: expected positive multiples of {factor}, found {request.size}")
    shape, _ = runner.drawn(request.size)
    if config.max_grid is not None and max(shape[1:]) > config.max_grid * config.patch_size:
        most = config.max_grid * factor
        raise UserError(f"{where}: image size: expected at most {most} pixels a side, found {request.size}")
    if request.start is not None:
        _check_start(request.start, shape, where)


def _check_start(start: Start, shape: tuple[int, int, int], where: str) -> None:
    if tuple(start.latent.shape) != shape:
        raise UserError(f"{where}: start: expected a latent {list(shape)}, found {list(start.latent.shape)}")
    if not 0 <= start.strength <= 1:
        raise UserError(f"{where}: strength: expected a share from 0 to 1, found {start.strength}")
    if start.mask is not None and (start.mask.dtype != torch.bool or tuple(start.mask.shape) != shape[1:]):
        found = f"{start.mask.dtype} {list(start.mask.shape)}".removeprefix("torch.")
        raise UserError(f"{where}: mask: expected bool {list(shape[1:])}, found {found}")


def _cfg_len(runner: ModelRunner, request: Request, patches: int) -> int:
    """Return the most positions that the branches of a request's guided images take (`open_branches`)."""
    scale, image_scale = request.guidance_scale, request.image_guidance_scale
    seen = [math.prod(runner.grammar.grid(image)) for image in request.document.images]
    seen += [patches] * (request.max_images - 1)
    three = image_scale is not None and bool(seen)
    images = sum(count + 2 for count in seen) + 2 + patches if three else 0
    guided = scale != 1 or (three and image_scale != 1)
    return images + (len(runner.null_tokens) + patches if guided else 0)
