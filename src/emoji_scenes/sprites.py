"""The sprite file, and the sprites scaled for drawing."""

from __future__ import annotations

import io
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .nouns import NOUNS, PALETTE

SPRITE_FILE = Path(__file__).with_name("sprites.npz")
STYLES = ("noto", "noto-v1", "fluent-flat", "fluent")
"""The drawing styles, named after the icon sets they come from (see NOTICE)."""
Scaled = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""A sprite at one size: colours multiplied by alpha, uint8 `[side, side, 3]`, and the share of the background that
still shows, float32 `[side, side, 1]`."""
CACHE_BYTES = 96 * 2**20
"""Scaled sprites kept in memory. All of them at 32 pixels take about a third of it."""
HALF = 64
"""Side in pixels of the halved drawings from which sprites of up to half of it are made: 20 MB for all of them."""


class Sprites:
    """Every noun drawn in every style it has; decoded and scaled on first use, then kept.

    styles_of   for a noun its styles, three or four of `STYLES`
    seen_on     for (noun, style) the names of the background colours on which that drawing can be seen
    """

    def __init__(self, path: Path = SPRITE_FILE) -> None:
        with np.load(path, allow_pickle=False) as file:
            names, colours, styles = (list(map(str, file[key])) for key in ("names", "colours", "styles"))
            self._blob, offsets, visible = file["blob"].tobytes(), file["offsets"].tolist(), file["visible"].tolist()
        if (colours, styles) != (list(PALETTE), list(STYLES)):
            raise ValueError(
                f"{path}: expected colours and styles {list(PALETTE)} {STYLES}, found {colours} {tuple(styles)}; "
                "run tools/build_world.py"
            )
        self._span: dict[tuple[str, str], tuple[int, int]] = {}
        self.seen_on: dict[tuple[str, str], frozenset[str]] = {}
        self.styles_of: dict[str, tuple[str, ...]] = dict.fromkeys(NOUNS, ())
        for place, name in enumerate(names):
            noun, _, style = name.partition("/")
            self._span[noun, style] = (offsets[place], offsets[place + 1])
            self.seen_on[noun, style] = frozenset(c for c, seen in zip(colours, visible[place], strict=True) if seen)
            self.styles_of[noun] += (style,)
        self._scaled: OrderedDict[tuple[str, str, int], Scaled] = OrderedDict()
        self._bytes = 0
        self._halves: dict[tuple[str, str], Image.Image] = {}

    def original(self, noun: str, style: str) -> NDArray[np.uint8]:
        """Return the stored drawing, uint8 RGBA `[side, side, 4]`; the object's longer side fills the square."""
        return np.asarray(self._decode(noun, style))

    def scaled(self, noun: str, style: str, side: int) -> Scaled:
        """Return the drawing at `side` x `side` pixels, antialiased, its colours multiplied by alpha."""
        key = (noun, style, side)
        if key in self._scaled:
            return self._scaled[key]
        if side <= HALF // 2:  # much faster from the halved drawing than from the file
            if (noun, style) not in self._halves:
                whole = self._decode(noun, style).convert("RGBa")
                self._halves[noun, style] = whole.resize((HALF, HALF), Image.Resampling.BOX)
            image = self._halves[noun, style]
        else:
            image = self._decode(noun, style).convert("RGBa")
        # "RGBa" has colours multiplied by alpha: averaging those leaves no fringe of the invisible pixels' colour.
        pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
        # Lanczos may overshoot: a colour multiplied by alpha can never exceed alpha.
        colour = np.minimum(pixels[..., :3], pixels[..., 3:])
        scaled = (colour, ((255 - pixels[..., 3:]) / 255.0).astype(np.float32))
        self._scaled[key] = scaled
        self._bytes += sum(part.nbytes for part in scaled)
        while self._bytes > CACHE_BYTES:  # first in, first out: sprites are drawn at random, so age tells nothing
            _, old = self._scaled.popitem(last=False)
            self._bytes -= sum(part.nbytes for part in old)
        return scaled

    def _decode(self, noun: str, style: str) -> Image.Image:
        start, end = self._span[noun, style]
        return Image.open(io.BytesIO(self._blob[start:end])).convert("RGBA")


@cache
def sprites() -> Sprites:
    """Return the bundled sprites, loaded once in each process."""
    return Sprites()
