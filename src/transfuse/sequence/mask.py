"""The attention mask: a position sees its own document, if (the key is not later, or both are in the same image).

An image is contiguous, so the keys a position sees are always one interval: from the start of its document to itself,
or to the end of its image if that is later. Every attention backend works from these two integers per position;
`dense` is the same rule as a table, for tests and for reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .layout import Layout

ImageAttention = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class Visible:
    """Position p sees keys `start[p] <= key < end[p]`: int64 `[position]`. Never empty, because p sees itself."""

    start: np.ndarray
    end: np.ndarray

    def dense(self) -> np.ndarray:
        """Return the mask as bool `[query, key]`, True where the query sees the key."""
        key = np.arange(len(self.start))
        return (self.start[:, None] <= key) & (key < self.end[:, None])


def visible(layout: Layout, image_attention: ImageAttention = "bidirectional") -> Visible:
    """Return the keys each position sees. `causal` (Transfusion, Table 5) has no look-ahead within an image."""
    positions = np.arange(len(layout))
    first = np.flatnonzero(np.diff(layout.document, prepend=-1))
    start = first[np.cumsum(np.diff(layout.document, prepend=-1) != 0) - 1]
    end = positions + 1
    if image_attention == "bidirectional":
        for span in layout.spans:
            end[span.start : span.end] = span.end
    return Visible(start, end)
