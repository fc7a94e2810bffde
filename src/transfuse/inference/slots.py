"""Who lies in which slot of the cache, and what is left there of those who are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from torch import Tensor

from ..sequence import Layout

Content = list[Hashable]
"""What has been read, one value a position: equal contents have equal keys and values."""


class Slots:
    """A fixed number of slots. What a sequence that asked for it leaves behind can be gone on from until another needs
    the slot; nobody waits because of it."""

    def __init__(self, count: int) -> None:
        self._free: list[int] = list(range(count))
        """longest free first among those with something left in them"""
        self._left: dict[int, Content] = {}

    def __len__(self) -> int:
        """Of those that are free."""
        return len(self._free)

    def take(self, content: Content | None) -> tuple[int, int]:
        """A free slot, and how many first positions of `content` are in it already: at least one is left to read.

        None: nothing left behind is of use. An empty slot is taken before one with something in it, the lowest first:
        neighbours are computed together.
        """
        known = {slot: _common(self._left.get(slot, []), content or []) for slot in self._free}
        best = max(self._free, key=lambda slot: known[slot])
        if not known[best]:
            empty = [slot for slot in self._free if slot not in self._left]
            best = min(empty) if empty else self._free[0]
        self._free.remove(best)
        self._left.pop(best, None)
        return best, known[best]

    def give_back(self, slot: int, content: Content | None) -> None:
        """Free a slot; content: what lies in it to go on from."""
        self._free.append(slot)
        if content:
            self._left[slot] = content


def _common(left: Content, content: Content) -> int:
    """Equal first positions. An image is equal as a whole or not at all."""
    most = min(len(left), len(content) - 1)
    return next((number for number in range(most) if left[number] != content[number]), max(most, 0))


def image_content(latent: Tensor, count: int) -> Content:
    """Of the patches of a clean image."""
    digest = hashlib.blake2b(latent.contiguous().cpu().numpy().tobytes(), digest_size=16)
    return [(digest.digest(), tuple(latent.shape), number) for number in range(count)]


def content_of(layout: Layout) -> Content:
    """Of a document's positions."""
    content: Content = layout.input_ids.tolist()
    for span in layout.spans:
        if not span.image.is_codes:
            content[span.start : span.end] = image_content(span.image.latent, span.patches)
    return content
