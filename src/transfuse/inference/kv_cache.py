"""The key-value cache, and attention over it.

The cache is a fixed number of slots of a fixed number of positions, allocated once; nothing moves when a sequence joins
or leaves. A forward pass is a list of `Segment`s: new positions of some slots, written in place, attending to all that
their sequence has cached. An image's patches are overwritten at each denoising step, so a step costs the patches alone
and the cache does not grow.

On CPU in float32 a segment's result does not depend, to the last bit, on the other segments of the pass: only segments
of equal shape share an attention call, and each call uses kernels whose rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import ModelConfig
from ..model.attention import window_start
from .cuda_graphs import GraphCache

BLOCK = 64
"""The number of keys read by a short segment is rounded up to a multiple of this, so that more rows share a call."""

FEW = 3
"""On CPU the attention of segments up to this length is two plain matrix products: in torch's own kernel these rows
of scores may be misaligned, and the result then depends on the thread that computed it."""


class KeyValueCache:
    """Keys and values of `slots` sequences: two `[depth, slot, head, position, D]`, `positions` rounded up to `BLOCK`.

    Their memory is allocated when first used, and on most systems page by page. `graphs` are the recorded passes that
    read and write it.
    """

    def __init__(
        self, config: ModelConfig, slots: int, positions: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.positions = -(-positions // BLOCK) * BLOCK
        self.shape = (config.n_layers, slots, config.kv_heads, self.positions, config.head_dim)
        self.queries = config.n_heads // config.kv_heads
        self.window, self.windowed = config.sliding_window, config.windowed
        self.dtype, self.device, self.graphs = dtype, torch.device(device), GraphCache()

    @cached_property
    def keys(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    @cached_property
    def values(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def clear(self, slot: int, start: int, end: int) -> None:
        """Zero positions of a slot, to the end of the block, so that no NaN of an earlier sequence remains."""
        end = -(-end // BLOCK) * BLOCK
        for store in (self.keys, self.values):
            store[:, slot, :, start:end].zero_()

    def views(self, slot: int, head: int, tail: int) -> list[Tensor]:
        """Return views of the first `head` positions of a slot and of its last `tail`: all that one sequence uses."""
        parts = (slice(0, head), slice(self.positions - tail, self.positions))
        return [store[:, slot, :, part] for part in parts for store in (self.keys, self.values)]


@dataclass(frozen=True, eq=False)
class Segment:
    """`count` new positions of a sequence, from `start`; its position 0 is at `origin` of the slot.

    ends: the end (exclusive) of the keys each position sees, `[count]` int64; None: all see to the segment's end, as
    the patches of one image do (and a single token).
    """

    slot: int
    start: int
    count: int
    ends: Tensor | None = None
    origin: int = 0

    @property
    def end(self) -> int:
        return self.start + self.count


class Cached:
    """An attention backend (`Attend`) for one forward pass over the flat run of these segments, in order.

    `shape` and `tensors` describe the pass for a recording: all that differs between `recorded` passes of one shape is
    in the tensors.
    """

    def __init__(self, cache: KeyValueCache, segments: Sequence[Segment], recorded: bool = False) -> None:
        def kind(numbered: tuple[int, Segment]) -> tuple[int, int, int, int, bool, bool]:
            """Return what segments of one call have in common: neighbouring slots, origins, counts, keys and masks."""
            number, segment = numbered
            # A function of the segment alone, never of its neighbours: sums of other lengths round differently.
            n_keys = segment.end
            if segment.count <= FEW:
                n_keys = min(-(-segment.end // BLOCK) * BLOCK, cache.positions - segment.origin)
            unmasked = segment.count > FEW and segment.ends is None
            hides = cache.window is not None and segment.end > cache.window
            return segment.slot - number, segment.origin, segment.count, n_keys, unmasked, hides

        self.calls: list[_Call] = []
        for (_, _, _, n_keys, _, hides), run in groupby(enumerate(segments), kind):
            self.calls.append(_Call(cache, [segment for _, segment in run], n_keys, hides, recorded))
        self.sizes = [call.positions for call in self.calls]
        self.shape = tuple(call.shape for call in self.calls)
        tensors = (tensor for call in self.calls for tensor in (*call.masks, *(call.places or ())))
        self.tensors = [tensor for tensor in tensors if tensor is not None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls, sizes = self.calls, self.sizes
        if len(calls) == 1:  # nothing to split: a percent of a decoding step
            calls[0].write(layer, k, v)
            return calls[0].attend(layer, q).to(q.dtype)
        # Everything is written before anything is read: segments of one pass may continue one another.
        for call, keys, values in zip(calls, k.split_with_sizes(sizes), v.split_with_sizes(sizes), strict=True):
            call.write(layer, keys, values)
        outputs = [call.attend(layer, query) for call, query in zip(calls, q.split_with_sizes(sizes), strict=True)]
        return torch.cat(outputs).to(q.dtype)


class _Call:
    """One attention call: neighbouring slots, `count` queries each, all with `length` keys from one origin.

    places: (slot, position) of each new position, unless all segments start at the same position; always where
    `recorded`, because a recording must not contain where they start.
    hides: a sliding window hides keys from some position.
    masks: added to the scores, of layers without and with a sliding window; `[slot, 1, query, key]`, None where every
    query sees every key; of few queries on CPU `[slot * key head, queries of all its heads, key]`.
    """

    def __init__(self, cache: KeyValueCache, run: Sequence[Segment], length: int, hides: bool, recorded: bool) -> None:
        first = run[0]
        self.rows, self.count = len(run), first.count
        self.positions = self.rows * self.count
        self.plain = cache.device.type == "cpu" and self.count <= FEW
        mask = self._mask(cache, run, length)
        self.masks = mask, self._mask(cache, run, length, windowed=True) if hides else mask
        self.windowed = cache.windowed
        unmasked = [mask is None for mask in self.masks]
        self.shape = first.slot, self.rows, self.count, first.origin, length, *unmasked
        self.places: tuple[Tensor, Tensor] | None = None
        # Views of every layer are taken at once: a decoding step has so few operations that each counts.
        slots, low = slice(first.slot, first.slot + self.rows), first.origin
        keys, values = (store[:, slots, :, low : low + length] for store in (cache.keys, cache.values))
        if self.plain:
            keys, values = keys.flatten(1, 2).transpose(2, 3), values.flatten(1, 2)
        self.keys, self.values = keys.unbind(0), values.unbind(0)
        low += first.start
        if not recorded and len({segment.start for segment in run}) == 1:
            self.new_keys, self.new_values = (
                store[:, slots, :, low : low + self.count].unbind(0) for store in (cache.keys, cache.values)
            )
            return
        places = [(part.slot, part.origin + part.start + number) for part in run for number in range(self.count)]
        slot_of, position_of = torch.tensor(places, device=cache.device).unbind(1)
        self.places = slot_of, position_of
        self.new_keys, self.new_values = cache.keys.unbind(0), cache.values.unbind(0)

    def _mask(self, cache: KeyValueCache, run: Sequence[Segment], length: int, windowed: bool = False) -> Tensor | None:
        if all(segment.ends is None for segment in run) and self.count > FEW and not windowed:
            return None
        ends = torch.tensor([[segment.end] for segment in run], device=cache.device)
        if any(segment.ends is not None for segment in run):
            to_the_end = zip(ends.expand(-1, self.count), run, strict=True)
            ends = torch.stack([end if segment.ends is None else segment.ends for end, segment in to_the_end])
        keys = torch.arange(length, device=cache.device)
        hidden = keys >= ends[..., None]
        if windowed:
            assert cache.window is not None
            starts = []
            for segment, end in zip(run, ends.expand(-1, self.count), strict=True):
                position = torch.arange(segment.start, segment.end, device=cache.device)
                starts.append(window_start(position, end, cache.window))
            hidden = hidden | (keys < torch.stack(starts)[..., None])
        if self.plain:  # `[slot, query, key]`, the queries of all heads that share keys one after another
            hidden = hidden[:, None, None].expand(-1, cache.shape[2], cache.queries, self.count, -1)
            hidden = hidden.flatten(2, 3).flatten(0, 1)
        mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=cache.device).masked_fill_(hidden, -torch.inf)
        return mask if self.plain else mask[:, None]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put new keys and values `[row * count, head, D]` into the cache."""
        for store, new in ((self.new_keys[layer], k), (self.new_values[layer], v)):
            if self.places is None:
                store.copy_(new.view(-1, self.count, *new.shape[1:]).transpose(1, 2))
            else:
                store[self.places[0], :, self.places[1]] = new.to(store.dtype)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Map queries `[row * count, head, D]` to `[row * count, head * D]`, in the dtype of the cache."""
        keys, values, mask = self.keys[layer], self.values[layer], self.masks[self.windowed[layer]]
        query = q.to(keys.dtype).view(-1, self.count, *q.shape[1:]).transpose(1, 2)  # `[row, head, count, D]`
        if self.plain:
            assert mask is not None
            few = query.reshape(keys.shape[0], -1, q.shape[-1])
            scores = torch.baddbmm(mask, few, keys, alpha=q.shape[-1] ** -0.5)
            out = torch.bmm(scores.softmax(-1), values).view_as(query)
        else:
            gqa = q.shape[1] != keys.shape[1]
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=gqa)
        return out.transpose(1, 2).reshape(self.positions, -1)
