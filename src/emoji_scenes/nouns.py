"""The vocabulary of scenes: nouns that can be drawn, and background colours with the rules that read them.

Nouns are in `nouns.csv`: concrete, countable things that can be recognised 32 pixels wide. They were chosen by looking
at every drawing. Left out are nouns whose styles show different things, that cannot be told from another at 32 pixels
(two bears), that come in pairs (scissors) or cannot be counted (rice).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


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


def _read_nouns() -> tuple[dict[str, Noun], tuple[str, ...]]:
    """Return all nouns by name, and the names that have a rank in the column `distinct`, in its order."""
    with Path(__file__).with_name("nouns.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ranks = {row["name"]: int(row["distinct"]) for row in rows if row["distinct"]}
    nouns = [
        Noun(
            row["name"],
            row["plural"],
            row["article"],
            row["category"],
            row["colour"],
            tuple(filter(None, row["synonyms"].split("/"))),
        )
        for row in rows
    ]
    return {noun.name: noun for noun in nouns}, tuple(sorted(ranks, key=ranks.__getitem__))


NOUNS, DISTINCT = _read_nouns()
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

VISIBLE_DISTANCE = 100.0
"""RGB distance from which a pixel stands out from a background."""
VISIBLE_SHARE = 0.6
"""Share of a sprite's opaque pixels that must stand out for it to be seen."""


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
