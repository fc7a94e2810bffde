"""Pictures at the edge of HTTP: what clients send, which may be anything, and what they are sent."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
import PIL.Image

from ..errors import UserError
from ..images import decode_image, read_mask, save_png

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_000_000


def from_url(url: str, field: str) -> np.ndarray:
    """A picture in a `data:` URL, uint8 RGB. Nothing is ever fetched. Raises UserError, one line that names `field`."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma:
        raise UserError(f"{field}: expected a data: URL with the picture in it, found {url[:24]!r}; none is fetched")
    if not head.endswith(";base64"):
        raise UserError(f"{field}: expected base64 behind {head[:40]!r}, found something else")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{field}: expected base64, found something else ({error})") from None
    return decode(content, field)


def decode(content: bytes, field: str) -> np.ndarray:
    """A PNG, JPEG or WebP file of at most MAX_PIXELS, which its header tells before anything is decoded."""
    return decode_image(content, field, MAX_PIXELS, FORMATS)


def decode_mask(content: bytes, field: str, image: np.ndarray) -> np.ndarray:
    """The area of `image` to redraw (`read_mask`), of a file as `decode` takes it."""
    return read_mask(content, image.shape[:2], field, MAX_PIXELS, FORMATS)


def png(pixels: np.ndarray, settings: dict[str, Any]) -> str:
    """Base64 of a PNG with its settings in it."""
    file = io.BytesIO()
    save_png(PIL.Image.fromarray(pixels), file, settings)
    return base64.b64encode(file.getvalue()).decode()


def preview(pixels: np.ndarray) -> str:
    """Base64 of a PNG, quickly made."""
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def data_url(content: str) -> str:
    return f"data:image/png;base64,{content}"
