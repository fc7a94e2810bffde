"""The engine: many sequences at once, each writing or drawing, and switching at BOI and EOI (Transfusion section 3.3).

    LM step        one token per writing row, chosen from logits; BOI makes the row draw
    denoise step   the patches of every drawing row, guided, one sampler step each; never longer in the cache
    commit         the finished image is written to the cache clean, at timestep 0, with EOI behind it; writing goes on

A tick is one LM forward pass for all rows that write, and one denoise pass for all rows that draw. Noise and tokens are
drawn by (seed, image) and (seed, position), so a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Sampler, SamplerConfig, SamplerState
from ..errors import UserError
from ..export import Exported
from ..keyed import keyed
from ..sequence import Document, Layout, lay_out, visible
from .cache import KeyValueCache, Segment, cached
from .guidance import guide, null_prefix

LONGEST_CHARACTER = 4
"""bytes, so tokens at most, of one character in UTF-8"""


@dataclass(frozen=True)
class Request:
    """One sequence to go on with.

    document         the prompt: an open document
    draw             "auto": the model decides (BOI is sampled); "force": an image comes first; "never": text only
    max_tokens       most text tokens to write; max_images: most images to draw
    size             pixels (rows, columns) of an image it draws
    temperature      0 is greedy; top_p keeps the likeliest tokens that make up this much probability
    previews         give the predicted clean latent with each ImageProgress
    """

    document: Document
    draw: str = "auto"
    max_tokens: int = 64
    max_images: int = 1
    size: tuple[int, int] = (32, 32)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=25))
    guidance_scale: float = 3.0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    previews: bool = False


@dataclass(frozen=True)
class TextDelta:
    """One token the row has written, and the text it completes: empty where a character takes several tokens."""

    row: int
    text: str
    token: int


@dataclass(frozen=True)
class ImageStart:
    row: int
    number: int


@dataclass(frozen=True, eq=False)
class ImageProgress:
    """`step` of `total` denoising steps done; preview: predicted clean latent, if asked for."""

    row: int
    number: int
    step: int
    total: int
    preview: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ImageEnd:
    """The finished latent `[channel, row, column]`."""

    row: int
    number: int
    latent: Tensor


@dataclass(frozen=True)
class Done:
    """The row has ended: reason is "stop" (end of sequence), "length" (max_tokens or context) or "images"."""

    row: int
    reason: str
    text_tokens: int
    images: int
    network_evaluations: int


Event = TextDelta | ImageStart | ImageProgress | ImageEnd | Done


@dataclass(eq=False)
class _Feed:
    """New positions of one row for a forward pass; images lie at `patches` (offsets within the feed)."""

    segment: Segment
    tokens: Sequence[int]
    patches: Sequence[int] = ()
    latents: Sequence[Tensor] = ()
    timesteps: Sequence[int] = ()


@dataclass(eq=False)
class _Row:
    """A sequence on its way."""

    number: int
    request: Request
    shape: tuple[int, int, int]
    """of the latents it draws"""
    patches: int
    """of an image it draws"""
    length: int = 0
    written: int = 0
    unshown: list[int] = field(default_factory=list)
    next_token: int | None = None
    drawing: SamplerState | None = None
    finished: Tensor | None = None
    images: int = 0
    evaluations: int = 0
    done: bool = False


class Engine:
    """Runs requests against one model; holds no state between calls but the shared null prefix."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.model, self.tokenizer = exported.model, exported.tokenizer
        self.config = self.model.config
        self.device = next(self.model.parameters()).device
        self.grammar = self.tokenizer.grammar(self.config.patch_size)
        self.null_tokens = null_prefix(self.grammar, self.config.latent_channels)
        # Added to logits: BOS, EOI and ids that the tokenizer does not have are never chosen.
        self.barred = torch.zeros(self.config.vocabulary)
        self.barred[[self.grammar.bos, self.grammar.eoi]] = -torch.inf
        self.barred[self.tokenizer.vocabulary :] = -torch.inf
        self._null: KeyValueCache | None = None

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run requests together and give their events as they happen. Raises UserError before any work for bad ones."""
        layouts = [self._check(number, request) for number, request in enumerate(requests)]
        rows = [_Row(number, request, *self._drawn(request)) for number, request in enumerate(requests)]
        if not rows:
            return
        cache = self._cache(len(rows), max(self._bound(row, layout) for row, layout in zip(rows, layouts, strict=True)))
        nulls = self._cache(len(rows), len(self.null_tokens) + max(row.patches for row in rows))
        yield from self._write(
            rows, [self._prompt(cache, row, layout) for row, layout in zip(rows, layouts, strict=True)]
        )
        while not all(row.done for row in rows):
            writing = [row for row in rows if not row.done and row.drawing is None]
            if writing:
                yield from self._write(writing, [self._feed(cache, nulls, row) for row in writing])
            drawing = [row for row in rows if row.drawing is not None]
            if drawing:
                yield from self._draw(cache, nulls, drawing)

    def _check(self, number: int, request: Request) -> Layout:
        where = f"request {number}" if number else "request"
        if request.document.closed:
            raise ValueError(f"{where}: expected an open document, found a closed one")
        if request.draw not in ("auto", "force", "never"):
            raise UserError(f'{where}: draw: expected "auto", "force" or "never", found {request.draw!r}')
        factor = self.exported.autoencoder.factor * self.config.patch_size
        if min(request.size) < 1 or any(side % factor for side in request.size):
            raise UserError(f"{where}: image size: expected positive multiples of {factor}, found {request.size}")
        layout = lay_out(request.document, self.grammar)
        least = len(layout) + (self._drawn(request)[1] + 2 if request.draw == "force" else 1)
        if least > self.config.context:
            raise UserError(
                f"{where}: prompt: expected at most {self.config.context} positions with what is to come, found {least}"
            )
        return layout

    def _bound(self, row: _Row, layout: Layout) -> int:
        """The most positions a row can come to."""
        images = 0 if row.request.draw == "never" else row.request.max_images * (row.patches + 2)
        return min(self.config.context, len(layout) + row.request.max_tokens + images + 1)

    def _drawn(self, request: Request) -> tuple[tuple[int, int, int], int]:
        """Shape `[channel, row, column]` of a latent it draws, and its number of patches."""
        rows, columns = (side // self.exported.autoencoder.factor for side in request.size)
        return (self.config.latent_channels, rows, columns), rows * columns // self.config.patch_size**2

    def _cache(self, rows: int, capacity: int) -> KeyValueCache:
        # On CPU attention over a bfloat16 cache is several times slower than over a float32 one (docs/benchmarks.md).
        dtype = torch.float32 if self.device.type == "cpu" else self.model.compute
        return KeyValueCache(self.config, rows, capacity, dtype, self.device)

    def _forward(self, feeds: Sequence[_Feed], predict: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """One pass over all feeds; logits at flat positions `predict`, and a prediction per image, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        patches: list[int] = []
        for feed in feeds:
            patches.extend(len(tokens) + patch for patch in feed.patches)
            tokens.extend(feed.tokens)
            positions.extend(range(feed.segment.start, feed.segment.end))
        output = self.model(
            self._ids(tokens),
            self._ids(positions),
            cached([feed.segment for feed in feeds]),
            self._ids(predict),
            self._ids(patches),
            [latent.to(self.device) for feed in feeds for latent in feed.latents],
            self._ids([t for feed in feeds for t in feed.timesteps]),
        )
        return output.logits.float().cpu(), output.predictions

    def _ids(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _prompt(self, cache: KeyValueCache, row: _Row, layout: Layout) -> _Feed:
        """The whole prompt; its images are clean, at timestep 0."""
        ends = torch.from_numpy(visible(layout, self.config.image_attention).end).to(self.device)
        row.length = len(layout)
        return _Feed(
            Segment(cache, row.number, 0, len(layout), ends if len(layout) > 1 else None),
            layout.token.tolist(),
            np.flatnonzero(layout.image >= 0).tolist(),
            [span.image.latent for span in layout.spans],
            [0] * len(layout.spans),
        )

    def _feed(self, cache: KeyValueCache, nulls: KeyValueCache, row: _Row) -> _Feed:
        """What a writing row gives the model next: its chosen token, or a finished image and EOI."""
        start = row.length
        if row.finished is None:
            assert row.next_token is not None
            row.length += 1
            if row.next_token == self.grammar.boi:
                self._begin_image(nulls, row)
            return _Feed(Segment(cache, row.number, start, 1), [row.next_token])
        count = row.patches
        ends = torch.full((count + 1,), start + count, dtype=torch.int64, device=self.device)
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 2, device=self.device)
        ends[-1] = start + count + 1
        latent, row.finished = row.finished, None
        row.length += count + 1
        segment = Segment(cache, row.number, start, count + 1, ends)
        return _Feed(segment, [0] * count + [self.grammar.eoi], range(count), [latent], [0])

    def _write(self, rows: Sequence[_Row], feeds: Sequence[_Feed]) -> Iterator[Event]:
        """One LM pass: every row reads its feed; those that are not about to draw choose their next token."""
        last = [end - 1 for end in accumulate(feed.segment.count for feed in feeds)]
        logits, _ = self._forward(feeds, last)
        logits += self.barred
        writers = [number for number, row in enumerate(rows) if not self._may_draw(row)]
        if writers:
            logits[writers, self.grammar.boi] = -torch.inf
        for row, scores, likeliest in zip(rows, logits, logits.argmax(-1).tolist(), strict=True):
            if row.drawing is not None:
                row.next_token = None
                yield ImageStart(row.number, row.images)
            else:
                yield from self._choose(row, scores, likeliest)

    def _may_draw(self, row: _Row) -> bool:
        return (
            row.request.draw != "never"
            and row.images < row.request.max_images
            and row.length + 2 + row.patches <= self.config.context
        )

    def _choose(self, row: _Row, logits: Tensor, likeliest: int) -> Iterator[Event]:
        """Choose a row's next token from its logits `[vocabulary]`, of which `likeliest` is the largest."""
        request = row.request
        room = row.length + 1 < self.config.context
        if request.draw == "force" and row.images == 0:
            row.next_token = self.grammar.boi
            return
        if row.written >= request.max_tokens or not room:
            yield from self._finish(row, "images" if request.max_tokens == 0 else "length")
            return
        token = likeliest if request.temperature <= 0 else _sample(logits, request, row.length)
        if token == self.grammar.eos:
            yield from self._finish(row, "stop")
            return
        row.next_token = token
        if token != self.grammar.boi:
            row.written += 1
            row.unshown.append(token)
            text = self.tokenizer.decode(row.unshown)
            if text.endswith("\ufffd") and len(row.unshown) < LONGEST_CHARACTER:
                text = ""  # a character may take several tokens: wait for the rest of it
            else:
                row.unshown.clear()
            yield TextDelta(row.number, text, token)

    def _finish(self, row: _Row, reason: str) -> Iterator[Event]:
        row.done = True
        yield Done(row.number, reason, row.written, row.images, row.evaluations)

    def _begin_image(self, nulls: KeyValueCache, row: _Row) -> None:
        generator = keyed(row.request.seed, "image", row.images)
        sampler = Sampler(self.exported.process, row.request.sampler)
        row.drawing = sampler.prepare(row.shape, generator, device=self.device)
        if self._null is None:
            # The null branch starts with the same few tokens for everybody: read once, then copied.
            self._null = self._cache(1, len(self.null_tokens))
            segment = Segment(self._null, 0, 0, len(self.null_tokens), torch.arange(1, len(self.null_tokens) + 1))
            self._forward([_Feed(segment, self.null_tokens)], [])
        known = len(self.null_tokens)
        nulls.keys[:, row.number, :, :known] = self._null.keys[:, 0]
        nulls.values[:, row.number, :, :known] = self._null.values[:, 0]

    def _draw(self, cache: KeyValueCache, nulls: KeyValueCache, rows: Sequence[_Row]) -> Iterator[Event]:
        """One denoising step of every drawing row: its conditional patches, and its null ones where it is guided."""
        guided = [row for row in rows if row.request.guidance_scale != 1]
        feeds = [self._denoise(cache, row, row.length) for row in rows]
        feeds += [self._denoise(nulls, row, len(self.null_tokens)) for row in guided]
        _, predictions = self._forward(feeds, [])
        null = dict(zip([row.number for row in guided], predictions[len(rows) :], strict=True))
        for row, prediction in zip(rows, predictions, strict=False):
            assert row.drawing is not None
            if row.number in null:
                prediction = guide(prediction, null[row.number], row.request.guidance_scale)
            sampler = Sampler(self.exported.process, row.request.sampler)
            state = row.drawing = sampler.step(row.drawing, prediction)
            row.evaluations += 1
            preview = state.x0 if row.request.previews else None
            yield ImageProgress(row.number, row.images, state.index, state.total, preview)
            if state.done:
                row.finished, row.drawing = sampler.finish(state), None
                yield ImageEnd(row.number, row.images, row.finished)
                row.images += 1
                if row.request.max_tokens == 0 and row.images == row.request.max_images:
                    yield from self._finish(row, "images")

    def _denoise(self, cache: KeyValueCache, row: _Row, start: int) -> _Feed:
        assert row.drawing is not None
        count = row.patches
        ends = None
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 1, device=self.device)
        segment = Segment(cache, row.number, start, count, ends)
        return _Feed(segment, [0] * count, range(count), [row.drawing.x], [row.drawing.t])


def _sample(logits: Tensor, request: Request, position: int) -> int:
    """One id drawn from the nucleus of logits `[vocabulary]`, by (seed, position)."""
    probabilities, order = (logits / request.temperature).softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= request.top_p] = 0
    generator = keyed(request.seed, "token", position)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
