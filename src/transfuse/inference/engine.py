"""The engine: many sequences at once, each writing or drawing, and switching at BOI and EOI (Transfusion section 3.3).

    LM step        one token per writing sequence, chosen from logits; after BOI the sequence draws
    denoise step   the patches of every drawing sequence, guided, one sampler step each; the cache does not grow
    commit         the finished image is written to the cache clean, at timestep 0, with EOI after it; writing resumes

A step is one LM forward pass for all sequences that write, and one denoise pass for all that draw. A Chameleon draws by
codes: instead of a denoise step, one code of every drawing sequence, from guided logits of codes alone, until there are
exactly as many as the image has; text is chosen from ids of text alone.

Sequences join and leave at any step. Noise and tokens are drawn by (seed, image) and (seed, position), and a pass
computes each sequence independently of the others; docs/inference.md says where that holds to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, count

import numpy as np
import torch
from torch import Tensor, inf

from ..errors import UserError
from ..export import Exported
from ..rng import generator_for
from ..sequence import Image
from .events import Done, Event, Failed, ImageEnd, ImageStart, TextDelta
from .image_decoding import CodeDecoder, LatentDecoder, sample
from .kv_cache import Segment
from .model_runner import ModelRunner, StepInput
from .scheduling import FairQueue, PrefixKeys, SlotAllocator, image_keys
from .sequence_state import Request, SequenceState, accept, split_on_oom


class Engine:
    """Runs any number of requests against one model, at most `slots` at the same time.

    slots, positions: the size of the cache, which never grows. A request keeps one slot while it runs: its prompt, what
    it may write and draw, and at the end the branches that guide its images. The default of `positions` is the model's
    max_seq_len plus the null branch of an image of the size it was trained on.
    """

    def __init__(self, exported: Exported | ModelRunner, slots: int = 8, positions: int | None = None) -> None:
        runner = exported if isinstance(exported, ModelRunner) else ModelRunner(exported)
        self.runner, self.exported = runner, runner.exported
        self.config, self.grammar = runner.config, runner.grammar
        if positions is None:
            positions = self.config.max_seq_len
            if self.config.images != "none":
                side = self.exported.image_size
                positions += len(runner.null_tokens) + runner.latent_shape((side, side))[1]
        if min(slots, positions) < 1:
            raise UserError(f"engine: expected at least 1 slot of 1 position, found {slots} of {positions}")
        self.positions = positions
        self.slots = SlotAllocator(slots)
        self.cache = runner.cache(slots, positions)
        decoder = LatentDecoder if self.grammar.first_code is None else CodeDecoder
        self.decoder: LatentDecoder | CodeDecoder = decoder(runner, self.cache)
        self._used_slots: set[int] = set()
        self._numbers = count()
        self._queue: FairQueue[SequenceState] = FairQueue(self.decoder.used)
        self._waiting: dict[int, SequenceState] = {}
        self._running: dict[int, SequenceState] = {}
        self._last: Engine | None = None  # the engine of the latest `run`, kept with its cache if passes are recorded

    def submit(self, request: Request, client: str = "") -> int:
        """Queue a request and return its `request_id`.

        Requests of one client that all draw, or all write, are served in order; between clients and between writing and
        drawing `FairQueue` decides, and a running request may wait while others have its slot. This changes no result.

        Raises UserError, one line, for a request that is invalid or that no slot can hold.
        """
        seq = accept(self.runner, request, next(self._numbers), "request")
        if seq.max_len + seq.cfg_len > self.positions:
            raise UserError(
                f"request: expected at most {self.positions} positions in all, as a slot of the cache has, "
                f"found {seq.max_len} to write and draw in and {seq.cfg_len} to guide by"
            )
        self._enqueue(seq, client)
        return seq.number

    def cancel(self, number: int) -> None:
        """Drop a request that waits or runs; it has no further events. One that has ended is left as it is."""
        if number in self._waiting:
            self._queue.remove(self._waiting.pop(number))
        elif number in self._running:
            self._leave(self._running[number], None)

    def cost(self, number: int) -> tuple[int, int]:
        """Return the prompt's positions, and those the network may compute in all, for a request not yet complete."""
        seq = self._waiting[number] if number in self._waiting else self._running[number]
        return len(seq.layout), self.decoder.cost(seq)

    @property
    def busy(self) -> bool:
        """True if a request waits or runs."""
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def schedule(self) -> list[int]:
        """Give slots to the requests whose turn it is; return the numbers of those that start.

        Every step begins with this, too.
        """
        started = []
        while (turn := self._queue.start(free=len(self.slots) > 0)) is not None:
            seq, last = turn
            if last is not None:  # its part of the cache waits in host memory
                parts = self.cache.views(last.slot, last.max_len, last.cfg_len)
                last.suspended = [part.to("cpu", copy=True) for part in parts]
                del self._running[last.number]
                self.slots.free(last.slot, None)
                self._waiting[last.number] = last
            del self._waiting[seq.number]
            saved, seq.suspended = seq.suspended, None
            seq.slot, reused = self.slots.allocate(seq.prefix_keys if saved is None else None)
            if seq.slot in self._used_slots:  # a new slot is zero, and on most systems its memory is not even taken
                self.cache.clear(seq.slot, reused, seq.max_len)
                self.cache.clear(seq.slot, self.cache.positions - seq.cfg_len, self.cache.positions)
            self._used_slots.add(seq.slot)
            self._running[seq.number] = seq
            if saved is None:
                seq.length = reused
                started.append(seq.number)
            else:
                for part, old in zip(self.cache.views(seq.slot, seq.max_len, seq.cfg_len), saved, strict=True):
                    part.copy_(old)
                seq.branches = [replace(branch, slot=seq.slot) for branch in seq.branches]
        return started

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Take one step of every running request, and return the events.

        Where memory does not suffice for all at once, they are computed in parts; one that is too large alone fails.
        """
        self.schedule()
        seqs = sorted(self._running.values(), key=lambda seq: seq.slot)  # neighbours share attention calls
        events: list[Event] = []
        for writing, logits in split_on_oom([seq for seq in seqs if seq.drawing is None], self._read):
            events += self._write(writing, logits)
        drawing = [seq for seq in seqs if seq.drawing is not None and not seq.too_large]
        for seq, progress in self.decoder.step(drawing):
            events += [progress] if progress is not None else []
            if seq.finished is not None:
                seq.seen.append(Image(seq.finished, target=False))
                events.append(ImageEnd(seq.number, seq.images, seq.finished))
                seq.images += 1
                if seq.request.max_tokens == 0 and seq.images == seq.request.max_images:
                    events += self._finish(seq, "images")
        for seq in seqs:
            if seq.too_large:
                self._leave(seq, None)
                events.append(Failed(seq.number))
        return events

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run a list of requests together, in a cache made for them, and yield their events, numbered from 0.

        Recorded passes belong to their cache: if there are any, it is kept for the next run of as many requests.

        Raises UserError before any work for an invalid request, and MemoryError for one that is too large.
        """
        where = [f"request {number}" if number else "request" for number in range(len(requests))]
        seqs = [accept(self.runner, request, number, where[number]) for number, request in enumerate(requests)]
        if not seqs:
            return
        positions, engine = max(seq.max_len + seq.cfg_len for seq in seqs), self._last
        if engine is None or engine.busy or len(engine.slots) != len(seqs) or engine.positions < positions:
            engine = Engine(self.runner, len(seqs), positions)
        self._last = engine if self.runner.record is not None else None
        for seq in seqs:
            engine._enqueue(seq)
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise MemoryError(f"{where[event.request_id]}: {event.reason}")
                yield event

    def _enqueue(self, seq: SequenceState, client: str = "") -> None:
        self._waiting[seq.number] = seq
        kind = "write" if seq.request.draw == "never" else "draw"
        self._queue.push(seq, self.decoder.cost(seq), client, kind)

    def _leave(self, seq: SequenceState, prefix_keys: PrefixKeys | None) -> None:
        self._queue.remove(seq)
        del self._running[seq.number]
        self.slots.free(seq.slot, prefix_keys)

    def _read(self, seqs: Sequence[SequenceState]) -> Tensor:
        """Run the LM pass, and return each sequence's logits `[sequence, id]` of text.

        A sequence reads its prompt, its chosen token, or a finished image with EOI. The other branches of a drawing
        read what is before its image in the same pass as BOI.
        """
        inputs: list[StepInput] = []
        branches: list[tuple[SequenceState, StepInput]] = []
        for seq in seqs:
            if seq.length < len(seq.layout):
                inputs.append(self.runner.read(seq.layout, seq.slot, known=seq.length))
            elif seq.finished is not None:
                inputs.append(self.runner.commit(seq.finished, seq.slot, seq.length, seq.position))
            else:
                assert seq.next_token is not None
                segment = Segment(seq.slot, seq.length, 1)
                inputs.append(StepInput(segment, [seq.next_token], np.array([seq.position])))
                if seq.next_token == self.grammar.boi:
                    branches += [(seq, branch) for branch in self.decoder.start(seq)]
        passed = [*inputs, *(branch for _, branch in branches)]
        last = [end - 1 for end in accumulate(step_input.segment.count for step_input in passed)]
        logits, _ = self.runner.forward(self.cache, passed, last)
        for seq, step_input, own in zip(seqs, inputs, logits, strict=False):
            if seq.prefix_keys is not None and step_input.segment.start >= len(seq.layout):
                if seq.finished is None:
                    seq.prefix_keys.append(seq.next_token)
                elif self.grammar.first_code is None:
                    seq.prefix_keys += [*image_keys(seq.finished, seq.patches), self.grammar.eoi]
                else:
                    codes = (seq.finished.flatten() + self.grammar.first_code).tolist()
                    seq.prefix_keys += [*codes, self.grammar.eoi]
            seq.length, seq.finished = step_input.segment.end, None
            seq.position = int(step_input.positions[-1].max()) + 1
            if seq.drawing is not None and isinstance(self.decoder, CodeDecoder):
                # Of a branch that reads with it, the logits after its last input, BOI.
                of_branch = [row for (other, _), row in zip(branches, logits[len(seqs) :], strict=True) if other is seq]
                self.decoder.on_boi(seq, [own, *of_branch[-1:]])
        return logits[: len(seqs)] + self.runner.logit_mask

    def _write(self, seqs: Sequence[SequenceState], logits: Tensor) -> Iterator[Event]:
        """Choose the next token of every sequence that does not begin an image; mask BOI where no image may follow."""
        for row, seq in enumerate(seqs):
            may_draw = seq.request.draw != "never" and self.config.images != "none"
            may_draw = may_draw and seq.images < seq.request.max_images
            if not may_draw or seq.length + 2 + seq.patches > self.config.max_seq_len:
                logits[row, self.grammar.boi] = -torch.inf
        for seq, own, argmax in zip(seqs, logits, logits.argmax(-1).tolist(), strict=True):
            if seq.drawing is not None:
                seq.next_token = None
                yield ImageStart(seq.number, seq.images)
            else:
                yield from self._choose(seq, own, argmax)

    def _choose(self, seq: SequenceState, logits: Tensor, argmax: int) -> Iterator[Event]:
        """Choose a sequence's next token from its logits `[id]`, or end it."""
        request = seq.request
        if request.draw == "force" and seq.images == 0:
            seq.next_token = self.grammar.boi
            return
        full = seq.written >= request.max_tokens  # an image may follow, which is no text
        if seq.length + 1 >= self.config.max_seq_len or (full and argmax != self.grammar.boi):
            drawn = request.draw != "never" and request.max_tokens == 0 and seq.images >= request.max_images
            yield from self._finish(seq, "images" if drawn else "length")
            return
        token, unpenalised = argmax, logits
        if request.presence_penalty or request.frequency_penalty:
            logits = logits.clone()
            for written, times in seq.counts.items():
                logits[written] -= request.presence_penalty + request.frequency_penalty * times
            token = int(logits.argmax())
        if request.temperature > 0 and not full:
            generator = generator_for(request.seed, "token", seq.length)
            token = sample(logits, request.temperature, request.top_p, generator)
        if token in self.runner.tokenizer.ends:
            yield from self._finish(seq, "stop")
            return
        seq.next_token = token
        if token == self.grammar.boi:  # the text before an image comes first, complete or not
            pieces = seq.detokenizer.flush()
        else:
            seq.written += 1
            seq.counts[token] += 1
            if request.logprobs is not None:
                logprobs = unpenalised.log_softmax(-1)
                best = logprobs.topk(min(request.logprobs, len(logprobs)))
                top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                seq.logprobs.append((float(logprobs[token]), tuple(pair for pair in top if pair[1] > -inf)))
            pieces = seq.detokenizer.add(token)
        yield from self._emit(seq, pieces, last=token == self.grammar.boi)
        if seq.stops.matched:
            yield from self._finish(seq, "stop")

    def _emit(self, seq: SequenceState, pieces: Sequence[tuple[int, str]], last: bool = False) -> Iterator[TextDelta]:
        """Give the text of complete tokens up to a stop string; `last`: of all, for an image or the end follows."""
        released = seq.stops.add(pieces)
        for token, text in released + (seq.stops.flush() if last else []):
            logprob, top = seq.logprobs.popleft() if seq.logprobs else (None, ())
            yield TextDelta(seq.number, text, token, logprob, top)

    def _finish(self, seq: SequenceState, reason: str) -> Iterator[Event]:
        """End a sequence: give the text that is held back, free the slot, and report."""
        if not seq.stops.matched:
            yield from self._emit(seq, seq.detokenizer.flush(), last=True)
        self._leave(seq, seq.prefix_keys)
        positions = seq.images * seq.patches
        yield Done(seq.number, reason, seq.written, seq.images, seq.evaluations, positions)
