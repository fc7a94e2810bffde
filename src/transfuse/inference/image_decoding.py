"""How a row draws: by denoising steps (Transfusion) or code by code (Chameleon), guided by branches of its sequence.

Both have one shape: `begin` sets a drawing up in the row, `opened` hears what the pass over BOI gave, `step` takes
one step of every drawing row in one pass and tells each row's progress; a finished image is left in `row.finished`.
Noise and codes are drawn by (seed, image), so a row does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from ..diffusion import Sampler, SamplerState
from ..rng import generator_for
from ..sequence import Document, layout_document
from .events import ImageProgress
from .kv_cache import KeyValueCache, Segment
from .model_runner import ModelRunner, StepInput
from .sequence_state import Branch, CodeDrawing, Request, SequenceState, split_on_oom

Progress = Iterator[tuple[SequenceState, ImageProgress | None]]


class LatentDecoder:
    """Draws latents: the patches of every row, one sampler step each."""

    def __init__(self, runner: ModelRunner, cache: KeyValueCache) -> None:
        self.runner, self.cache = runner, cache

    def start(self, row: SequenceState) -> list[StepInput]:
        """Set up the drawing of the image that begins at `row.length`; what its branches read before it."""
        sampler = Sampler(self.runner.exported.process, row.request.sampler)
        generator = generator_for(row.request.seed, "image", row.images)
        start = row.request.start
        if start is None or row.images:
            row.drawing = sampler.prepare(row.shape, generator, device=self.runner.device)
        else:
            latent = start.latent.to(self.runner.device)
            row.drawing = sampler.prepare_from(latent, generator, start.strength, start.mask)
        return open_branches(self.runner, self.cache, row)

    def on_boi(self, row: SequenceState, logits: list[Tensor]) -> None:
        """Nothing: what comes behind BOI is no token."""

    def cost(self, row: SequenceState) -> int:
        """Positions that the network may compute for a row: its own, and every branch's in every step."""
        branches = 1 + (row.request.guidance_scale != 1) + (row.request.image_guidance_scale is not None)
        steps = row.request.sampler.steps if row.request.draw != "never" else 0
        return row.max_len + row.request.max_images * row.patches * steps * branches

    def step(self, rows: Sequence[SequenceState]) -> Progress:
        for some, predictions in split_on_oom(rows, self._predict):
            for row in some:
                progress = self._advance(row, predictions[row.number]) if row.number in predictions else None
                state = _state(row)
                if state.done:
                    row.finished, row.drawing = self._sampler(row.request).finish(state), None
                yield row, progress

    def _predict(self, rows: Sequence[SequenceState]) -> dict[int, list[Tensor]]:
        """What the network makes of every branch that is needed, by the row's number."""
        members = [(row, branch) for row in rows for branch in self._computed(row)]
        members.sort(key=lambda member: member[1])  # those of one kind side by side: neighbours share a call
        passes = [members] if self.runner.guidance == "packed" else _by_branch(members)
        predictions: list[Tensor] = []
        for some in passes:
            feeds = [self._patches(row, row.branches[branch]) for row, branch in some]
            predictions += self.runner.forward(self.cache, feeds, [])[1] if feeds else []
        return _of_rows(members, predictions)

    def _computed(self, row: SequenceState) -> range:
        """Its branches that this step needs: none of an image that is given whole, one where it is not guided."""
        state, levels = _state(row), self.runner.exported.process.config.timesteps
        return range(0 if state.done else len(row.branches) if row.request.guided_at(state.t / levels) else 1)

    def _advance(self, row: SequenceState, predictions: list[Tensor]) -> ImageProgress:
        before, every = _state(row), row.request.preview_every
        guided = guide(predictions, row.scales[: len(predictions) - 1])
        state = row.drawing = self._sampler(row.request).step(before, guided)
        row.evaluations += 1
        preview = state.x0 if every and state.index % every == 0 else None
        return ImageProgress(row.number, row.images, state.index, state.total, preview, state.x, before.t)

    def _patches(self, row: SequenceState, branch: Branch) -> StepInput:
        state, count, start = _state(row), row.patches, branch.start
        ends = None
        if self.runner.config.image_attention == "causal":
            ends = torch.arange(start + 1, start + count + 1, device=self.runner.device)
        segment = Segment(branch.slot, start, count, ends, branch.origin)
        return StepInput(segment, [0] * count, range(count), [state.x], [state.t])

    def _sampler(self, request: Request) -> Sampler:
        return Sampler(self.runner.exported.process, request.sampler)


