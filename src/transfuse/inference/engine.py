"""The engine: many sequences at once, each writing or drawing, and switching at BOI and EOI (Transfusion section 3.3).

    LM step        one token per writing row, chosen from logits; BOI makes the row draw
    denoise step   the patches of every drawing row, guided, one sampler step each; never longer in the cache
    commit         the finished image is written to the cache clean, at timestep 0, with EOI behind it; writing goes on

A tick is one LM forward pass for all rows that write, and one denoise pass for all rows that draw. A Chameleon draws by
codes: instead of a denoise step, one code of every drawing row, from guided logits of codes alone, until there are
exactly as many as the image has; text is chosen from ids of text alone. Noise and tokens are
drawn by (seed, image) and (seed, position), so a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Sampler, SamplerState
from ..errors import UserError
from ..export import Exported
from ..keyed import keyed
from ..sequence import Document, Image, Layout, Text, lay_out, visible
from .cache import KeyValueCache, Segment, cached
from .events import Done, Event, ImageEnd, ImageProgress, ImageStart, Request, TextDelta
from .guidance import guide, null_prefix

LONGEST_CHARACTER = 4
"""bytes, so tokens at most, of one character in UTF-8"""


@dataclass(eq=False)
class _Feed:
    """New positions of one row for a forward pass; images lie at `patches` (offsets within the feed)."""

    segment: Segment
    tokens: Sequence[int]
    patches: Sequence[int] = ()
    latents: Sequence[Tensor] = ()
    timesteps: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class _Branch:
    """One of the sequences a drawing is guided by: the row's own, and others that see less of its prompt. `start` is
    where the image's patches or codes begin in the branch's cache."""

    cache: KeyValueCache
    row: int
    start: int


@dataclass(eq=False)
class _CodeDrawing:
    """An image of codes on its way: the codes so far, and every branch's logits `[codebook]` of the next one."""

    generator: torch.Generator
    logits: list[Tensor]
    codes: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Row:
    """A sequence on its way."""

    number: int
    request: Request
    shape: tuple[int, int, int]
    """of the latents it draws"""
    patches: int
    """or codes, of an image it draws"""
    seen: list[Image]
    """images in its prompt, and those it has drawn"""
    length: int = 0
    written: int = 0
    shown: list[int] = field(default_factory=list)
    """the last tokens whose text is out, or those of the prompt"""
    unshown: list[int] = field(default_factory=list)
    next_token: int | None = None
    drawing: SamplerState | _CodeDrawing | None = None
    branches: list[_Branch] = field(default_factory=list)
    """while it draws: its own sequence, then those that see less"""
    scales: list[float] = field(default_factory=list)
    finished: Tensor | None = None
    images: int = 0
    evaluations: int = 0
    done: bool = False


@dataclass(frozen=True, eq=False)
class _Caches:
    """Of the rows themselves, of their null branches, and of those that see their images alone."""

    rows: KeyValueCache
    nulls: KeyValueCache
    images: KeyValueCache


