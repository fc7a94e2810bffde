"""The key-value cache: what has been read is never computed again.

One row per sequence. A forward pass is a list of `Segment`s: new positions of some rows, written into the cache where
they belong and attending to everything their row has seen. Writing an image's patches again overwrites them in place,
so a denoising step costs the patches alone, and never makes the cache longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import Attend, ModelConfig


class KeyValueCache:
    """Keys and values of `rows` sequences of at most `capacity` positions: two `[depth, row, head, position, D]`.

    They take memory when first used: a row that never draws needs no cache for its null branch.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.capacity, self.device = capacity, torch.device(device)
        self._zeros = partial(
            torch.zeros,
            (config.depth, rows, config.key_heads, capacity, config.head_channels),
            dtype=dtype,
            device=device,
        )

    @cached_property
    def keys(self) -> Tensor:
        return self._zeros()

    @cached_property
    def values(self) -> Tensor:
        return self._zeros()


@dataclass(frozen=True, eq=False)
class Segment:
    """`count` new positions of a row, from `start` on. ends: the end (exclusive) of the keys each position sees,
    `[count]` int64; None: all see to the segment's end, as the patches of one image do (and a single token)."""

    cache: KeyValueCache
    row: int
    start: int
    count: int
    ends: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + self.count


class _Call:
    """One attention call: neighbouring rows of one cache, `count` queries each, keys up to `end`.

    places: (row, position) of each new position, where they do not lie side by side from `start` on in every row.
    mask: additive, `[row, 1, query, key]`; None where every query sees every key up to `end`.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rows: slice,
        start: int,
        count: int,
        end: int,
        places: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> None:
        self.positions = count * (rows.stop - rows.start)
        self.count, self.mask, self.places = count, mask, places
        # Views of every layer are taken at once: a decoding step is made of so many small operations that each counts.
        self.keys = cache.keys[:, rows, :, :end].unbind(0)
        self.values = cache.values[:, rows, :, :end].unbind(0)
        if places is None:
            self.new_keys = cache.keys[:, rows, :, start : start + count].unbind(0)
            self.new_values = cache.values[:, rows, :, start : start + count].unbind(0)
        else:
            self.new_keys, self.new_values = cache.keys.unbind(0), cache.values.unbind(0)

    def by_row(self, x: Tensor) -> Tensor:
        """`[row * count, head, D] -> [row, head, count, D]`, a view."""
        return x.view(-1, self.count, *x.shape[1:]).transpose(1, 2)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put new keys and values `[row * count, head, D]` into the cache."""
        for store, new in ((self.new_keys[layer], k), (self.new_values[layer], v)):
            if self.places is None:
                store.copy_(self.by_row(new))
            else:
                store[self.places[0], :, self.places[1]] = new.to(store.dtype)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """`[row * count, head, D] -> [row * count, head * D]`, in the dtype of the cache."""
        keys, values = self.keys[layer], self.values[layer]
        gqa = q.shape[1] != keys.shape[1]
        query = self.by_row(q.to(keys.dtype))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask, enable_gqa=gqa)
        return out.transpose(1, 2).reshape(self.positions, -1)


def cached(segments: Sequence[Segment]) -> Attend:
    """An attention backend for one forward pass over the flat run of these segments, in order."""
    calls = _plan(segments)
    sizes = [call.positions for call in calls]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Everything is written before anything is read: rows of one pass may continue one another.
        for call, keys, values in zip(calls, k.split_with_sizes(sizes), v.split_with_sizes(sizes), strict=True):
            call.write(layer, keys, values)
        outputs = [call.attend(layer, query) for call, query in zip(calls, q.split_with_sizes(sizes), strict=True)]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(q.dtype)

    return attend


def _plan(segments: Sequence[Segment]) -> list[_Call]:
    """Join neighbouring rows into one call where they ask for the same: one token each, or equal counts and ends."""
    calls: list[_Call] = []

    def kind(numbered: tuple[int, Segment]) -> tuple[int, int, int, int, bool]:
        number, segment = numbered
        end = segment.end if segment.count > 1 else -1
        return id(segment.cache), segment.row - number, segment.count, end, segment.ends is None

    for _, members in groupby(enumerate(segments), kind):
        run = [segment for _, segment in members]
        first, device = run[0], run[0].cache.device
        count, longest = first.count, max(segment.end for segment in run)
        even = len({segment.end for segment in run}) == 1
        places = None
        if not even:
            where = [(segment.row, segment.start) for segment in run]
            rows_at, starts_at = torch.tensor(where, device=device).unbind(1)
            places = rows_at, starts_at
        ends = None
        if first.ends is not None:
            ends = torch.stack([segment.ends for segment in run if segment.ends is not None])
        elif not even:
            ends = torch.tensor([[segment.end] for segment in run], device=device)
        mask = None
        if ends is not None:
            hidden = torch.arange(longest, device=device) >= ends[..., None]
            mask = first.cache.keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]
        rows = slice(first.row, first.row + len(run))
        calls.append(_Call(first.cache, rows, first.start, count, longest, places, mask))
    return calls