class CodeDecoder:
    """Draws codes: one of every row, chosen from guided logits of codes alone, then read by all its branches."""

    def __init__(self, runner: ModelRunner, cache: KeyValueCache) -> None:
        assert runner.grammar.first_code is not None
        self.runner, self.cache, self.first = runner, cache, runner.grammar.first_code

    def start(self, row: SequenceState) -> list[StepInput]:
        """Set up the drawing of the image that begins at `row.length`; what its branches read before it."""
        row.drawing = CodeDrawing(generator_for(row.request.seed, "image", row.images))
        return open_branches(self.runner, self.cache, row)

    def on_boi(self, row: SequenceState, logits: list[Tensor]) -> None:
        """Logits `[id]` behind BOI, of every branch but the null one, which are known."""
        if len(logits) < len(row.branches):
            logits = [*logits, self.runner.null_branch()[1]]
        _codes(row).logits = [scores[self.first :].clone() for scores in logits]

    def cost(self, row: SequenceState) -> int:
        """Positions that the network may compute for a row: its own, and every other branch's."""
        return row.max_len + row.cfg_len

    def step(self, rows: Sequence[SequenceState]) -> Progress:
        for row in rows:
            drawing, request = _codes(row), row.request
            logits = guide(drawing.logits, row.scales)
            drawing.codes.append(sample(logits, request.code_temperature, request.code_top_p, drawing.generator))
            if len(drawing.codes) == row.patches:
                row.finished, row.drawing = torch.tensor(drawing.codes).view(row.shape[1:]), None
            yield row, ImageProgress(row.number, row.images, len(drawing.codes), row.patches)
        for some, found in split_on_oom([row for row in rows if row.drawing is not None], self._read):
            for row in some:
                _codes(row).logits = found[row.number]
                row.evaluations += 1

    def _read(self, rows: Sequence[SequenceState]) -> dict[int, list[Tensor]]:
        """Every branch reads the code that was chosen last; logits of the next, by the row's number."""
        members = [(row, branch) for row in rows for branch in range(len(row.branches))]
        members.sort(key=lambda member: member[1])
        feeds = []
        for row, number in members:
            branch, codes = row.branches[number], _codes(row).codes
            segment = Segment(branch.slot, branch.start + len(codes) - 1, 1, origin=branch.origin)
            feeds.append(StepInput(segment, [codes[-1] + self.first]))
        found, _ = self.runner.forward(self.cache, feeds, range(len(feeds)))
        return _of_rows(members, list(found[:, self.first :]))


def open_branches(runner: ModelRunner, cache: KeyValueCache, row: SequenceState) -> list[StepInput]:
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
        known = len(runner.null_tokens)
        far -= known + row.patches
        cache.copy(row.slot, far, runner.null_branch()[0], known)
        null = Branch(row.slot, known, far)
    if three:
        parts = [replace(image, target=False) for image in row.seen]
        layout = layout_document(Document(parts, closed=False), runner.grammar)
        far -= len(layout) + 1 + row.patches
        feeds = [
            runner.read(layout, row.slot, far),
            StepInput(Segment(row.slot, len(layout), 1, origin=far), [runner.grammar.boi]),
        ]
        row.branches.append(Branch(row.slot, len(layout) + 1, far))
        row.scales.append(scale)
    if null is not None:
        row.branches.append(null)
        row.scales.append(null_scale)
    return feeds


def guide(branches: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598) to predictions of noise, or to logits of the next code.

    branches: one prediction per branch; the first sees the whole prompt, each next one less, the last nothing.
    scales: one per pair of neighbouring branches, in the same order.

        conditional, null           null + scale * (conditional - null): at scale 0 the null branch exactly
        whole, images alone, null   null + image_scale * (images - null) + scale * (whole - images), as in Chameleon
    """
    out = branches[-1]
    for more, less, scale in zip(branches, branches[1:], scales, strict=False):
        out = out + scale * (more - less)
    return out


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


def _by_branch(members: Sequence[tuple[SequenceState, int]]) -> list[list[tuple[SequenceState, int]]]:
    """Members in order of their branch, a list for each."""
    return [list(some) for _, some in groupby(members, key=lambda member: member[1])]


def _of_rows(members: Sequence[tuple[SequenceState, int]], found: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    """What was found for each member, by the number of its row, branch after branch."""
    by_row: dict[int, list[Tensor]] = {row.number: [] for row, _ in members}
    for (row, _), one in zip(members, found, strict=True):
        by_row[row.number].append(one)
    return by_row


def _state(row: SequenceState) -> SamplerState:
    assert isinstance(row.drawing, SamplerState)
    return row.drawing


def _codes(row: SequenceState) -> CodeDrawing:
    assert isinstance(row.drawing, CodeDrawing)
    return row.drawing
