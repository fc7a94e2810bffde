"""Which position sees which: the same document, and (an earlier position or the same image).

Within one document an image is contiguous, so what a position sees is always one interval of keys: from the start of
its document to its own position, or to the end of its image if that is later. Every attention backend works from these
two integers per position; `dense` is the same rule as a table, for tests and for reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .layout import Layout

ImageAttention = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class Visible:
    """Position p sees keys `start[p] <= key < end[p]`. Both `[position]`, int64; never empty, for p sees itself."""

    start: np.ndarray
    end: np.ndarray

    def dense(self) -> np.ndarray:
        """`[query, key]` bool."""
        key = np.arange(len(self.start))
        return (self.start[:, None] <= key) & (key < self.end[:, None])


def visible(layout: Layout, image_attention: ImageAttention = "bidirectional") -> Visible:
    """The keys each position sees. `causal` is the ablation of Transfusion's Table 5: no look-ahead within an image."""
    positions = np.arange(len(layout))
    first = np.flatnonzero(np.diff(layout.document, prepend=-1))
    start = first[np.cumsum(np.diff(layout.document, prepend=-1) != 0) - 1]
    end = positions + 1
    if image_attention == "bidirectional":
        for span in layout.spans:
            end[span.start : span.end] = span.end
    return Visible(start, end)