class Engine:
    """Runs requests against one model; holds no state between calls but the shared null prefix."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.model, self.tokenizer = exported.model, exported.tokenizer
        self.config = self.model.config
        self.device = next(self.model.parameters()).device
        self.grammar = self.config.grammar(self.tokenizer)
        self.null_tokens = null_prefix(self.grammar, self.config.latent_channels)
        # Added to logits of text: BOS, EOI, codes and ids that the tokenizer does not have are never chosen.
        self.barred = torch.zeros(self.config.ids)
        self.barred[[self.grammar.bos, self.grammar.eoi]] = -torch.inf
        self.barred[self.tokenizer.vocabulary :] = -torch.inf
        self._null: tuple[KeyValueCache, Tensor] | None = None

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run requests together and give their events as they happen. Raises UserError before any work for bad ones."""
        layouts = [self._check(number, request) for number, request in enumerate(requests)]
        rows = [
            _Row(number, request, *self._drawn(request), list(request.document.images))
            for number, request in enumerate(requests)
        ]
        if not rows:
            return
        capacity = max(self._bound(row, layout) for row, layout in zip(rows, layouts, strict=True))
        null_capacity = len(self.null_tokens) + max(row.patches for row in rows)
        caches = _Caches(*(self._cache(len(rows), size) for size in (capacity, null_capacity, capacity)))
        yield from self._write(
            rows, [self._prompt(caches.rows, row, layout) for row, layout in zip(rows, layouts, strict=True)]
        )
        draw = self._draw_codes if self.grammar.first_code is not None else self._denoise
        while not all(row.done for row in rows):
            writing = [row for row in rows if not row.done and row.drawing is None]
            if writing:
                yield from self._write(writing, [self._feed(caches, row) for row in writing])
            drawing = [row for row in rows if row.drawing is not None]
            if drawing:
                yield from draw(drawing)

    def _check(self, number: int, request: Request) -> Layout:
        where = f"request {number}" if number else "request"
        if request.document.closed:
            raise ValueError(f"{where}: expected an open document, found a closed one")
        if request.draw not in ("auto", "force", "never"):
            raise UserError(f'{where}: draw: expected "auto", "force" or "never", found {request.draw!r}')
        if self.config.images == "none" and (request.draw == "force" or request.document.images):
            found = "an image" if request.document.images else 'draw "force"'
            raise UserError(f"{where}: expected text alone, for the model knows no images, found {found}")
        if request.draw == "force" and request.max_images < 1:
            raise UserError(f"{where}: max_images: expected at least 1 where one is forced, found {request.max_images}")
        for name in ("top_p", "code_top_p"):
            if not 0 < getattr(request, name) <= 1:
                raise UserError(f"{where}: {name}: expected a share above 0, at most 1, found {getattr(request, name)}")
        for image in request.document.images:
            if image.coded and not 0 <= int(image.latent.min()) <= int(image.latent.max()) < self.config.codebook:
                found = f"{int(image.latent.min())} to {int(image.latent.max())}"
                raise UserError(f"{where}: image: expected codes from 0 to {self.config.codebook - 1}, found {found}")
        factor = self.exported.autoencoder.factor * self.config.patch_size
        if self.config.images == "none":
            factor = 1
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
        never = row.request.draw == "never" or self.config.images == "none"
        images = 0 if never else row.request.max_images * (row.patches + 2)
        return min(self.config.context, len(layout) + row.request.max_tokens + images + 1)

    def _drawn(self, request: Request) -> tuple[tuple[int, int, int], int]:
        """Shape `[channel, row, column]` of a latent it draws, and its number of patches or codes."""
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
        row.length = len(layout)
        last = row.request.document.parts[-1] if row.request.document.parts else None
        row.shown = list(last.ids[-LONGEST_CHARACTER:]) if isinstance(last, Text) else []
        return self._read(cache, row.number, layout)

    def _read(self, cache: KeyValueCache, row: int, layout: Layout) -> _Feed:
        ends = torch.from_numpy(visible(layout, self.config.image_attention).end).to(self.device)
        segment = Segment(cache, row, 0, len(layout), ends if len(layout) > 1 else None)
        if self.grammar.first_code is not None:
            return _Feed(segment, layout.token.tolist())
        patches = np.flatnonzero(layout.image >= 0).tolist()
        latents = [span.image.latent for span in layout.spans]
        return _Feed(segment, layout.token.tolist(), patches, latents, [0] * len(latents))

    def _feed(self, caches: _Caches, row: _Row) -> _Feed:
        """What a writing row gives the model next: its chosen token, or a finished image and EOI."""
        start, cache = row.length, caches.rows
        if row.finished is None:
            assert row.next_token is not None
            row.length += 1
            if row.next_token == self.grammar.boi:
                self._begin_image(caches, row)
            return _Feed(Segment(cache, row.number, start, 1), [row.next_token])
        count = row.patches
        latent, row.finished = row.finished, None
        row.length += count + 1
        if self.grammar.first_code is not None:
            # The last code has been chosen, not read.
            ends = torch.tensor([start + count, start + count + 1], device=self.device)
            tokens = [int(latent[-1, -1]) + self.grammar.first_code, self.grammar.eoi]
            return _Feed(Segment(cache, row.number, start + count - 1, 2, ends), tokens)
        ends = torch.full((count + 1,), start + count, dtype=torch.int64, device=self.device)
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 2, device=self.device)
        ends[-1] = start + count + 1
        segment = Segment(cache, row.number, start, count + 1, ends)
        return _Feed(segment, [0] * count + [self.grammar.eoi], range(count), [latent], [0])

    def _write(self, rows: Sequence[_Row], feeds: Sequence[_Feed]) -> Iterator[Event]:
        """One LM pass: every row reads its feed; those that are not about to draw choose their next token."""
        last = [end - 1 for end in accumulate(feed.segment.count for feed in feeds)]
        logits, _ = self._forward(feeds, last)
        for row, scores in zip(rows, logits, strict=True):
            if isinstance(row.drawing, _CodeDrawing):
                row.drawing.logits.insert(0, scores[self.grammar.first_code :].clone())
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
            and self.config.images != "none"
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
        token = likeliest
        if request.temperature > 0:
            generator = keyed(request.seed, "token", row.length)
            token = _sample(logits, request.temperature, request.top_p, generator)
        if token == self.grammar.eos:
            yield from self._finish(row, "stop")
            return
        row.next_token = token
        if token != self.grammar.boi:
            row.written += 1
            row.unshown.append(token)
            # Behind what was shown: alone, the first token of a word loses its space with some tokenizers.
            before = self.tokenizer.decode(row.shown)
            text = self.tokenizer.decode([*row.shown, *row.unshown]).removeprefix(before)
            if text.endswith("\ufffd") and len(row.unshown) < LONGEST_CHARACTER:
                text = ""  # a character may take several tokens: wait for the rest of it
            else:
                row.shown = [*row.shown, *row.unshown][-LONGEST_CHARACTER:]
                row.unshown.clear()
            yield TextDelta(row.number, text, token)

    def _finish(self, row: _Row, reason: str) -> Iterator[Event]:
        row.done = True
        yield Done(row.number, reason, row.written, row.images, row.evaluations)

    def _begin_image(self, caches: _Caches, row: _Row) -> None:
        """Set up the drawing of the image that begins at `row.length`, and the branches it is guided by."""
        request = row.request
        generator = keyed(request.seed, "image", row.images)
        row.branches, row.scales = [_Branch(caches.rows, row.number, row.length)], []
        logits: list[Tensor] = []
        scale, image_scale = request.guidance_scale, request.image_guidance_scale
        if image_scale is not None and row.seen:
            parts = [replace(image, target=False) for image in row.seen]
            layout = lay_out(Document(parts, closed=False), self.grammar)
            feed = self._read(caches.images, row.number, layout)
            boi = _Feed(Segment(caches.images, row.number, len(layout), 1), [self.grammar.boi])
            found, _ = self._forward([feed, boi], [len(layout)])
            logits.append(found[0])
            row.branches.append(_Branch(caches.images, row.number, len(layout) + 1))
            row.scales.append(scale)
            scale = image_scale
        if scale != 1:
            cache, found = self._null_branch()
            known = len(self.null_tokens)
            caches.nulls.keys[:, row.number, :, :known] = cache.keys[:, 0]
            caches.nulls.values[:, row.number, :, :known] = cache.values[:, 0]
            logits.append(found)
            row.branches.append(_Branch(caches.nulls, row.number, known))
            row.scales.append(scale)
        if self.grammar.first_code is not None:
            row.drawing = _CodeDrawing(generator, [scores[self.grammar.first_code :] for scores in logits])
        else:
            sampler = Sampler(self.exported.process, request.sampler)
            row.drawing = sampler.prepare(row.shape, generator, device=self.device)

    def _null_branch(self) -> tuple[KeyValueCache, Tensor]:
        """The null branch starts with the same few tokens for everybody: read once. Its cache, and logits behind it."""
        if self._null is None:
            cache, count = self._cache(1, len(self.null_tokens)), len(self.null_tokens)
            segment = Segment(cache, 0, 0, count, torch.arange(1, count + 1, device=self.device))
            logits, _ = self._forward([_Feed(segment, self.null_tokens)], [count - 1])
            self._null = cache, logits[0]
        return self._null

    def _denoise(self, rows: Sequence[_Row]) -> Iterator[Event]:
        """One denoising step of every drawing row."""
        members = _by_branch(rows)
        _, found = self._forward([self._patches(row, row.branches[branch]) for row, branch in members], [])
        predictions = _of_rows(members, found)
        for row in rows:
            assert isinstance(row.drawing, SamplerState)
            sampler = Sampler(self.exported.process, row.request.sampler)
            state = row.drawing = sampler.step(row.drawing, guide(predictions[row.number], row.scales))
            row.evaluations += 1
            preview = state.x0 if row.request.previews else None
            yield ImageProgress(row.number, row.images, state.index, state.total, preview)
            if state.done:
                yield from self._end_image(row, sampler.finish(state))

    def _patches(self, row: _Row, branch: _Branch) -> _Feed:
        assert isinstance(row.drawing, SamplerState)
        count, start = row.patches, branch.start
        ends = None
        if self.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 1, device=self.device)
        segment = Segment(branch.cache, branch.row, start, count, ends)
        return _Feed(segment, [0] * count, range(count), [row.drawing.x], [row.drawing.t])

    def _draw_codes(self, rows: Sequence[_Row]) -> Iterator[Event]:
        """One code of every drawing row: chosen from guided logits of codes alone, then read by all its branches."""
        going = []
        for row in rows:
            drawing, request = row.drawing, row.request
            assert isinstance(drawing, _CodeDrawing)
            logits = guide(drawing.logits, row.scales)
            drawing.codes.append(_sample(logits, request.code_temperature, request.code_top_p, drawing.generator))
            yield ImageProgress(row.number, row.images, len(drawing.codes), row.patches)
            if len(drawing.codes) == row.patches:
                yield from self._end_image(row, torch.tensor(drawing.codes).view(row.shape[1:]))
            else:
                going.append(row)
        if not going:
            return
        assert self.grammar.first_code is not None
        members, feeds = _by_branch(going), []
        for row, number in members:
            assert isinstance(row.drawing, _CodeDrawing)
            branch, place = row.branches[number], len(row.drawing.codes) - 1
            segment = Segment(branch.cache, branch.row, branch.start + place, 1)
            feeds.append(_Feed(segment, [row.drawing.codes[-1] + self.grammar.first_code]))
        found, _ = self._forward(feeds, range(len(feeds)))
        logits_of = _of_rows(members, list(found[:, self.grammar.first_code :]))
        for row in going:
            assert isinstance(row.drawing, _CodeDrawing)
            row.drawing.logits = logits_of[row.number]
            row.evaluations += 1

    def _end_image(self, row: _Row, latent: Tensor) -> Iterator[Event]:
        row.finished, row.drawing = latent, None
        row.seen.append(Image(latent, target=False))
        yield ImageEnd(row.number, row.images, latent)
        row.images += 1
        if row.request.max_tokens == 0 and row.images == row.request.max_images:
            yield from self._finish(row, "images")


def _by_branch(rows: Sequence[_Row]) -> list[tuple[_Row, int]]:
    """Every branch of every row; those of one kind side by side, for neighbours of one cache are computed together."""
    most = max(len(row.branches) for row in rows)
    return [(row, branch) for branch in range(most) for row in rows if branch < len(row.branches)]


def _of_rows(members: Sequence[tuple[_Row, int]], found: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """What was found for each member, by the number of its row, branch after branch."""
    by_row: dict[int, list[Tensor]] = {row.number: [] for row, _ in members}
    for (row, _), one in zip(members, found, strict=True):
        by_row[row.number].append(one)
    return by_row


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id of logits `[id]`: the likeliest at temperature 0, else one drawn from the nucleus."""
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
