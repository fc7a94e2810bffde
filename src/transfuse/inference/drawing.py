"""How a row draws: by denoising steps (Transfusion) or code by code (Chameleon), guided by branches of its sequence.

Both have one shape: `begin` sets a drawing up in the row, `opened` hears what the pass over BOI gave, `step` takes
one step of every drawing row in one pass and tells each row's progress; a finished image is left in `row.finished`.
Noise and codes are drawn by (seed, image), so a row does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ..diffusion import Sampler, SamplerState
from ..rng import generator_for
from ..sequence import Document, layout_document
from .cache import KeyValueCache, Segment
from .events import ImageProgress, Request
from .guidance import guide
from .network import Feed, Network
from .row import Branch, CodeDrawing, Row, together

Progress = Iterator[tuple[Row, ImageProgress | None]]


class Denoiser:
    """Draws latents: the patches of every row, one sampler step each."""

    def __init__(self, network: Network, cache: KeyValueCache) -> None:
        self.network, self.cache = network, cache

    def begin(self, row: Row) -> list[Feed]:
        """Set up the drawing of the image that begins at `row.length`; what its branches read before it."""
        sampler = Sampler(self.network.exported.process, row.request.sampler)
        generator = generator_for(row.request.seed, "image", row.images)
        start = row.request.start
        if start is None or row.images:
            row.drawing = sampler.prepare(row.shape, generator, device=self.network.device)
        else:
            latent = start.latent.to(self.network.device)
            row.drawing = sampler.prepare_from(latent, generator, start.strength, start.mask)
        return open_branches(self.network, self.cache, row)

    def opened(self, row: Row, logits: list[Tensor]) -> None:
        """Nothing: what comes behind BOI is no token."""

    def cost(self, row: Row) -> int:
        """Positions that the network may compute for a row: its own, and every branch's in every step."""
        branches = 1 + (row.request.guidance_scale != 1) + (row.request.image_guidance_scale is not None)
        steps = row.request.sampler.steps if row.request.draw != "never" else 0
        return row.bound + row.request.max_images * row.patches * steps * branches

    def step(self, rows: Sequence[Row]) -> Progress:
        for some, predictions in together(rows, self._predict):
            for row in some:
                progress = self._advance(row, predictions[row.number]) if row.number in predictions else None
                state = _state(row)
                if state.done:
                    row.finished, row.drawing = self._sampler(row.request).finish(state), None
                yield row, progress

    def _predict(self, rows: Sequence[Row]) -> dict[int, list[Tensor]]:
        """What the network makes of every branch that is needed, by the row's number."""
        members = [(row, branch) for row in rows for branch in self._computed(row)]
        members.sort(key=lambda member: member[1])  # those of one kind side by side: neighbours share a call
        passes = [members] if self.network.guidance == "packed" else _by_branch(members)
        predictions: list[Tensor] = []
        for some in passes:
            feeds = [self._patches(row, row.branches[branch]) for row, branch in some]
            predictions += self.network.forward(self.cache, feeds, [])[1] if feeds else []
        return _of_rows(members, predictions)

    def _computed(self, row: Row) -> range:
        """Its branches that this step needs: none of an image that is given whole, one where it is not guided."""
        state, levels = _state(row), self.network.exported.process.config.timesteps
        return range(0 if state.done else len(row.branches) if row.request.guided_at(state.t / levels) else 1)

    def _advance(self, row: Row, predictions: list[Tensor]) -> ImageProgress:
        before, every = _state(row), row.request.preview_every
        guided = guide(predictions, row.scales[: len(predictions) - 1])
        state = row.drawing = self._sampler(row.request).step(before, guided)
        row.evaluations += 1
        preview = state.x0 if every and state.index % every == 0 else None
        return ImageProgress(row.number, row.images, state.index, state.total, preview, state.x, before.t)

    def _patches(self, row: Row, branch: Branch) -> Feed:
        state, count, start = _state(row), row.patches, branch.start
        ends = None
        if self.network.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 1, device=self.network.device)
        segment = Segment(branch.slot, start, count, ends, branch.origin)
        return Feed(segment, [0] * count, range(count), [state.x], [state.t])

    def _sampler(self, request: Request) -> Sampler:
        return Sampler(self.network.exported.process, request.sampler)


