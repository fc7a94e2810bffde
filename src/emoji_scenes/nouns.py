"""The vocabulary of scenes: nouns, their drawings, and background colours with the rules that read them.

Nouns are in `nouns.csv`: concrete, countable things that can be recognised 32 pixels wide. They were chosen by looking
at every drawing. Left out are nouns whose styles show different things, that cannot be told from another at 32 pixels
(two bears), that come in pairs (scissors) or cannot be counted (rice).
"""

from __future__ import annotations

import csv
import io
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPRITE_FILE = Path(__file__).with_name("sprites.npz")
STYLES = ("noto", "noto-v1", "fluent-flat", "fluent")
"""The drawing styles, named after the icon sets they come from (see NOTICE)."""
Scaled = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""A sprite at one size: colours multiplied by alpha, uint8 `[side, side, 3]`, and the share of the background that
still shows, float32 `[side, side, 1]`."""
CACHE_BYTES = 96 * 2**20  # scaled sprites kept in memory; all of them at 32 pixels take about a third of it
HALF = 64
"""Side in pixels of the halved drawings from which sprites of up to half of it are made: 20 MB for all of them."""


@dataclass(frozen=True, slots=True)
class Noun:
    """One drawable thing: `name` (singular), `plural`, `article` by sound, `category`, dominant `colour`.

    `colour` names the palette colour that covers most of the object in most styles; `synonyms` are its other names, in
    lower case, which captions never use.
    """

    name: str
    plural: str
    article: str
    category: str
    colour: str
    synonyms: tuple[str, ...] = ()

    @property
    def a(self) -> str:
        """The noun with its article: "a crab", "an hourglass"."""
        return f"{self.article} {self.name}"

    def counted(self, count: int) -> str:
        """Return the form that goes with a count: "crab" for 1, "crabs" for 2 and more."""
        return self.name if count == 1 else self.plural


with Path(__file__).with_name("nouns.csv").open(encoding="utf-8", newline="") as _file:
    _ROWS = list(csv.DictReader(_file))
NOUNS: dict[str, Noun] = {
    row["name"]: Noun(
        row["name"],
        row["plural"],
        row["article"],
        row["category"],
        row["colour"],
        tuple(filter(None, row["synonyms"].split("/"))),
    )
    for row in _ROWS
}
_RANKS = {row["name"]: int(row["distinct"]) for row in _ROWS if row["distinct"]}
DISTINCT = tuple(sorted(_RANKS, key=_RANKS.__getitem__))
"""Every noun by its singular; and the names easiest to tell apart at 32 pixels, chosen by eye for outline and colour.

A world of N nouns takes the first N of `DISTINCT`, then the rest in table order.
"""

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
"""Background colours by name, as (red, green, blue) in 0-255.

The two nearest differ by about 90 in Euclidean distance, so a slightly wrong generated colour is still named rightly.
"""
_NAMES = tuple(PALETTE)
_COLOURS = np.array([PALETTE[name] for name in _NAMES], dtype=np.float32)

VISIBLE_DISTANCE = 100.0  # RGB distance from which a pixel stands out from a background
VISIBLE_SHARE = 0.6  # share of a sprite's opaque pixels that must stand out for it to be seen


def background_of(image: NDArray[np.uint8]) -> str:
    """Return the palette colour nearest to the median pixel of an image's one-pixel border.

    Raises ValueError where `image` is not uint8 `[row, column, 3]`.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [height, width, 3], found {image.dtype} {list(image.shape)}")
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    rgb = np.median(border, axis=0).astype(np.float32)
    return _NAMES[int(((_COLOURS - rgb) ** 2).sum(axis=1).argmin())]


def visible_on(sprite: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return for each palette colour in order whether a sprite (uint8 RGBA `[row, column, 4]`) can be seen on it."""
    opaque = sprite[..., :3][sprite[..., 3] >= 128].astype(np.float32)
    if not len(opaque):
        return np.zeros(len(_NAMES), dtype=bool)
    distance = np.sqrt(((opaque[:, None, :] - _COLOURS[None]) ** 2).sum(axis=2))
    shares: NDArray[np.float64] = (distance >= VISIBLE_DISTANCE).mean(axis=0)
    return shares >= VISIBLE_SHARE


class Sprites:
    """Every noun drawn in every style it has; decoded and scaled on first use, then kept.

    styles_of   for a noun its styles, three or four of `STYLES`
    seen_on     for (noun, style) the names of the background colours on which that drawing can be seen
    """

    def __init__(self) -> None:
        with np.load(SPRITE_FILE, allow_pickle=False) as file:
            names, colours, styles = (list(map(str, file[key])) for key in ("names", "colours", "styles"))
            self._blob, offsets, visible = file["blob"].tobytes(), file["offsets"].tolist(), file["visible"].tolist()
        if (colours, styles) != (list(PALETTE), list(STYLES)):
            raise ValueError(
                f"{SPRITE_FILE}: expected colours and styles {list(PALETTE)} {STYLES}, "
                f"found {colours} {tuple(styles)}; run tools/build_world.py"
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
