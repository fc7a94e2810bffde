"""A shuffle of `range(count)` that is a function, not a list: item 17 of ten million costs what item 17 of ten costs.

    order = Shuffle(10_000_000, seed, "photos", epoch)
    order(0), order(1)                     # the first two of that epoch
    order(np.arange(1000, 2000))           # a stretch of it

Nothing is drawn, stored or passed on, so any process at any step finds the same order.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import numpy as np

Place = TypeVar("Place", int, np.ndarray)

ROUNDS = 4
_WORD = (1 << 64) - 1


class Shuffle:
    """A permutation of `range(count)`, chosen by a key.

    A Feistel network on pairs (left, right), left < a, right < b, where a * b is the smallest such product that holds
    `count`: each round adds to one half a number that depends on the other, so it can be undone, so it is one to one.
    What falls behind `count` is sent through again (cycle walking), which is at most one in about sqrt(count).
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
        """The item at a place, or the items `[n]` int64 at places `[n]`. Each must lie in `range(count)`."""
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
        mixed = _mixed_int if isinstance(item, int) else _mixed
        left, right = item // self.right, item % self.right
        for number, key in enumerate(self.keys):
            if number % 2:
                right = (right + mixed(left, key) % self.right) % self.right
            else:
                left = (left + mixed(right, key) % self.left) % self.left
        return left * self.right + right


FIRST, SECOND = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
"""of the finaliser of MurmurHash3 (public domain): 64 well mixed bits of x and a key"""


def _mixed(x: np.ndarray, key: int) -> np.ndarray:
    x = x + np.uint64(key)
    x = (x ^ (x >> 33)) * np.uint64(FIRST)
    x = (x ^ (x >> 33)) * np.uint64(SECOND)
    return x ^ (x >> 33)


def _mixed_int(x: int, key: int) -> int:
    """The same of one: numpy would take ten times as long."""
    x = (x + key) & _WORD
    x = ((x ^ (x >> 33)) * FIRST) & _WORD
    x = ((x ^ (x >> 33)) * SECOND) & _WORD
    return x ^ (x >> 33)
