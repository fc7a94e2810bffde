"""Attention backends. Each is built once from a batch (or a cache) and used by every block:

    attend(layer, q, k, v) -> output        q [N, H, D]; k, v [N, K, D]; output [N, H * D]

`dense` is the reference: one table of N x N, for tests. `Grouped` is what a CPU trains with: documents of like length
are computed together, so no time is spent on pairs of positions that cannot see each other. `flexible` is for CUDA:
FlexAttention over the flat run. All three read the same two integers per position (`sequence.visible`), or four where
images have noised copies (`sequence.gaps`), and for layers with a sliding window a later start.

With `ModelConfig.experts` text and image positions are computed apart, and `for_towers` makes of any backend one that
takes and returns both. Positions are sorted once a pass, without asking the device how many there are of each kind:
that follows from the shapes, so a recorded or compiled pass has none but static sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sequence import Batch
from .config import ModelConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Towers(NamedTuple):
    """Values of text and of image positions; text is None in a pass over images alone."""

    text: Any
    image: Any


AttendTowers = Callable[[int, Towers, Towers, Towers], Towers]
"""`Attend` of queries, keys and values by kind of position"""

LONGEST_EXPLICIT = 1024
"""Up to this document length bfloat16 on CPU multiplies the scores out; longer ones would take too much memory."""

BLOCK = 128
"""queries, and keys, in a block of FlexAttention's mask (its default)"""


def for_batch(batch: Batch, dtype: torch.dtype, config: ModelConfig | None = None) -> Attend:
    """Return the training backend for a batch: FlexAttention on CUDA, documents grouped by length elsewhere.

    config has the sliding windows of the layers; None: there are none.
    """
    if batch.input_ids.is_cuda:
        return flexible(batch, config)
    return Grouped(batch, dtype, config)


def starts_of(batch: Batch, config: ModelConfig | None) -> list[Tensor]:
    """Return the first key that each position sees, `[N]`; if layers have a sliding window, also the first in it."""
    starts = [batch.kv_start]
    if config is not None and config.sliding_window is not None:
        position = torch.arange(batch.positions, device=batch.kv_start.device)
        late = batch.kv_start.maximum(window_start(position, batch.kv_end, config.sliding_window))
        if batch.gaps is not None:  # a noised copy sees what its original sees before itself
            first, end = batch.gaps
            late = late[torch.where(first < end, position + first - end, position)]
        starts.append(late)
    return starts


def window_start(position: Tensor, end: Tensor, window: int) -> Tensor:
    """Return the first key inside a sliding window, `[N]`, or of the own image, if that begins earlier.

    position [N], end [N]   consecutive positions, and the end of the keys that each sees: patches see to one end, that
                            of their image, and a token sees up to itself
    """
    image_start = position[0] + torch.searchsorted(end.contiguous(), end.contiguous())
    return (position - window + 1).minimum(image_start).clamp(min=0)


def dense(batch: Batch, config: ModelConfig | None = None) -> Attend:
    """Attend over all pairs of positions with a mask, in N x N memory: the oracle for the other backends."""
    key = torch.arange(batch.positions, device=batch.input_ids.device)
    masks = [(start[:, None] <= key) & (key < batch.kv_end[:, None]) for start in starts_of(batch, config)]
    if batch.gaps is not None:
        masks = [mask & ((key < batch.gaps[0, :, None]) | (batch.gaps[1, :, None] <= key)) for mask in masks]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = masks[-1] if config is not None and config.windowed[layer] else masks[0]
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1).flatten(1)

    return attend


