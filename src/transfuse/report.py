"""HTML pages of results: the data of a page, the charts on it, and one template that shows both.

    page = Page("small-64", "What the model can do.", [Bars([Bar("accuracy", 0.8, 0.7, 0.9, chance=0.1)])])
    write_page(Path("report.html"), page)

A page needs no network and no script. It reads on a phone and a desktop, in light and dark. Jinja2 renders it
(`report.html.jinja`); `charts.py` draws its charts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from .errors import UserError, install_command
from .images import png_url
from .io import atomic_write
from .version import __version__


@dataclass(frozen=True)
class Bar:
    """One number as a bar, with its 95 % interval and marks for chance and a reference.

    A bar whose numbers are all between 0 and 1 ends at 1. Others end at their largest number; where their numbers
    differ by more than a factor of 20 the scale is logarithmic. Bars of negative numbers start at zero, in the middle.

    better       "higher", "lower", or "" where neither is
    percentage   write shares as percentages
    scale        both ends, for bars that are compared with each other; logarithmic if both are positive
    note         further words after those for the marks
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    reference: float | None = None
    better: str = "higher"
    percentage: bool = True
    scale: tuple[float, float] | None = None
    note: str = ""

    @property
    def _numbers(self) -> list[float]:
        return [v for v in (self.value, self.low, self.high, self.chance, self.reference) if v is not None]

    @property
    def is_share(self) -> bool:
        return self.better == "higher" and self.scale is None and all(0 <= number <= 1 for number in self._numbers)

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers at both ends of the bar; the scale is logarithmic if both are positive."""
        if self.scale is not None:
            return self.scale
        least, most = min(self._numbers), max(map(abs, self._numbers))
        if self.is_share:
            return 0.0, 1.0
        if least < 0:
            return -1.05 * most, 1.05 * most
        return (least / 2 if 0 < least < most / 20 else 0.0), 1.05 * most

    def at(self, number: float) -> float:
        """Return the place of a number along the bar, in percent of its length; 0 or 100 beyond its ends."""
        left, right = self.ends
        if left > 0:
            left, right, number = float(np.log(left)), float(np.log(right)), float(np.log(max(number, left)))
        return round(min(100.0, max(0.0, 100 * (number - left) / (right - left))), 2) if right > left else 0.0

    @property
    def fill(self) -> tuple[float, float]:
        """The start and the end of the bar, in percent of its length."""
        start = self.at(0.0) if self.ends[0] < 0 else 0.0
        return min(start, self.at(self.value)), max(start, self.at(self.value))

    def format(self, number: float) -> str:
        if self.scale is not None and not self.scale[0] <= number <= self.scale[1]:
            side, end = ("below", self.scale[0]) if number < self.scale[0] else ("above", self.scale[1])
            return f"{side} {plain(end)}"
        if self.is_share and self.percentage:
            return percent(number)
        return f"+{plain(number)}" if self.ends[0] < 0 and number >= 0 else plain(number)

    @property
    def text(self) -> str:
        return self.format(self.value)

    def describe(self, reference: str = "reference") -> str:
        """Return the interval, chance, reference and direction in words."""
        parts = []
        if self.low is not None and self.high is not None:
            parts.append(f"{self.format(self.low)} to {self.format(self.high)}")
        parts += [f"chance {self.format(self.chance)}"] if self.chance is not None else []
        parts += [f"{reference} {self.format(self.reference)}"] if self.reference is not None else []
        parts += ["lower is better"] if self.better == "lower" and self.scale is None else []
        parts += ["log scale"] if self.ends[0] > 0 and self.scale is None else []
        return ", ".join([*parts, self.note] if self.note else parts)


@dataclass(frozen=True, eq=False)
class Card:
    """One example: images `[row, column, 3]` with captions, text, what the model replied, and what was right.

    reply   texts and images in the order the model made them
    marks   (what was asked for, whether it was right, what the judge found instead or "")
    """

    text: str = ""
    images: Sequence[tuple[np.ndarray, str]] = ()
    marks: Sequence[tuple[str, bool, str]] = ()
    reply: Sequence[str | np.ndarray] = ()
    title: str = ""
    badge: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars under a title and a legend that says what a bar and the reference are; no legend without a label."""

    items: Sequence[Bar]
    label: str = "this model"
    reference: str = "reference"
    title: str = ""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The marks that occur, each with its words."""
        words = {"low": ("interval", "95\u202f% interval"), "chance": ("chance", "chance")}
        words["reference"] = ("reference", self.reference)
        used = [mark for name, mark in words.items() if any(getattr(bar, name) is not None for bar in self.items)]
        return [("fill", self.label), *used] if self.label else []


@dataclass(frozen=True)
class Numbers:
    """Large numbers: (label, value, note)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Cards:
    """Examples; the first `shown` are visible, the others folded. layout: "pictures" (small), "wide" or "full"."""

    items: Sequence[Card]
    title: str = ""
    layout: str = "wide"
    shown: int = 12


@dataclass(frozen=True)
class Charts:
    """Charts: (title, SVG of `draw`)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Text:
    text: str
    code: bool = False


@dataclass(frozen=True)
class Details:
    """Blocks that a reader unfolds."""

    summary: str
    blocks: Sequence[Block]


Block = Bars | Numbers | Cards | Charts | Table | Text | Details


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page: its summary fills the first screen; provenance comes last and folded."""

    title: str
    lead: str
    summary: Sequence[Block]
    sections: Sequence[Section] = ()
    provenance: Sequence[Block] = ()
    footer: str = f"Made by Transfuse {__version__}."


def render(page: Page) -> str:
    """Return a page as HTML; all text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["png"] = lambda pixels: png_url(PIL.Image.fromarray(pixels), optimize=True)
    missing = f"Charts need matplotlib: {install_command('report')}."
    return environment.get_template("report.html.jinja").render(page=page, missing_charts=missing)


def write_page(path: Path, page: Page) -> Path:
    """Write a page, atomically. Raises UserError where the file cannot be written."""
    html = render(page)
    try:
        atomic_write(path, lambda partial: partial.write_text(html, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be written ({error.strerror or error})") from None
    return path


def percent(value: float) -> str:
    return f"{100 * value:.1f}\u202f%"


def plain(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def with_interval(name: str, estimate: Any) -> dict[str, Any]:
    """Return the entries of an `evaluation.Estimate` in a report: its value, and both ends of its interval."""
    return {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value of a nested report with its name, for a table of all numbers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name} {key}".strip().replace("_", " "))
    elif isinstance(value, list):
        yield name, ", ".join(inner if isinstance(inner, str) else json.dumps(inner) for inner in value)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)
