"""Groups of documents that stand on one side of the split: they share an image, nearly or exactly, or a text.

    Fingerprint.of_image(pixels)          what an image is recognised by: its pixels, and its look
    labels = group(fingerprints, count)   the first document of each document's group
    held_out(labels, fingerprints, 100)   the documents of whole groups, 100 in all

Two images are near duplicates if their perceptual hashes differ in at most `NEAR` of 64 bits and their colours in at
most `NEAR_COLOUR`: one is the other in another size, format or brightness, or with a little cut off at its edges. Near
duplicates of near duplicates are in one group too. All of it is exact: it depends neither on order nor on processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image

SIDE = 32  # pixels to which an image is shrunk before its frequencies are taken
NEAR = 7  # bits in which near duplicates differ at most; the search below needs it below twice the number of its bands
BANDS, BAND = 4, 16  # of a hash: two within 7 bits of each other differ in at most one bit of some band
NEAR_COLOUR = (32, 16, 16)  # levels of 256 in which near duplicates' brightness, Cb and Cr differ at most
FLAT = 1.0  # a frequency must exceed the median by this much: in flat images the sign of rounding errors decides
PAIRS = 1 << 22  # candidates compared at a time

FINGERPRINT = np.dtype(
    [("document", "<u8"), ("content", "<u8"), ("seen", "?"), ("look", "<u8"), ("colour", "u1", (12,))]
)
"""a row an image of a document, or a row a document without images (seen: False)"""

_angles = np.pi * (2 * np.arange(SIDE)[None] + 1) * np.arange(8)[:, None] / (2 * SIDE)
FREQUENCIES = np.cos(_angles)  # of the cosine transform, the lowest eight


class Fingerprint(NamedTuple):
    """The marks by which an image or a text is recognised.

    content: 64 bits of a hash.
    look: the 64 bits of a perceptual hash (pHash): which low frequencies of its brightness are above the median.
    colour: mean brightness, Cb and Cr of its four quarters, 12 bytes.
    """

    content: int
    seen: bool = False
    look: int = 0
    colour: bytes = bytes(12)

    @classmethod
    def of_bytes(cls, content: bytes) -> Fingerprint:
        return cls(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little"))

    @classmethod
    def of_image(cls, pixels: np.ndarray) -> Fingerprint:
        """Return the fingerprint of uint8 `[row, column, 3]`."""
        exact = cls.of_bytes(repr(pixels.shape).encode() + pixels.tobytes())
        small = PIL.Image.fromarray(pixels).convert("YCbCr").resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
        planes = np.asarray(small, np.float64)
        low = (FREQUENCIES @ planes[..., 0] @ FREQUENCIES.T).flatten()
        low[0] = 0  # the mean, which brightness changes
        bits = low > np.median(low[1:]) + FLAT
        quarters = planes.reshape(2, SIDE // 2, 2, SIDE // 2, 3).mean((1, 3))
        colour = quarters.round().astype(np.uint8).tobytes()
        return cls(exact.content, True, int.from_bytes(np.packbits(bits).tobytes(), "big"), colour)


def group(fingerprints: np.ndarray, count: int) -> np.ndarray:
    """Return for each of `count` documents the first document of its group, int64 `[count]`.

    fingerprints: of dtype FINGERPRINT; each document has at least one.
    """
    documents = fingerprints["document"].astype(np.int64)
    _, first, same = np.unique(fingerprints["content"], return_index=True, return_inverse=True)
    labels = _joined(np.arange(count), documents[first[same]], documents)
    images = first[fingerprints["seen"][first]]
    for left, right in _near_pairs(fingerprints[images]):
        labels = _joined(labels, documents[images[left]], documents[images[right]])
    return labels


def _near_pairs(images: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the places of all images that are near duplicates, as two arrays; a pair may come several times."""
    looks, colours = images["look"], images["colour"].astype(np.int16)
    for band in range(BANDS):
        keys = (looks >> np.uint64(band * BAND) & np.uint64((1 << BAND) - 1)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for mask in (0, *(1 << bit for bit in range(BAND))):
            start, end = (np.searchsorted(ordered, ordered ^ mask, side) for side in ("left", "right"))
            if not mask:  # each pair once, and nothing with itself
                start = np.arange(1, len(ordered) + 1)
            for left, right in _ranges(start, end):
                left, right = order[left], order[right]
                near = np.bitwise_count(looks[left] ^ looks[right]) <= NEAR
                left, right = left[near], right[near]
                near = (np.abs(colours[left] - colours[right]) <= NEAR_COLOUR * 4).all(1)
                yield left[near], right[near]


def _ranges(start: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (i, j) for every i and start[i] <= j < end[i], about `PAIRS` at a time."""
    counts = np.maximum(end - start, 0)
    ends = counts.cumsum()
    begin = 0
    while begin < len(counts):
        before = ends[begin] - counts[begin]
        stop = max(begin + 1, int(np.searchsorted(ends, before + PAIRS, "right")))
        each = counts[begin:stop]
        left = np.repeat(np.arange(begin, stop), each)
        yield left, np.arange(each.sum()) - np.repeat(each.cumsum() - each, each) + np.repeat(start[begin:stop], each)
        begin = stop


def _joined(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the smallest member of each item's group, after groups that an edge (left, right) connects are joined."""
    while True:
        apart = labels[left] != labels[right]
        if not apart.any():
            return labels
        left, right = left[apart], right[apart]
        lowest, lower = np.minimum(labels[left], labels[right]), labels.copy()
        for side in (labels[left], labels[right], left, right):
            np.minimum.at(lower, side, lowest)
        while not np.array_equal(lower, lower[lower]):
            lower = lower[lower]
        labels = lower


def held_out(labels: np.ndarray, fingerprints: np.ndarray, target: int) -> np.ndarray:
    """Return the documents of whole groups, at most `target` and as near to it as they come, in ascending order.

    Groups are taken in an order that depends on their content alone, so that a set that grows keeps most of its
    held-out part. A group that is too large for what is left is passed over.
    """
    count = len(labels)
    lowest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, labels[fingerprints["document"].astype(np.int64)], fingerprints["content"])
    firsts = np.flatnonzero(labels == np.arange(count))
    sizes = np.bincount(labels, minlength=count)[firsts]
    # Of a large group the lowest hash is low: it is hashed again, so that no size comes first.
    ranks = np.array([hashlib.blake2b(key.tobytes(), digest_size=8).digest() for key in lowest[firsts]], "V8").view(
        ">u8"
    )
    left, chosen = target, np.zeros(count, bool)
    for place in np.argsort(ranks, kind="stable").tolist():
        if not left:
            break
        if sizes[place] <= left:
            chosen[firsts[place]] = True
            left -= int(sizes[place])
    return np.flatnonzero(chosen[labels])
