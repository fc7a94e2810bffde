"""What a measure gives: numbers that can be got again, and what there is to see behind each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from ..config import to_dict
from .confidence import Estimate

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; None: as the model does unless told otherwise. Picture n has the seed `seed + n`."""

    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    candidates: int = 1
    """drawn for each prompt of words, of which the model keeps what it finds the prompt likeliest behind"""
    seed: int = 0

    @classmethod
    def sweep(cls, text: str, base: Drawing) -> list[Drawing]:
        """Read "guidance_scale=1,1.5,3": one drawing for each value. Raises ValueError for another name or value."""
        name, equals, values = text.partition("=")
        kinds: dict[str, type] = {"sampler": str, "steps": int, "guidance_scale": float, "candidates": int, "seed": int}
        if name not in kinds or not equals:
            raise ValueError(f"expected one of {', '.join(kinds)} with values, as guidance_scale=1,1.5,3, found {text}")
        settings = {item.name: getattr(base, item.name) for item in fields(base)}
        return [cls(**{**settings, name: kinds[name](value)}) for value in values.split(",")]


@dataclass(frozen=True)
class Result:
    """One number, and what it takes to get it again.

    low, high        95 % interval over items; None where there is none, as of one item
    count            items measured: pictures, captions, documents
    implementation   code, version, networks with the hash of their weights, settings of the measure
    data             which items, by name, number and a hash of their ids
    floor, ceiling   what chance, and what a reference, score by the same measure: `Metric.compared` says which they
                     are, and a model may pass a reference; None where it makes no sense
    measure, model, drawing   filled in by the registry; drawing is None where nothing was drawn
    """

    name: str
    value: float
    low: float | None
    high: float | None
    count: int
    better: Better
    implementation: str
    data: str
    floor: float | None = None
    ceiling: float | None = None
    measure: str = ""
    model: str = ""
    drawing: Drawing | None = None

    @classmethod
    def of(cls, name: str, found: Estimate, better: Better, implementation: str, data: str, **more: Any) -> Result:
        alone = found.count == 1 and found.low == found.high  # resamples of one item are all that item
        low, high = (None, None) if alone else (found.low, found.high)
        return cls(name, found.value, low, high, found.count, better, implementation, data, **more)

    def to_json(self) -> dict[str, Any]:
        return to_dict(self)


@dataclass(frozen=True, eq=False)
class Example:
    """One thing to look at: pictures `[row, column, 3]` with a line about each, words, and what was right or wrong.

    marks   (what was asked for, whether it was right, what was found instead or "")
    group   the title of those it is shown with: which they are, and how they were chosen
    """

    text: str
    pictures: Sequence[tuple[np.ndarray, str]] = ()
    marks: Sequence[tuple[str, bool, str]] = ()
    group: str = ""


@dataclass(eq=False)
class MetricResult:
    """What a measure found. `tables`: rows of further numbers under a head, such as a confusion, by name."""

    results: list[Result]
    exhibits: list[Example] = field(default_factory=list)
    tables: dict[str, list[list[Any]]] = field(default_factory=dict)
    measure: str = ""
    drawing: Drawing | None = None
    """its name, and how it drew; filled in by the registry"""

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)


def first_of(count: int, shown: int, what: str) -> str:
    """Return the title of the first `shown` of `count` items, in order."""
    return f"All {count:,} {what}, in order" if count <= shown else f"The first {shown} of {count:,} {what}, in order"


def extremes(scores: Sequence[float] | np.ndarray, shown: int, what: str, score: str) -> list[tuple[int, str]]:
    """Return the `shown` items with the highest scores and as many with the lowest, each with its group's title."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist()
    if len(order) <= 2 * shown:
        return [(number, f"All {len(order):,} {what}, the highest {score} first") for number in order]
    high, low = (f"The {shown} with the {end} {score} of {len(order):,} {what}" for end in ("highest", "lowest"))
    return [*((number, high) for number in order[:shown]), *((number, low) for number in order[: -shown - 1 : -1])]
