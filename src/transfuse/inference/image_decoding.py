"""Drawing: denoising steps (Transfusion) or codes one by one (Chameleon), guided by branches of the sequence.

Both decoders have one interface: `start` sets up a drawing, `step` takes one step of every drawing sequence in one pass
and yields its progress; a finished image is left in `seq.finished`. `CodeDecoder.on_boi` receives the logits after BOI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..diffusion import Sampler, SamplerState
from ..rng import generator_for
from ..sequence import Document, Image, layout_document
from .events import ImageProgress
from .kv_cache import KeyValueCache, Segment
from .model_runner import ModelRunner, StepInput
from .sequence_state import Branch, CodeDrawing, SequenceState, split_on_oom

Progress = Iterator[tuple[SequenceState, ImageProgress | None]]


@dataclass(eq=False)
class LatentDecoder:
    """Draws latents: the patches of every sequence, one sampler step each."""

    runner: ModelRunner
    cache: KeyValueCache

    def start(self, seq: SequenceState) -> list[StepInput]:
        """Set up the drawing of the image that begins at `seq.length`; return what its other branches read first."""
        sampler, start = Sampler(self.runner.exported.process, seq.request.sampler), seq.request.start
        generator = generator_for(seq.request.seed, "image", seq.images)
        if start is None or seq.images:
            seq.drawing = sampler.prepare(seq.shape, generator, device=self.runner.device)
        else:
            latent = start.latent.to(self.runner.device)
            seq.drawing = sampler.prepare_from(latent, generator, start.strength, start.mask)
        return open_branches(self.runner, self.cache, seq)

    def cost(self, seq: SequenceState) -> int:
        """Return the most positions the network may compute for a request: every branch's patches, in every step."""
        request = seq.request
        steps = request.sampler.steps if request.draw != "never" else 0
        return seq.max_len + request.max_images * steps * self._step_cost(seq)

    def used(self, seq: SequenceState) -> int:
        """Return the positions computed so far, as `cost` counts them."""
        return seq.length + seq.evaluations * self._step_cost(seq)

    def _step_cost(self, seq: SequenceState) -> int:
        guidance = (seq.request.guidance_scale != 1) + (seq.request.image_guidance_scale is not None)
        return seq.patches * (1 + guidance)

    def step(self, seqs: Sequence[SequenceState]) -> Progress:
        """Take one sampler step of every sequence; an image that starts complete (strength 0) takes none."""
        for part, predictions in split_on_oom(seqs, self._predict):
            for seq in part:
                before, every, progress = seq.drawing, seq.request.preview_every, None
                assert isinstance(before, SamplerState)
                sampler, state = Sampler(self.runner.exported.process, seq.request.sampler), before
                if own := predictions.get(seq.number):
                    state = sampler.step(before, guide(own, seq.scales[: len(own) - 1]))
                    seq.evaluations += 1
                    preview = state.x0 if every and state.index % every == 0 else None
                    progress = ImageProgress(
                        seq.number, seq.images, state.index, state.total, preview, state.x, before.t
                    )
                seq.drawing = state
                if state.done:
                    seq.finished, seq.drawing = sampler.finish(state), None
                yield seq, progress

    def _predict(self, seqs: Sequence[SequenceState]) -> dict[int, list[Tensor]]:
        """Return the network's predictions of every branch that this step needs, by the sequence's number.

        A complete image needs none, and one outside its guidance interval only the first.
        """
        members: list[tuple[SequenceState, int]] = []  # a sequence, and the number of one of its branches
        for seq in seqs:
            assert isinstance(seq.drawing, SamplerState)
            guided = seq.request.guided_at(seq.drawing.t / self.runner.exported.process.config.timesteps)
            needed = 0 if seq.drawing.done else len(seq.branches) if guided else 1
            members += [(seq, branch) for branch in range(needed)]
        members.sort(key=lambda member: member[1])  # branches of one kind are neighbours and share attention calls
        passes = [members] if members else []
        if self.runner.guidance == "sequential":
            passes = [list(of_one) for _, of_one in groupby(members, key=lambda member: member[1])]
        predictions: dict[int, list[Tensor]] = {seq.number: [] for seq, _ in members}
        for of_pass in passes:
            inputs = []
            for seq, number in of_pass:
                assert isinstance(seq.drawing, SamplerState)
                branch, count, ends = seq.branches[number], seq.patches, None
                if self.runner.config.image_attention == "causal":
                    ends = torch.arange(branch.start + 1, branch.start + count + 1, device=self.runner.device)
                segment = Segment(branch.slot, branch.start, count, ends, branch.origin)
                grid = self.runner.grammar.grid(Image(seq.drawing.x))
                positions = self.runner.grammar.patch_positions(branch.position, *grid)
                patches = StepInput(segment, [0] * count, positions, range(count), [seq.drawing.x], [seq.drawing.t])
                inputs.append(patches)
            for (seq, _), prediction in zip(of_pass, self.runner.forward(self.cache, inputs, [])[1], strict=True):
                predictions[seq.number].append(prediction)
        return predictions


