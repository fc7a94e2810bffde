"""The sprite file and the sprites scaled for drawing."""

from __future__ import annotations

import io
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .nouns import NOUNS
from .palette import PALETTE

SPRITE_FILE = Path(__file__).with_name("sprites.npz")

#: The drawing styles, named after the icon sets they come from (see NOTICE).
STYLES = ("noto", "noto-v1", "fluent-flat", "fluent")

#: A sprite ready to be drawn at one size: colours already multiplied by alpha (uint8 [side, side, 3]) and the share of
#: the background that still shows (float32 [side, side, 1]).
Scaled = tuple[NDArray[np.uint8], NDArray[np.float32]]

#: Scaled sprites kept in memory, in bytes. All of them at 32 pixels take about a third of it.
CACHE_BYTES = 96 * 2**20
#: Side in pixels of the halved drawings that sprites of up to half of it are made from: 20 MB for all of them.
HALF = 64


class Sprites:
    """Every noun drawn in every style it has; decoded and scaled on first use, then kept.

    ``styles_of[noun]``: the styles this noun is drawn in, three or four of STYLES. ``seen_on[noun, style]``: the names
    of the background colours on which that drawing can be seen.
    """

    def __init__(self, path: Path = SPRITE_FILE) -> None:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            colours = [str(colour) for colour in file["colours"]]
            styles = tuple(str(style) for style in file["styles"])
            self._blob = file["blob"].tobytes()
            offsets = file["offsets"].tolist()
            visible = file["visible"].tolist()
        if colours != list(PALETTE) or styles != STYLES:
            expected = f"{list(PALETTE)} {STYLES}"
            raise ValueError(
                f"{path}: expected colours and styles {expected}, found {colours} {styles}; run tools/build_world.py"
            )
        self._span: dict[tuple[str, str], tuple[int, int]] = {}
        self.seen_on: dict[tuple[str, str], frozenset[str]] = {}
        of: dict[str, list[str]] = {noun: [] for noun in NOUNS}
        for place, name in enumerate(names):
            noun, _, style = name.partition("/")
            self._span[noun, style] = (offsets[place], offsets[place + 1])
            self.seen_on[noun, style] = frozenset(c for c, seen in zip(colours, visible[place], strict=True) if seen)
            of[noun].append(style)
        self.styles_of = {noun: tuple(styles) for noun, styles in of.items()}
        self._scaled: OrderedDict[tuple[str, str, int], Scaled] = OrderedDict()
        self._bytes = 0
        self._halves: dict[tuple[str, str], Image.Image] = {}

    def original(self, noun: str, style: str) -> NDArray[np.uint8]:
        """The stored drawing: uint8 RGBA [side, side, 4]; the object's longer side fills the square."""
        return np.asarray(self._decode(noun, style))

    def scaled(self, noun: str, style: str, side: int) -> Scaled:
        """The drawing at ``side`` x ``side`` pixels, antialiased, its colours multiplied by alpha."""
        key = (noun, style, side)
        cached = self._scaled.get(key)
        if cached is not None:
            return cached
        image = self._half(noun, style) if side <= HALF // 2 else self._decode(noun, style).convert("RGBa")
        pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
        # Lanczos may overshoot: a colour multiplied by alpha can never exceed alpha.
        colour = np.minimum(pixels[..., :3], pixels[..., 3:])
        made = (colour, ((255 - pixels[..., 3:]) / 255.0).astype(np.float32))
        self._keep(key, made)
        return made

    def _decode(self, noun: str, style: str) -> Image.Image:
        start, end = self._span[noun, style]
        return Image.open(io.BytesIO(self._blob[start:end])).convert("RGBA")

    def _half(self, noun: str, style: str) -> Image.Image:
        """The drawing at HALF pixels a side, kept: small sprites are made from it, much faster than from the file.

        "RGBa" holds colours multiplied by alpha. Averaging those leaves no fringe of the invisible pixels' colour.
        """
        cached = self._halves.get((noun, style))
        if cached is None:
            whole = self._decode(noun, style).convert("RGBa")
            cached = self._halves[noun, style] = whole.resize((HALF, HALF), Image.Resampling.BOX)
        return cached

    def _keep(self, key: tuple[str, str, int], made: Scaled) -> None:
        self._scaled[key] = made
        self._bytes += made[0].nbytes + made[1].nbytes
        while self._bytes > CACHE_BYTES:  # first in, first out: sprites are drawn at random, so age tells nothing
            _, old = self._scaled.popitem(last=False)
            self._bytes -= old[0].nbytes + old[1].nbytes


@lru_cache(maxsize=1)
def sprites() -> Sprites:
    """The bundled sprites, loaded once in each process."""
    return Sprites()
