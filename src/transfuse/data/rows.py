"""Samples packed into rows of a fixed number of positions, planned from lengths alone.

    stream   | 280  31  512  90 | 280  64 ...          lengths of samples, by number
    window    \\_______________/                        the samples of a window are packed among themselves,
    rows     | 280  90 ... | ...                       one after another, each where it fits best

Row r is a function of r: any process finds it by counting the rows of the windows before it, from an anchor that a
checkpoint holds, so that going on does not mean counting from the beginning.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from ..errors import UserError
from .shuffle import Shuffle

WINDOW = 8192
"""samples packed among themselves: the more, the fewer positions stay empty"""


class Rows:
    """`row(r)` gives the numbers of the samples in row r, in ascending order.

    lengths     gives the positions of samples; those of length 0 take no room and are in some row all the same
    length      positions of a row
    end         number of the first sample that there is not
    """

    def __init__(
        self, lengths: Callable[[Sequence[int]], np.ndarray], length: int, window: int = WINDOW, end: float = math.inf
    ) -> None:
        self.lengths, self.length, self.window, self.end = lengths, length, window, end
        self._first = 0  # the window that is counted from
        self._ends = [0]  # rows before window first, first + 1, ...
        self._packed = lru_cache(maxsize=4)(self._pack)

    def row(self, number: int) -> list[int]:
        """Raises UserError where a sample is longer than a row."""
        window, before = self._find(number)
        return self._packed(window)[number - before]

    def position(self, number: int) -> dict[str, int]:
        """What `start_from` needs to go on at a row: its window, and the rows before that."""
        window, before = self._find(number)
        return {"window": window, "rows": before}

    def start_from(self, position: dict[str, int]) -> None:
        self._first, self._ends = position["window"], [position["rows"]]

    def _find(self, number: int) -> tuple[int, int]:
        if number < self._ends[0]:
            self._first, self._ends = 0, [0]
        while self._ends[-1] <= number:
            self._ends.append(self._ends[-1] + len(self._packed(self._first + len(self._ends) - 1)))
        place = bisect_right(self._ends, number) - 1
        return self._first + place, self._ends[place]

    def _pack(self, window: int) -> list[list[int]]:
        first = window * self.window
        # Behind the end the stream says itself that there is nothing more.
        samples = range(first, int(max(first + 1, min(first + self.window, self.end))))
        lengths = self.lengths(samples).tolist()
        longest = max(lengths)
        if longest > self.length:
            raise UserError(
                f"data.row_length: expected at least {longest}, the positions of sample "
                f"{samples[lengths.index(longest)]}, found {self.length}"
            )
        rows = pack(lengths, self.length)
        # The fullest rows come first: what is in a step must not depend on how well it packs.
        order = Shuffle(len(rows), "rows", window)(np.arange(len(rows)))
        return [[samples[i] for i in sorted(rows[place])] for place in order]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices of `lengths`, each of at most `capacity` in all: best fit, in the order of the stream.

    Longest first would fill rows half a percent better, but each with documents of one length: all text, or all
    pictures. Rows with room are found in one integer, bit f of which says that some row has f free.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for index, length in enumerate(lengths):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        free |= 1 << room - length
    return rows