class _Select(torch.autograd.Function):
    """`x[index]` with a known `inverse`: its gradient is a selection too, much faster than an index_add.

    `blank` lists padding rows of the output, `back` padding rows of the input: both are zero.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, blank: Tensor | None, back: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.back = back
        out = x.index_select(0, index)
        return out if blank is None else out.index_fill_(0, blank, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse,) = ctx.saved_tensors
        out = gradient.index_select(0, inverse)
        return (out if ctx.back is None else out.index_fill_(0, ctx.back, 0)), None, None, None, None


class Grouped:
    """Attention over documents grouped by length, as `[document, length]` slots.

    Lengths are padded to a multiple of 8 and the number of documents to a multiple of 4, so that batches have few
    shapes: a matrix kernel is prepared, and kept in memory, for every shape it meets. Equal lengths need no padding.

    In float32 a group goes through SDPA; in bfloat16 on CPU attention is multiplied out (`_Explicit`), because SDPA's
    backward is several times slower there (docs/benchmarks.md).
    """

    def __init__(self, batch: Batch, dtype: torch.dtype, config: ModelConfig | None = None) -> None:
        device = batch.input_ids.device
        self.windowed = None if config is None else config.windowed
        visible_from = [start.cpu() for start in starts_of(batch, config)]
        lengths = torch.tensor(batch.documents)
        starts = lengths.cumsum(0) - lengths
        uniform = len(set(batch.documents)) == 1
        padded = lengths if uniform else (lengths + 7) // 8 * 8
        # Documents, length, additive masks [document, 1, query, key] of layers without and with a window.
        self.groups: list[tuple[int, int, list[Tensor]]] = []
        index: list[Tensor] = []
        inverse = torch.empty(batch.positions, dtype=torch.int64)
        slots = 0
        for length in sorted(set(padded.tolist())):
            members = torch.nonzero(padded == length).flatten()
            real = torch.arange(len(members) if uniform else (len(members) + 3) // 4 * 4) < len(members)
            members = torch.cat([members, members[:1].expand(len(real) - len(members))])
            offset = torch.arange(length)
            inside = (offset < lengths[members, None]) & real[:, None]
            # A padding slot repeats its document's first position, which sees itself: no softmax is empty.
            position = torch.where(inside, starts[members, None] + offset, starts[members, None])
            index.append(position.flatten())
            inverse[position[inside]] = slots + torch.nonzero(inside.flatten()).flatten()
            slots += position.numel()
            seen = batch.kv_end.cpu()[position] - starts[members, None]
            hidden = offset >= torch.where(inside, seen, 1)[..., None]
            if batch.gaps is not None:
                first, end = (batch.gaps.cpu()[:, position] - starts[members, None])[..., None]
                hidden |= (first <= offset) & (offset < end)
            masks = []
            for start in visible_from:
                begin = torch.where(inside, start[position] - starts[members, None], 0)[..., None]
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden | (offset < begin), float("-inf"))
                masks.append(mask[:, None].to(device))
            self.groups.append((len(members), length, masks))
        self.index, self.inverse = torch.cat(index).to(device), inverse.to(device)
        self.in_order = slots == batch.positions and bool((self.index == torch.arange(slots, device=device)).all())
        filled = torch.zeros(slots, dtype=torch.bool)
        filled[inverse] = True
        self.padding = torch.nonzero(~filled).flatten().to(device) if slots > batch.positions else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.in_order:
            # A view would keep all of q, k and v in memory until the backward pass.
            return self.over_slots(layer, q, k, v.contiguous())
        q, k, v = (_Select.apply(x, self.index, self.inverse, self.padding, None) for x in (q, k, v))
        return _Select.apply(self.over_slots(layer, q, k, v), self.inverse, self.index, None, self.padding)

    def over_slots(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend within the documents of `[slots, head, D]`; padding slots must be zero."""
        kind = -1 if self.windowed is not None and self.windowed[layer] else 0
        sizes = [documents * length for documents, length, _ in self.groups]
        # Split, not sliced: the gradient of each slice would be as long as the whole, and added to that of the others.
        parts = zip(*(x.split(sizes) if len(sizes) > 1 else [x] for x in (q, k, v)), strict=True)
        outputs = []
        for (documents, length, masks), part in zip(self.groups, parts, strict=True):
            mask = masks[kind]
            a, b, c = (x.view(documents, length, *x.shape[1:]).transpose(1, 2) for x in part)
            if q.dtype == torch.bfloat16 and not q.is_cuda and length <= LONGEST_EXPLICIT:
                if a.shape[1] != b.shape[1]:
                    b, c = (x.repeat_interleave(a.shape[1] // x.shape[1], dim=1) for x in (b, c))
                attended = _Explicit.apply(a, b, c, mask)
            else:
                attended = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, enable_gqa=a.shape[1] != b.shape[1])
            outputs.append(attended.transpose(1, 2).reshape(documents * length, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Merge(torch.autograd.Function):
    """Put rows of text and of images into one tensor at `text` and `image`; `blank` lists its other rows, all zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, text: Tensor, image: Tensor, rows: int, blank: Tensor | None) -> Tensor:
        ctx.save_for_backward(text, image)
        return _merged(x, y, text, image, rows, blank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        text, image = ctx.saved_tensors
        return gradient.index_select(0, text), gradient.index_select(0, image), None, None, None, None


class _Divide(torch.autograd.Function):
    """The inverse of `Merge`: the rows at `text` and those at `image`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: Tensor, image: Tensor, blank: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(text, image)
        ctx.rows, ctx.blank = len(x), blank
        return x.index_select(0, text), x.index_select(0, image)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        text, image = ctx.saved_tensors
        return _merged(gradients[0], gradients[1], text, image, ctx.rows, ctx.blank), None, None, None


def _merged(x: Tensor, y: Tensor, text: Tensor, image: Tensor, rows: int, blank: Tensor | None) -> Tensor:
    out = x.new_empty(rows, *x.shape[1:]).index_copy_(0, text, x).index_copy_(0, image, y)
    return out if blank is None else out.index_fill_(0, blank, 0)


def for_towers(attend: Attend, text: Tensor, image: Tensor) -> AttendTowers:
    """Return the backend of both towers over `attend`, given the text and the image positions of the pass.

    `Grouped` regroups rows by document in any case, so its regrouping takes and returns them by kind at no extra cost.
    """
    inner, rows, blank = attend, len(text) + len(image), None
    if isinstance(attend, Grouped):
        inner, rows, blank = attend.over_slots, len(attend.index), attend.padding
        text, image = attend.inverse.index_select(0, text), attend.inverse.index_select(0, image)

    def attend_towers(layer: int, q: Towers, k: Towers, v: Towers) -> Towers:
        q_all, k_all, v_all = (Merge.apply(*x, text, image, rows, blank) for x in (q, k, v))
        return Towers(*_Divide.apply(inner(layer, q_all, k_all, v_all), text, image, blank))

    return attend_towers


class _Explicit(torch.autograd.Function):
    """Attention by plain matrix products; scores and softmax are float32.

    q, k, v are `[document, head, position, channel]`, the additive mask `[document, 1, query, key]`. Rounding the
    scores to bfloat16 would add several times the error of everything else.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        scores = torch.bmm(q.float().mul_(q.shape[-1] ** -0.5), k.float().transpose(1, 2))
        shares = scores.view(*shape[:3], -1).add_(mask).softmax(-1).to(q.dtype).view_as(scores)
        ctx.save_for_backward(q, k, v, shares)
        return torch.bmm(shares, v).view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, shares = ctx.saved_tensors
        shape, gradient = gradient.shape, gradient.reshape(q.shape)
        of_shares = torch.bmm(gradient, v.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_scores.mul_(q.shape[-1] ** -0.5)
        of_q, of_k = torch.bmm(of_scores, k), torch.bmm(of_scores.transpose(1, 2), q)
        of_v = torch.bmm(shares.transpose(1, 2), gradient)
        return of_q.view(shape), of_k.view(shape), of_v.view(shape), None


def flexible(batch: Batch, config: ModelConfig | None = None) -> Attend:
    """FlexAttention over the flat run, for CUDA (its backward does not support CPU).

    One block mask per batch, or two where some layers have a sliding window.

    A batch with the same number of positions as an earlier one compiles nothing, neither the kernel nor a compiled
    `Block` that takes `attend` as an argument: Dynamo compares functions by code and closure and tensors by size, so a
    new `attend` per batch is fine, but all sizes must follow from the number of positions. `layer` only tells
    which mask, so that all blocks of a kind share one graph. Compared with the oracle and timed in docs/benchmarks.md.
    """
    masks = [block_mask(start, batch.kv_end, batch.gaps) for start in starts_of(batch, config)]
    windowed, kernel = None if config is None else config.windowed, _compiled_flex_attention()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.contiguous()  # as in `Grouped`: a view would keep all of q, k and v until the backward pass
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = masks[-1] if windowed is not None and windowed[layer] else masks[0]
        out = kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1).flatten(1)

    return attend


def block_mask(start: Tensor, end: Tensor, gaps: Tensor | None = None) -> BlockMask:
    """Return the blocks of `BLOCK` x `BLOCK` that FlexAttention skips, masks, or computes unmasked.

    start [N], end [N]   the keys each position sees, itself among them
    gaps [2, N]          first and end of the keys between those that it does not see, equal where it sees all

    The result equals `create_block_mask`, in memory N + blocks x blocks instead of N x N: the keys of a position are at
    most two intervals, and each adds one to a run of blocks. A block is computed if any query of its row sees a key in
    it, and unmasked if every query sees all of it. Tables have a column for every block, visible or not, so that sizes
    follow from N.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (start[query] <= key) & (key < end[query])

    def seen_with_gaps(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert gaps is not None
        return seen(b, h, query, key) & ((key < gaps[0][query]) | (gaps[1][query] <= key))

    positions = len(start)
    blocks = -(-positions // BLOCK)
    intervals = [(start, end)]
    if gaps is not None:
        split = gaps[0] < gaps[1]
        intervals = [(start, torch.where(split, gaps[0], end)), (torch.where(split, gaps[1], end), end)]
    row = torch.arange(positions, device=start.device) // BLOCK * (blocks + 1)
    # For each row of blocks, the queries that see a key of each block, and those that see all of it, as differences of
    # neighbouring columns.
    change = torch.zeros(2, blocks * (blocks + 1), dtype=torch.int32, device=start.device)
    ones = torch.ones_like(row, dtype=torch.int32)
    for low, high in intervals:
        for counts, first, last in (
            (change[0], low // BLOCK, torch.where(low < high, -(-high // BLOCK), low // BLOCK)),
            (change[1], -(-low // BLOCK), torch.maximum(-(-low // BLOCK), high // BLOCK)),
        ):
            counts.index_add_(0, row + first, ones).index_add_(0, row + last, -ones)
    partial, complete = change.view(2, blocks, blocks + 1).cumsum(-1, dtype=torch.int32)[..., :-1]
    whole = complete == BLOCK  # never where the last row has fewer queries
    partly = (partial > 0) & ~whole
    # For each row of blocks: the number of true columns, and all columns, true ones first; with axes for batch and
    # heads. All four tables at once take about twenty small operations, `BlockMask.from_kv_blocks` sixty more.
    tables = torch.stack([partly, whole, partly.T, whole.T])
    counts = tables.sum(-1, dtype=torch.int32)[:, None, None]
    columns = tables.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)[:, None, None]
    return BlockMask(
        seq_lengths=(positions, positions),
        kv_num_blocks=counts[0],
        kv_indices=columns[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=columns[1],
        q_num_blocks=counts[2],
        q_indices=columns[2],
        full_q_num_blocks=counts[3],
        full_q_indices=columns[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=seen if gaps is None else seen_with_gaps,
    )


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Return the kernel shared by all batches; a second number of positions makes its sizes dynamic."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
