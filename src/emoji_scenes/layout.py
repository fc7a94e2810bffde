"""The places of things: squares that stay inside the frame and never overlap.

Everything here counts in whole units of 1/256 of the frame, so that it is exact; `Place` gives shares of the frame.
Sides are multiples of 1/32, which keeps the number of different sprite sizes, and so the cache, small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transfuse.rng import Draws

Size = Literal["small", "medium", "large"]
Relation = Literal["left of", "right of", "above", "below", "next to"]

UNITS = 256
MARGIN = 8  # least distance from the frame's edge: the border shows the background alone, which `background_of` reads
GAP = 4  # least distance between squares
SIDES: dict[Size, tuple[int, int]] = {"small": (80, 96), "medium": (104, 144), "large": (152, 224)}
"""Smallest and largest side of each size, in units, both ends included."""
POSITIONS: dict[str, tuple[int, int]] = {
    f"{row} {column}".strip() or "middle": (x, y)
    for y, row in enumerate(("top", "", "bottom"))
    for x, column in enumerate(("left", "", "right"))
}
"""The nameable places of a single thing ("top left", "top", ..., "bottom right"), as (column, row) of thirds."""
PAIR_SIZES: tuple[tuple[Size, Size], ...] = (
    *(("medium", "medium"),) * 5,
    ("small", "small"),
    ("large", "small"),
    ("small", "large"),
    ("medium", "small"),
    ("small", "medium"),
)
"""The sizes of a pair, each as often as it is listed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A square: its top left corner and its side, as shares of the frame (0 to 1)."""

    x: float
    y: float
    side: float

    @classmethod
    def of_units(cls, x: int, y: int, side: int) -> Place:
        return cls(x / UNITS, y / UNITS, side / UNITS)

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the square (x, y)."""
        return self.x + self.side / 2, self.y + self.side / 2

    def pixels(self, size: int) -> tuple[int, int, int]:
        """Return (left, top, side) in whole pixels of a frame `size` pixels a side, always inside it."""
        side = max(1, int(self.side * size + 0.5))
        return min(int(self.x * size + 0.5), size - side), min(int(self.y * size + 0.5), size - side), side

    def apart(self, other: Place) -> bool:
        """Return whether two squares keep their distance."""
        gap = GAP / UNITS
        return (
            self.x + self.side + gap <= other.x
            or other.x + other.side + gap <= self.x
            or self.y + self.side + gap <= other.y
            or other.y + other.side + gap <= self.y
        )

    def inside(self) -> bool:
        """Return whether the square keeps its distance from the frame's edge."""
        low, high = MARGIN / UNITS, 1 - MARGIN / UNITS
        return low <= self.x and low <= self.y and self.x + self.side <= high and self.y + self.side <= high


Placed = tuple[list[Size], list[tuple[Place, ...]]]
"""For each kind of thing its size, and a square for each of its copies."""


def draw_side(size: Size, draws: Draws, most: int = UNITS) -> int:
    """Draw a side from a size's range, at most `most` units."""
    low, high = SIDES[size]
    return 8 * draws.between(low // 8, min(high, most) // 8)


def draw_start(side: int, draws: Draws) -> int:
    """Draw a start, across or down, for a square anywhere inside the margins."""
    return draws.between(MARGIN, UNITS - MARGIN - side)


def single(draws: Draws, sizes: tuple[Size, ...]) -> tuple[list[Size], list[tuple[Place, ...]], str | None]:
    """Place one thing of one of these sizes; small and medium things are now and then put in a nameable place."""
    often: tuple[Size, ...] = ("small", "medium", "medium", "large", "large")
    size: Size = draws.pick([size for size in often if size in sizes])
    side = draw_side(size, draws)
    name = None
    if size != "large" and draws.chance(0.5):
        name = draws.pick(tuple(POSITIONS))
        starts = []
        for third in POSITIONS[name]:
            off = draws.between(0, 8)  # a little off at random
            starts.append((MARGIN + off, (UNITS - side) // 2 + off - 4, UNITS - MARGIN - side - off)[third])
    else:
        starts = [draw_start(side, draws) for _ in range(2)]
    return [size], [(Place.of_units(starts[0], starts[1], side),)], name


def copies(count: int, draws: Draws) -> Placed:
    """Place `count` (2 to 4) equal squares, each in its own quarter of the frame."""
    size: Size = draws.pick(("small", "medium", "medium"))
    side = draw_side(size, draws, most=112)
    return [size], [tuple(_in_quarter(quarter, side, draws) for quarter in _quarters(count, draws))]


def group(counts: list[int], draws: Draws) -> Placed:
    """Place two or three kinds of things, at most four squares in all, each in its own quarter of the frame."""
    free = _quarters(sum(counts), draws)
    sizes: list[Size] = []
    places: list[tuple[Place, ...]] = []
    for count in counts:
        size: Size = draws.pick(("small", "medium", "medium", "medium", "medium"))
        side = draw_side(size, draws, most=112)
        sizes.append(size)
        places.append(tuple(_in_quarter(free.pop(), side, draws) for _ in range(count)))
    return sizes, places


def pair(relation: Relation, draws: Draws) -> Placed:
    """Place two squares in a relation: clearly apart along its direction, their centres close across it."""
    sizes = draws.pick(PAIR_SIZES)
    most = 80 if set(sizes) == {"large", "small"} else 112
    sides = [152 if size == "large" else draw_side(size, draws, most) for size in sizes]
    flipped = relation in ("right of", "below") or (relation == "next to" and draws.chance(0.5))
    first, second = (1, 0) if flipped else (0, 1)
    slack = UNITS - 2 * MARGIN - GAP - sum(sides)
    start = draws.between(0, slack)
    along, across = [0, 0], [0, 0]
    along[first] = MARGIN + start
    along[second] = along[first] + sides[first] + GAP + draws.between(0, slack - start)
    big, small = (0, 1) if sides[0] >= sides[1] else (1, 0)
    across[big] = draw_start(sides[big], draws)
    middle = across[big] + (sides[big] - sides[small]) // 2
    across[small] = min(max(middle + draws.between(-40, 40), MARGIN), UNITS - MARGIN - sides[small])
    columns, rows = (across, along) if relation in ("above", "below") else (along, across)
    return list(sizes), [(Place.of_units(*square),) for square in zip(columns, rows, sides, strict=True)]


def _quarters(count: int, draws: Draws) -> list[int]:
    """Draw `count` different quarters of the frame in random order, numbered 0 to 3 row by row."""
    left = [0, 1, 2, 3]
    return [left.pop(draws.below(len(left))) for _ in range(count)]


def _in_quarter(quarter: int, side: int, draws: Draws) -> Place:
    """Draw a square somewhere in a quarter of the frame, clear of the other quarters."""
    half = UNITS // 2
    starts = (MARGIN, half + GAP // 2)
    ends = (half - GAP // 2, UNITS - MARGIN)
    row, column = divmod(quarter, 2)
    x = draws.between(starts[column], ends[column] - side)
    return Place.of_units(x, draws.between(starts[row], ends[row] - side), side)
