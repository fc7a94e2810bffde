"""The named background colours and the two rules that depend on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Background colours by name, as (red, green, blue) in 0-255. Far apart, so that a slightly wrong generated colour is
#: still named rightly: the two nearest differ by about 90 in Euclidean distance.
PALETTE: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "red": (220, 30, 40),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "yellow": (250, 225, 50),
    "orange": (245, 135, 25),
    "purple": (130, 55, 175),
    "pink": (250, 165, 200),
    "gray": (140, 140, 140),
    "brown": (115, 70, 35),
}
_NAMES = tuple(PALETTE)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)

#: A pixel stands out from a background when its RGB distance is at least this ...
VISIBLE_DISTANCE = 100.0
#: ... and a sprite can be seen on a background when at least this share of its opaque pixels stands out.
VISIBLE_SHARE = 0.6


def nearest_colour(rgb: NDArray[np.float32]) -> str:
    """The palette name nearest to one colour, ``rgb`` of shape [3] in 0-255."""
    return _NAMES[int(((_COLOURS - rgb) ** 2).sum(axis=1).argmin())]


def background_of(image: NDArray[np.uint8]) -> str:
    """The palette name of an image's background: the nearest colour to the median pixel of its one-pixel border.

    ``image`` is uint8 [height, width, 3]. Raises ValueError for any other shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [height, width, 3], found {image.dtype} {list(image.shape)}")
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    return nearest_colour(np.median(border, axis=0).astype(np.float32))


def visible_on(sprite: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return for each palette colour in order whether a sprite (uint8 RGBA [height, width, 4]) can be seen on it."""
    opaque = sprite[..., :3][sprite[..., 3] >= 128].astype(np.float32)
    if not len(opaque):
        return np.zeros(len(_NAMES), dtype=bool)
    distance = np.sqrt(((opaque[:, None, :] - _COLOURS[None]) ** 2).sum(axis=2))
    shares: NDArray[np.float64] = (distance >= VISIBLE_DISTANCE).mean(axis=0)
    return shares >= VISIBLE_SHARE