class CodeDecoder:
    """Draws codes: one of every sequence, chosen from guided logits of codes alone, then read by all its branches."""

    def __init__(self, runner: ModelRunner, cache: KeyValueCache) -> None:
        assert runner.grammar.first_code is not None
        self.runner, self.cache, self.first = runner, cache, runner.grammar.first_code

    def start(self, seq: SequenceState) -> list[StepInput]:
        """Set up the drawing of the image that begins at `seq.length`; return what its other branches read first."""
        seq.drawing = CodeDrawing(generator_for(seq.request.seed, "image", seq.images))
        return open_branches(self.runner, self.cache, seq)

    def on_boi(self, seq: SequenceState, logits: list[Tensor]) -> None:
        """Keep each branch's logits `[id]` after BOI; those of the null branch are known."""
        assert isinstance(seq.drawing, CodeDrawing)
        if len(logits) < len(seq.branches):
            logits = [*logits, self.runner.null_branch()[1]]
        seq.drawing.logits = [row[self.first :].clone() for row in logits]

    def cost(self, seq: SequenceState) -> int:
        """Return the most positions the network may compute for a request: its own, and every other branch's."""
        return seq.max_len + seq.cfg_len

    def used(self, seq: SequenceState) -> int:
        """Return the positions computed so far, as `cost` counts them, to about an image's codes."""
        return seq.length + seq.evaluations * len(seq.branches)

    def step(self, seqs: Sequence[SequenceState]) -> Progress:
        """Choose one code of every sequence; all branches of an unfinished image then read it."""
        for seq in seqs:
            drawing, request = seq.drawing, seq.request
            assert isinstance(drawing, CodeDrawing)
            logits = guide(drawing.logits, seq.scales)
            drawing.codes.append(sample(logits, request.code_temperature, request.code_top_p, drawing.generator))
            if len(drawing.codes) == seq.patches:
                seq.finished, seq.drawing = torch.tensor(drawing.codes).view(seq.shape[1:]), None
            yield seq, ImageProgress(seq.number, seq.images, len(drawing.codes), seq.patches)
        for part, next_logits in split_on_oom([seq for seq in seqs if seq.drawing is not None], self._read):
            for seq in part:
                assert isinstance(seq.drawing, CodeDrawing)
                seq.drawing.logits = next_logits[seq.number]
                seq.evaluations += 1

    def _read(self, seqs: Sequence[SequenceState]) -> dict[int, list[Tensor]]:
        """Have every branch read the latest code, and return logits of the next one by the sequence's number."""
        members = [(seq, branch) for seq in seqs for branch in range(len(seq.branches))]
        members.sort(key=lambda member: member[1])
        inputs = []
        for seq, number in members:
            assert isinstance(seq.drawing, CodeDrawing)
            branch, codes = seq.branches[number], seq.drawing.codes
            segment = Segment(branch.slot, branch.start + len(codes) - 1, 1, origin=branch.origin)
            position = np.array([branch.position + len(codes) - 1])
            inputs.append(StepInput(segment, [codes[-1] + self.first], position))
        logits, _ = self.runner.forward(self.cache, inputs, range(len(inputs)))
        next_logits: dict[int, list[Tensor]] = {seq.number: [] for seq in seqs}
        for (seq, _), own in zip(members, logits[:, self.first :], strict=True):
            next_logits[seq.number].append(own)
        return next_logits


def open_branches(runner: ModelRunner, cache: KeyValueCache, seq: SequenceState) -> list[StepInput]:
    """Place in the slot the branches that guide the image at `seq.length`, and return what they have to read.

    From the slot's end: the null branch, whose first positions are the same for all and copied; before it the branch
    that sees images alone, which reads these images and BOI. A negative prompt is read in place of the null branch.
    """
    request, origin = seq.request, cache.positions
    scale, inputs = request.guidance_scale, list[StepInput]()
    image_scale = request.image_guidance_scale if seq.seen else None
    null_scale = scale if image_scale is None else image_scale
    branches = [Branch(seq.slot, seq.length + 1, seq.position + 1)]
    null_branches = []
    read = request.negative
    if null_scale != 1 and read is None:
        known = len(runner.null_tokens)
        origin -= known + seq.patches
        null = runner.null_branch()[0]
        for store, prefix in ((cache.keys, null.keys), (cache.values, null.values)):
            store[:, seq.slot, :, origin : origin + known] = prefix[:, 0, :, :known]
        null_branches = [Branch(seq.slot, known, known, origin)]
    if image_scale is not None:
        read = Document([replace(image, target=False) for image in seq.seen], closed=False)
    if read is not None:
        layout = layout_document(read, runner.grammar)
        origin -= len(layout) + 1 + seq.patches
        position = layout.next_position
        segment = Segment(seq.slot, len(layout), 1, origin=origin)
        boi = StepInput(segment, [runner.grammar.boi], np.array([position]))
        inputs = [runner.read(layout, seq.slot, origin), boi]
        branches.append(Branch(seq.slot, len(layout) + 1, position + 1, origin))
    seq.branches = branches + null_branches
    seq.scales = [scale] * (len(branches) - 1) + [null_scale] * len(null_branches)
    return inputs


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
    """Return one id of logits `[id]`: the most probable at temperature 0, else one drawn from the nucleus."""
    if temperature <= 0:
        return int(logits.argmax())
    # The largest is 0: divided by the smallest possible temperature, it stays so.
    scaled = (logits - logits.max()) / max(temperature, torch.finfo(logits.dtype).tiny)
    probabilities, order = scaled.softmax(-1).sort(descending=True)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[0] = False
    probabilities[beyond] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