class Coder:
    """Draws codes: one of every row, chosen from guided logits of codes alone, then read by all its branches."""

    def __init__(self, network: Network, cache: KeyValueCache) -> None:
        assert network.grammar.first_code is not None
        self.network, self.cache, self.first = network, cache, network.grammar.first_code

    def begin(self, row: Row) -> list[Feed]:
        """Set up the drawing of the image that begins at `row.length`; what its branches read before it."""
        row.drawing = CodeDrawing(generator_for(row.request.seed, "image", row.images))
        return open_branches(self.network, self.cache, row)

    def opened(self, row: Row, logits: list[Tensor]) -> None:
        """Logits `[id]` behind BOI, of every branch but the null one, which are known."""
        if len(logits) < len(row.branches):
            logits = [*logits, self.network.null_branch()[1]]
        _codes(row).logits = [scores[self.first :].clone() for scores in logits]

    def cost(self, row: Row) -> int:
        """Positions that the network may compute for a row: its own, and every other branch's."""
        return row.bound + row.beside

    def step(self, rows: Sequence[Row]) -> Progress:
        for row in rows:
            drawing, request = _codes(row), row.request
            logits = guide(drawing.logits, row.scales)
            drawing.codes.append(sample(logits, request.code_temperature, request.code_top_p, drawing.generator))
            if len(drawing.codes) == row.patches:
                row.finished, row.drawing = torch.tensor(drawing.codes).view(row.shape[1:]), None
            yield row, ImageProgress(row.number, row.images, len(drawing.codes), row.patches)
        for some, found in together([row for row in rows if row.drawing is not None], self._read):
            for row in some:
                _codes(row).logits = found[row.number]
                row.evaluations += 1

    def _read(self, rows: Sequence[Row]) -> dict[int, list[Tensor]]:
        """Every branch reads the code that was chosen last; logits of the next, by the row's number."""
        members = [(row, branch) for row in rows for branch in range(len(row.branches))]
        members.sort(key=lambda member: member[1])
        feeds = []
        for row, number in members:
            branch, codes = row.branches[number], _codes(row).codes
            segment = Segment(branch.slot, branch.start + len(codes) - 1, 1, origin=branch.origin)
            feeds.append(Feed(segment, [codes[-1] + self.first]))
        found, _ = self.network.forward(self.cache, feeds, range(len(feeds)))
        return _of_rows(members, list(found[:, self.first :]))


def open_branches(network: Network, cache: KeyValueCache, row: Row) -> list[Feed]:
    """Lay out, in the row's slot, the branches that the image beginning at `row.length` is guided by.

    From the far end: the null branch, whose first positions are everybody's and copied; before it the branch that sees
    images alone. What that one reads, BOI included, is returned.
    """
    request, feeds = row.request, []
    row.branches, row.scales = [Branch(row.slot, row.length + 1)], []
    scale, image_scale, far = request.guidance_scale, request.image_guidance_scale, cache.positions
    three = image_scale is not None and bool(row.seen)
    null_scale = image_scale if three and image_scale is not None else scale
    null = None
    if null_scale != 1:
        known = len(network.null_tokens)
        far -= known + row.patches
        cache.copy(row.slot, far, network.null_branch()[0], known)
        null = Branch(row.slot, known, far)
    if three:
        parts = [replace(image, target=False) for image in row.seen]
        layout = layout_document(Document(parts, closed=False), network.grammar)
        far -= len(layout) + 1 + row.patches
        feeds = [
            network.read(layout, row.slot, far),
            Feed(Segment(row.slot, len(layout), 1, origin=far), [network.grammar.boi]),
        ]
        row.branches.append(Branch(row.slot, len(layout) + 1, far))
        row.scales.append(scale)
    if null is not None:
        row.branches.append(null)
        row.scales.append(null_scale)
    return feeds


def beside(network: Network, request: Request, patches: int) -> int:
    """The most positions that `open_branches` takes for a request."""
    scale, image_scale = request.guidance_scale, request.image_guidance_scale
    seen = [math.prod(network.grammar.grid(image)) for image in request.document.images]
    seen += [patches] * (request.max_images - 1)
    three = image_scale is not None and bool(seen)
    images = sum(count + 2 for count in seen) + 2 + patches if three else 0
    guided = scale != 1 or (three and image_scale != 1)
    return images + (len(network.null_tokens) + patches if guided else 0)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One id of logits `[id]`: the likeliest at temperature 0, else one drawn from the nucleus."""
    if temperature <= 0:
        return int(logits.argmax())
    # The largest is 0: divided by the smallest temperature there is, it stays so.
    scaled = (logits - logits.max()) / max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities, order = scaled.softmax(-1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[0] = False
    probabilities[beyond] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _by_branch(members: Sequence[tuple[Row, int]]) -> list[list[tuple[Row, int]]]:
    """Members in order of their branch, a list for each."""
    return [list(some) for _, some in groupby(members, key=lambda member: member[1])]


def _of_rows(members: Sequence[tuple[Row, int]], found: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """What was found for each member, by the number of its row, branch after branch."""
    by_row: dict[int, list[Tensor]] = {row.number: [] for row, _ in members}
    for (row, _), one in zip(members, found, strict=True):
        by_row[row.number].append(one)
    return by_row


def _state(row: Row) -> SamplerState:
    assert isinstance(row.drawing, SamplerState)
    return row.drawing


def _codes(row: Row) -> CodeDrawing:
    assert isinstance(row.drawing, CodeDrawing)
    return row.drawing
