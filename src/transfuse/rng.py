"""Random numbers by key: every draw depends on the key alone, never on what was drawn before.

generator_for(seed, "noise", sample, image)     the generator of that image's noise, on any rank, after any restart
Draws("scene", seed, index)                     a stream of whole numbers and choices, without torch
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_BLOCK = 16  # 32-bit words in one 64-byte hash


def stable_hash(text: str) -> int:
    """Return a 64-bit hash of a text, the same on every machine and in every run (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_for(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by a hash of `key`; on the CPU equal keys give equal draws on every machine."""
    import torch

    return torch.Generator(device).manual_seed(stable_hash("/".join(map(str, key))) >> 1)


class Draws:
    """The draws belonging to one key: ``Draws("scene", seed, index)`` gives the same ones on every machine.

    Word k of the stream is a hash of (key, k), so nothing depends on what other keys drew before.
    """

    __slots__ = ("_key", "_position", "_words")

    def __init__(self, *key: int | str) -> None:
        self._key = "/".join(map(str, key)).encode()
        self._position = 0
        self._words: tuple[int, ...] = ()

    def word(self) -> int:
        """Return the next 32-bit word."""
        place = self._position % _BLOCK
        if place == 0:
            block = struct.pack("<Q", self._position // _BLOCK)
            self._words = struct.unpack("<16I", hashlib.blake2b(block + self._key).digest())
        self._position += 1
        return self._words[place]

    def below(self, limit: int) -> int:
        """Return a whole number in [0, limit). The bias of scaling 32 bits is below one in ten million here."""
        return self.word() * limit >> 32

    def between(self, low: int, high: int) -> int:
        """Return a whole number in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, share: float) -> bool:
        """Return True for this share of keys."""
        return self.word() < share * 4294967296.0

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, all equally likely."""
        return options[self.below(len(options))]
