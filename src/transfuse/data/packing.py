"""The order of documents without state: a shuffle that is a function, and samples packed into rows.

    order = Shuffle(10_000_000, seed, "photos", epoch)
    order(0), order(np.arange(1000, 2000))      # the first item of that epoch; a stretch of it

    stream   | 280  31  512  90 | 280  64 ...   lengths of samples, by number
    window    \\_______________/                 the samples of a window are packed among themselves,
    rows     | 280  90 ... | ...                one after another, each where it fits best

Nothing is drawn, stored or passed on: any process finds item i, or row r, at any step. A row is found by counting the
rows of the windows before it, from an anchor that a checkpoint holds.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ..errors import UserError

Place = TypeVar("Place", int, np.ndarray)

ROUNDS = 4
WORD = (1 << 64) - 1
FIRST, SECOND = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53  # of MurmurHash3's finaliser (public domain)
WINDOW = 8192  # samples packed among themselves: the more, the fewer positions stay empty


class Shuffle:
    """A permutation of `range(count)`, chosen by a key.

    A Feistel network on pairs (left, right), left < a, right < b, where a * b is the smallest such product of at least
    `count`: each round adds to one half a number that depends on the other, so it can be undone and is one to one.
    Results outside the range are sent through again (cycle walking), at most about one in sqrt(count).
    """

    def __init__(self, count: int, *key: int | str) -> None:
        if count < 1:
            raise ValueError(f"count: expected at least 1, found {count}")
        self.count = count
        self.left = math.isqrt(count - 1) + 1
        self.right = -(-count // self.left)
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
        self.keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __call__(self, place: Place) -> Place:
        """Return the item at a place, or int64 items `[n]` at places `[n]`. Raises ValueError outside the range."""
        if isinstance(place, np.ndarray):
            if place.size and not (place.min() >= 0 and place.max() < self.count):
                raise ValueError(f"place: expected 0 to {self.count - 1}, found {place.min()} to {place.max()}")
            items = self._pass(place.astype(np.uint64))
            while (beyond := items >= self.count).any():
                items[beyond] = self._pass(items[beyond])
            return items.astype(np.int64)
        if not 0 <= place < self.count:
            raise ValueError(f"place: expected 0 to {self.count - 1}, found {place}")
        item = self._pass(place)
        while item >= self.count:
            item = self._pass(item)
        return item

    def _pass(self, item: Place) -> Place:
        left, right = item // self.right, item % self.right
        for number, key in enumerate(self.keys):
            if number % 2:
                right = (right + _mixed(left, key) % self.right) % self.right
            else:
                left = (left + _mixed(right, key) % self.left) % self.left
        return left * self.right + right


def _mixed(x: Place, key: int) -> Place:
    """Return 64 well mixed bits of x and a key. NumPy would take ten times as long for a single number."""
    if isinstance(x, int):
        x = (x + key) & WORD
        x = ((x ^ (x >> 33)) * FIRST) & WORD
        x = ((x ^ (x >> 33)) * SECOND) & WORD
    else:
        x = x + np.uint64(key)
        x = (x ^ (x >> 33)) * np.uint64(FIRST)
        x = (x ^ (x >> 33)) * np.uint64(SECOND)
    return x ^ (x >> 33)


class Packer:
    """Packs the samples of a stream into rows; `row(r)` gives the numbers of the samples in row r, ascending.

    lengths: returns the positions of samples `[n]`; those of length 0 take no room and are in some row all the same.
    length: positions of a row. end: the number of samples in the stream.
    """

    def __init__(
        self, lengths: Callable[[Sequence[int]], np.ndarray], length: int, window: int = WINDOW, end: float = math.inf
    ) -> None:
        self.lengths, self.length, self.window, self.end = lengths, length, window, end
        self._first = 0  # the window counted from
        self._ends = [0]  # rows before window first, first + 1, ...
        self._packed = lru_cache(maxsize=4)(self._pack)

    def row(self, number: int) -> list[int]:
        """Return the samples of a row. Raises UserError for a sample longer than a row."""
        window, before = self._find(number)
        return self._packed(window)[number - before]

    def position(self, number: int) -> dict[str, int]:
        """Return what `start_from` needs to resume at a row: its window, and the number of rows before that."""
        window, before = self._find(number)
        return {"window": window, "rows": before}

    def start_from(self, position: dict[str, int]) -> None:
        """Count rows from a position, not from the beginning of the stream."""
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
        # Past its end the stream itself raises an error, so at least one sample is asked for.
        samples = range(first, int(max(first + 1, min(first + self.window, self.end))))
        lengths = self.lengths(samples).tolist()
        longest = max(lengths)
        if longest > self.length:
            raise UserError(
                f"data.row_length: expected at least {longest}, the positions of sample "
                f"{samples[lengths.index(longest)]}, found {self.length}"
            )
        rows = best_fit(lengths, self.length)
        # The fullest rows come first: what is in a step must not depend on how well it packs.
        order = Shuffle(len(rows), "rows", window)(np.arange(len(rows)))
        return [[samples[i] for i in sorted(rows[place])] for place in order]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths`, each of at most `capacity` in all: best fit, in the order of the stream.

    Longest first would fill rows half a percent better, but each with documents of one length: all text, or all
    images. One integer finds a row with room: its bit f is set if some row has f positions free.
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
