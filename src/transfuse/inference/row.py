"""A sequence on its way through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..devices import out_of_memory
from ..diffusion import SamplerState
from ..sequence import Image, Layout
from .detokenizer import Detokenizer
from .events import Request
from .slots import Content

T = TypeVar("T")


@dataclass(frozen=True)
class Branch:
    """One of the sequences a drawing is guided by: the row's own, and others that see less of its prompt, which lie
    behind it in its slot, from `origin` on. `start`, counted from there, is where the image begins."""

    slot: int
    start: int
    origin: int = 0


@dataclass(eq=False)
class CodeDrawing:
    """An image of codes on its way: the codes so far, and every branch's logits `[codebook]` of the next one."""

    generator: torch.Generator
    logits: list[Tensor] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """A request, and how far it is."""

    number: int
    request: Request
    layout: Layout
    """of its prompt"""
    shape: tuple[int, int, int]
    """of the latents it draws"""
    patches: int
    """or codes, of an image it draws"""
    bound: int
    """the most positions it can come to"""
    beside: int
    """positions for other branches of a drawing, at the far end of its slot"""
    seen: list[Image]
    """images in its prompt, and those it has drawn"""
    detokenizer: Detokenizer
    """gives the text of what it writes"""
    content: Content | None
    """what has been read, where another may go on from it"""
    slot: int = -1
    length: int = 0
    written: int = 0
    next_token: int | None = None
    drawing: SamplerState | CodeDrawing | None = None
    branches: list[Branch] = field(default_factory=list)
    """while it draws: its own sequence, then those that see less"""
    scales: list[float] = field(default_factory=list)
    finished: Tensor | None = None
    """an image that is drawn and not yet read"""
    images: int = 0
    evaluations: int = 0
    too_large: bool = False
    """memory does not suffice for it, even alone"""


def together(rows: Sequence[Row], work: Callable[[Sequence[Row]], T]) -> list[tuple[Sequence[Row], T]]:
    """What `work` gives for all rows at once, or, where memory does not suffice, for halves of them, down to one.

    A row that is too large alone is marked, and left out. What `work` changes before it can fail, it does again.
    """
    try:
        return [(rows, work(rows))] if rows else []
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(rows) == 1:
        rows[0].too_large = True
        return []
    middle = len(rows) // 2
    return together(rows[:middle], work) + together(rows[middle:], work)
