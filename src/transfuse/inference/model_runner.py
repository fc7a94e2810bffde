"""The model as the engine runs it: one flat forward pass over new positions of many sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..export import Exported
from ..model import Transfusion
from ..model.layers import rotary_table
from ..model.transfusion import Output
from ..sequence import Document, Image, Images, Layout, SequenceFormat, layout_document, stacked, unconditional, visible
from .cuda_graphs import CudaGraphs, Record
from .kv_cache import Cached, KeyValueCache, Segment

Guidance = Literal["packed", "sequential"]
"""compute the branches of guided images in one pass, or in one pass each"""
GUIDANCE: tuple[Guidance, ...] = ("packed", "sequential")


@dataclass(eq=False)
class StepInput:
    """New positions of one sequence for a pass; `patches` are offsets of image patches within `tokens`."""

    segment: Segment
    tokens: Sequence[int]
    patches: Sequence[int] = ()
    latents: Sequence[Tensor] = ()
    timesteps: Sequence[int] = ()


class ModelRunner:
    """An exported model, its grammar and the null branch's prefix; holds nothing of any request.

    guidance: how its engines compute the branches of guided drawings; results are the same (`warmup`).
    record: how passes that come again are recorded (`graphs`, where there is CUDA); None: they are not.
    """

    def __init__(self, exported: Exported, graphs: bool = True) -> None:
        self.exported, self.model, self.tokenizer = exported, exported.model, exported.tokenizer
        self.config = self.model.config
        self.device = next(self.model.parameters()).device
        self.grammar = self.config.sequence_format(self.tokenizer)
        self.null_tokens = null_prefix(self.grammar, self.config.latent_channels)
        # Added to logits of text: BOS, EOI, codes and ids that the tokenizer does not have are never chosen.
        self.logit_mask = torch.zeros(self.config.vocab_size)
        self.logit_mask[[self.grammar.bos, self.grammar.eoi]] = -torch.inf
        self.logit_mask[self.tokenizer.vocab_size :] = -torch.inf
        # The last bits of a convolution depend on how many images it is given, and what is drawn for one request must
        # not depend on the others.
        self.apart = self.config.adapter == "unet" and self.device.type == "cpu"
        self.table = rotary_table(
            torch.arange(self.config.max_seq_len, device=self.device),
            self.config.head_dim,
            self.config.rope_theta,
            self.model.compute_dtype,
        )
        self.guidance: Guidance = "packed"
        self.record: Record | None = CudaGraphs() if graphs and self.device.type == "cuda" else None
        self._null: tuple[KeyValueCache, Tensor] | None = None

    def cache(self, slots: int, positions: int) -> KeyValueCache:
        # On CPU attention over a bfloat16 cache is several times slower than over a float32 one (docs/benchmarks.md).
        dtype = torch.float32 if self.device.type == "cpu" else self.model.compute_dtype
        return KeyValueCache(self.config, slots, positions, dtype, self.device)

    def drawn(self, size: tuple[int, int]) -> tuple[tuple[int, int, int], int]:
        """Shape `[channel, row, column]` of the latent of an image of so many pixels, and its number of patches or
        codes."""
        rows, columns = (side // self.exported.autoencoder.factor for side in size)
        return (self.config.latent_channels, rows, columns), self.patches(rows, columns)

    def patches(self, rows: int, columns: int) -> int:
        """How many patches a latent of so many rows and columns is cut into."""
        return rows * columns // self.config.patch_size**2

    def forward(
        self, cache: KeyValueCache, feeds: Sequence[StepInput], predict: Sequence[int]
    ) -> tuple[Tensor, Images]:
        """One pass over all feeds; logits at flat positions `predict`, and a prediction per image, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        patches: list[int] = []
        for feed in feeds:
            patches.extend(len(tokens) + patch for patch in feed.patches)
            tokens.extend(feed.tokens)
            positions.extend(range(feed.segment.start, feed.segment.end))
        latents = stacked([latent.to(self.device) for feed in feeds for latent in feed.latents])
        timesteps = [t for feed in feeds for t in feed.timesteps]
        record = self.record if isinstance(latents, Tensor) or not latents else None
        attend = Cached(cache, [feed.segment for feed in feeds], recorded=record is not None)
        ids = [self.ids(values) for values in (tokens, positions, predict, patches, timesteps)]

        def work() -> Output:
            output: Output = self.model(
                ids[0], ids[1], attend, ids[2], ids[3], latents, ids[4], separate=self.apart, table=self.table
            )
            return output

        if record is None:
            output = work()
        else:
            inputs = [*ids, *attend.tensors, *([latents] if isinstance(latents, Tensor) else [])]
            output = cache.recordings.run(record, attend.shape, inputs, work)
        return output.logits.float().cpu(), output.predictions

    def ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def read(self, layout: Layout, slot: int, origin: int = 0, known: int = 0) -> StepInput:
        """A laid-out document, but for its first `known` positions, whose images are clean, at timestep 0."""
        count = len(layout) - known
        ends = torch.from_numpy(visible(layout, self.config.image_attention)[1][known:]).to(self.device)
        segment = Segment(slot, known, count, ends if count > 1 else None, origin)
        if self.grammar.first_code is not None:
            return StepInput(segment, layout.input_ids[known:].tolist())
        patches = np.flatnonzero(layout.image[known:] >= 0).tolist()
        latents = [span.image.latent for span in layout.spans if span.start >= known]
        return StepInput(segment, layout.input_ids[known:].tolist(), patches, latents, [0] * len(latents))

    def commit(self, latent: Tensor, slot: int, start: int) -> StepInput:
        """A finished image, clean, where its patches or codes begin, and EOI."""
        if self.grammar.first_code is not None:
            # The last code has been chosen, not read.
            start, tokens = (
                start + latent.numel() - 1,
                [int(latent[-1, -1]) + self.grammar.first_code, self.grammar.eoi],
            )
            return StepInput(Segment(slot, start, 2, self.ids([start + 1, start + 2])), tokens)
        count = self.patches(*latent.shape[1:])
        ends = torch.full((count + 1,), start + count, dtype=torch.int64, device=self.device)
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 2, device=self.device)
        ends[-1] = start + count + 1
        segment = Segment(slot, start, count + 1, ends)
        return StepInput(segment, [0] * count + [self.grammar.eoi], range(count), [latent], [0])

    def null_branch(self) -> tuple[KeyValueCache, Tensor]:
        """The null branch starts with the same few tokens for everybody: read once. Its cache, and logits behind it."""
        if self._null is None:
            cache, count = self.cache(1, len(self.null_tokens)), len(self.null_tokens)
            segment = Segment(0, 0, count, torch.arange(1, count + 1, device=self.device))
            logits, _ = self.forward(cache, [StepInput(segment, self.null_tokens)], [count - 1])
            self._null = cache, logits[0]
        return self._null


def null_prefix(grammar: SequenceFormat, channels: int) -> list[int]:
    """Return the tokens before the image in the null branch, as in a training sample without its caption."""
    image = Image(torch.zeros(channels, grammar.patch_size, grammar.patch_size))
    if grammar.first_code is not None:
        image = Image(torch.zeros(1, 1, dtype=torch.int64))
    layout = layout_document(unconditional(Document([image])), grammar)
    return layout.input_ids[: layout.spans[0].start].tolist()


def compile_blocks(model: Transfusion, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a loaded model's blocks in place with torch.compile, when they first run.

    Only the code before and after attention is compiled: attention reads and writes the cache by slots. Both parts are
    the same code in every block and leave the number of positions open, so few graphs serve any depth and batch. torch
    keeps compiled code for the next start in TORCHINDUCTOR_CACHE_DIR. For its effect see docs/benchmarks.md.
    """
    for block in model.transformer.blocks:
        for name in ("project_qkv", "finish"):
            setattr(block, name, torch.compile(getattr(block, name), dynamic=True, fullgraph=True, backend=backend))
