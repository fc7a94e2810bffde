"""The model as the engine runs it: one flat forward pass over new positions of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..export import Exported
from ..model import Output
from ..model.layers import rotary_table
from ..sequence import Document, Image, Images, Layout, join_positions, layout_document, stacked, unconditional, visible
from .cuda_graphs import CudaGraphs, Record
from .kv_cache import Cached, KeyValueCache, Segment

Guidance = Literal["packed", "sequential"]  # compute the branches of guided images in one pass, or in one pass each
GUIDANCE: tuple[Guidance, ...] = ("packed", "sequential")


@dataclass(eq=False)
class StepInput:
    """New positions of one sequence for a pass; `patches` are offsets of image patches within `tokens`."""

    segment: Segment
    tokens: Sequence[int]
    positions: np.ndarray  # rotary, as in `Layout`; those of text alone are a run from where the sequence stands
    patches: Sequence[int] = ()
    latents: Sequence[Tensor] = ()
    timesteps: Sequence[int] = ()


class ModelRunner:
    """An exported model, its sequence format and the null branch's prefix; it holds nothing of any request.

    guidance   how the branches of guided images are computed; results are the same (`TransfusionPipeline.warm_up`)
    record     how repeated passes are recorded: `CudaGraphs`; None: they are not
    """

    def __init__(self, exported: Exported, graphs: bool = True) -> None:
        self.exported, self.model, self.tokenizer = exported, exported.model, exported.tokenizer
        self.config, self.device = self.model.config, next(self.model.parameters()).device
        self.grammar = self.config.sequence_format(self.tokenizer)
        # The tokens before the image in the null branch, as in a training sample whose caption is dropped.
        patch = Image(torch.zeros(self.config.latent_channels, self.grammar.patch_size, self.grammar.patch_size))
        code = Image(torch.zeros(1, 1, dtype=torch.int64))
        alone = Document([patch if self.grammar.first_code is None else code])
        layout = layout_document(unconditional(alone), self.grammar)
        self.null_tokens = layout.input_ids[: layout.spans[0].start].tolist()
        # Added to logits of text: EOI, codes, ids that the tokenizer does not have, and BOS, unless it also ends a
        # text, are never chosen.
        self.logit_mask = torch.zeros(self.config.vocab_size)
        never = [id for id in (self.grammar.bos, self.grammar.eoi) if id not in self.tokenizer.ends]
        self.logit_mask[never] = -torch.inf
        self.logit_mask[self.tokenizer.vocab_size :] = -torch.inf
        # One image at a time where the last bits of a convolution depend on how many there are.
        self.separate = self.config.adapter == "unet" and self.device.type == "cpu"
        positions = torch.arange(self.config.max_seq_len, device=self.device)
        self.table = rotary_table(positions, self.config, self.model.compute_dtype)
        self.guidance: Guidance = "packed"
        self.record: Record | None = CudaGraphs() if graphs and self.device.type == "cuda" else None
        self._null: tuple[KeyValueCache, Tensor] | None = None

    def cache(self, slots: int, positions: int) -> KeyValueCache:
        """Return an empty cache; on CPU in float32, because attention over bfloat16 is several times slower there."""
        dtype = torch.float32 if self.device.type == "cpu" else self.model.compute_dtype
        return KeyValueCache(self.config, slots, positions, dtype, self.device)

    def latent_shape(self, size: tuple[int, int]) -> tuple[tuple[int, int, int], int]:
        """Return a latent's shape `[channel, row, column]` and its patches or codes, by the image's size in pixels."""
        rows, columns = (side // self.exported.autoencoder.factor for side in size)
        return (self.config.latent_channels, rows, columns), rows * columns // self.config.patch_size**2

    def forward(
        self, cache: KeyValueCache, inputs: Sequence[StepInput], predict: Sequence[int]
    ) -> tuple[Tensor, Images]:
        """Run one pass over all inputs; return logits at the flat positions `predict`, and a prediction per image."""
        tokens: list[int] = []
        patches: list[int] = []
        for step_input in inputs:
            patches.extend(len(tokens) + patch for patch in step_input.patches)
            tokens.extend(step_input.tokens)
        if (first := self.grammar.first_code) is not None:
            patches = [number for number, token in enumerate(tokens) if token >= first]
        latents = stacked([latent.to(self.device) for step_input in inputs for latent in step_input.latents])
        timesteps = [t for step_input in inputs for t in step_input.timesteps]
        # A recording reads one tensor of latents; images of several sizes have no such tensor.
        record = self.record if isinstance(latents, Tensor) or not latents else None
        attend = Cached(cache, [step_input.segment for step_input in inputs], recorded=record is not None)
        positions = join_positions([step_input.positions for step_input in inputs])
        ids = [self.ids(tokens), torch.from_numpy(positions).to(self.device)]
        ids += [self.ids(values) for values in (predict, patches, timesteps)]

        def work() -> Output:
            images = (ids[3], latents, ids[4]) if patches else ()  # without any, experts read the text tower alone
            output: Output = self.model(
                ids[0], ids[1], attend, ids[2], *images, separate=self.separate, table=self.table
            )
            return output

        if record is None:
            output = work()
        else:
            read = [*ids, *attend.tensors, *([latents] if isinstance(latents, Tensor) else [])]
            output = cache.graphs.run(record, attend.shape, read, work)
        return output.logits.float().cpu(), output.predictions

    def ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def read(self, layout: Layout, slot: int, origin: int = 0, known: int = 0) -> StepInput:
        """Return the input of a document without its first `known` positions; its images are clean, at timestep 0."""
        count, tokens, positions = len(layout) - known, layout.input_ids[known:].tolist(), layout.position_ids[known:]
        ends = torch.from_numpy(visible(layout, self.config.image_attention)[1][known:]).to(self.device)
        segment = Segment(slot, known, count, ends if count > 1 else None, origin)
        if self.grammar.first_code is not None:
            return StepInput(segment, tokens, positions)
        patches = np.flatnonzero(layout.image[known:] >= 0).tolist()
        latents = [span.image.latent for span in layout.spans if span.start >= known]
        return StepInput(segment, tokens, positions, patches, latents, [0] * len(latents))

    def commit(self, latent: Tensor, slot: int, start: int, position: int) -> StepInput:
        """Return the input of a finished image, clean, and EOI.

        Its patches or codes begin at `start` in the cache, and at the rotary position `position`.
        """
        eoi = self.grammar.eoi
        if self.grammar.first_code is not None:  # its last code has been chosen, but not read
            start, position = start + latent.numel() - 1, position + latent.numel() - 1
            tokens = [int(latent[-1, -1]) + self.grammar.first_code, eoi]
            segment = Segment(slot, start, 2, self.ids([start + 1, start + 2]))
            return StepInput(segment, tokens, np.arange(position, position + 2))
        rows, columns = self.grammar.grid(Image(latent))
        count, eoi_position = rows * columns, np.array([position + self.grammar.span(rows, columns)])
        positions = join_positions([self.grammar.patch_positions(position, rows, columns), eoi_position])
        ends = torch.full((count + 1,), start + count, dtype=torch.int64, device=self.device)
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 2, device=self.device)
        ends[-1] = start + count + 1
        segment = Segment(slot, start, count + 1, ends)
        return StepInput(segment, [0] * count + [eoi], positions, range(count), [latent], [0])

    def null_branch(self) -> tuple[KeyValueCache, Tensor]:
        """Return the cache of the null branch's prefix, and the logits after it; read once, it serves every request."""
        if self._null is None:
            count = len(self.null_tokens)
            cache = self.cache(1, count)
            segment = Segment(0, 0, count, torch.arange(1, count + 1, device=self.device))
            logits, _ = self.forward(cache, [StepInput(segment, self.null_tokens, np.arange(count))], [count - 1])
            self._null = cache, logits[0]
        return self._null
