"""What the HTTP process and the worker say to each other: plain data, no torch, so that the former starts at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Job:
    """One request to the engine, as it came: texts and uint8 RGB pictures `[row, column, 3]` of any size, in order.

    The worker cuts and resizes pictures to the model's size (the middle square). None: what the model does by itself.
    start: a picture to draw from, with `strength`; mask: bool `[row, column]` of its size, True where it is drawn anew.
    """

    parts: tuple[str | np.ndarray, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of `inference.Request`"""
    steps: int | None = None
    sampler: str | None = None
    start: np.ndarray | None = None
    mask: np.ndarray | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Ready:
    """The worker has a model. facts: what a client may want to know of it."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class Accepted:
    """A job waits its turn. cost: positions that the network may compute for it; prompt: positions of its prompt."""

    number: int
    prompt: int
    cost: int


@dataclass(frozen=True)
class Refused:
    """A job can not be: one line, the client's mistake."""

    number: int
    message: str


@dataclass(frozen=True)
class Started:
    number: int


@dataclass(frozen=True)
class Said:
    """Text, as the row writes it."""

    number: int
    text: str


@dataclass(frozen=True, eq=False)
class Drawing:
    """`step` of `total` of a picture; pixels: what it looks like becoming, where a preview was asked for."""

    number: int
    image: int
    step: int
    total: int
    pixels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A finished picture, and the settings that make it again."""

    number: int
    image: int
    pixels: np.ndarray
    settings: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """reason: "stop", "length" or "images"."""

    number: int
    reason: str
    text_tokens: int
    image_positions: int
    evaluations: int


@dataclass(frozen=True)
class Failed:
    """A job ended without a result, by no fault of the client's: one line, and HTTP's word for it."""

    number: int
    message: str
    status: int = 503


JobMessage = Accepted | Refused | Started | Said | Drawing | Drawn | Ended | Failed
