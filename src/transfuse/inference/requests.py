"""What a request may ask for, and how much of the cache it can come to need: known before any work is done."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import UserError
from ..export import MAX_SCALE, out_of_range
from ..sequence import Text, layout_document
from .detokenizer import Detokenizer
from .drawing import beside
from .events import Request, Start
from .network import Network
from .row import Row
from .slots import content_of


def with_image_guidance(request: Request, scale: float | None) -> Request:
    """A request with `image_guidance_scale`. Raises UserError where no picture lies before its drawing, for there it
    would do nothing (the engine lets it pass)."""
    if scale is not None and not request.document.images and request.max_images <= 1:
        raise UserError(f"image_guidance_scale: expected a picture before the words, found none (scale {scale:g})")
    return replace(request, image_guidance_scale=scale)


def accept(network: Network, request: Request, number: int, where: str) -> Row:
    """A row for a request. Raises UserError, one line that begins with `where`, for one that can not be."""
    if request.document.closed:
        raise ValueError(f"{where}: expected an open document, found a closed one")
    _check_settings(network, request, where)
    _check_images(network, request, where)
    layout = layout_document(request.document, network.grammar)
    shape, patches = network.drawn(request.size)
    context = network.config.max_seq_len
    least = len(layout) + (patches + 2 if request.draw == "force" else 1)
    if least > context:
        raise UserError(f"{where}: prompt: expected at most {context} positions with what is to come, found {least}")
    draws = request.draw != "never" and network.config.images != "none" and request.max_images > 0
    images = request.max_images * (patches + 2) if draws else 0
    last = request.document.parts[-1] if request.document.parts else None
    return Row(
        number,
        request,
        layout,
        shape,
        patches,
        bound=min(context, len(layout) + request.max_tokens + images + 1),
        beside=beside(network, request, patches) if draws else 0,
        seen=list(request.document.images),
        detokenizer=Detokenizer(network.tokenizer, last.ids if isinstance(last, Text) else ()),
        content=content_of(layout) if request.reuse else None,
    )


def _check_settings(network: Network, request: Request, where: str) -> None:
    images = network.config.images
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


def _check_images(network: Network, request: Request, where: str) -> None:
    config = network.config
    for image in request.document.images:
        if image.is_codes and not 0 <= int(image.latent.min()) <= int(image.latent.max()) < config.codebook_size:
            found = f"{int(image.latent.min())} to {int(image.latent.max())}"
            raise UserError(f"{where}: image: expected codes from 0 to {config.codebook_size - 1}, found {found}")
    factor = network.exported.autoencoder.factor * config.patch_size if config.images != "none" else 1
    if min(request.size) < 1 or any(side % factor for side in request.size):
        raise UserError(f"{where}: image size: expected positive multiples of {factor}, found {request.size}")
    shape, _ = network.drawn(request.size)
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
