"""The engine: many sequences at once, each writing or drawing, and switching at BOI and EOI (Transfusion section 3.3).

    LM step        one token per writing row, chosen from logits; BOI makes the row draw
    denoise step   the patches of every drawing row, guided, one sampler step each; never longer in the cache
    commit         the finished image is written to the cache clean, at timestep 0, with EOI behind it; writing goes on

A step is one LM forward pass for all rows that write, and one denoise pass for all rows that draw. A Chameleon draws by
codes: instead of a denoise step, one code of every drawing row, from guided logits of codes alone, until there are
exactly as many as the image has; text is chosen from ids of text alone.

Rows join and leave at any step. Noise and tokens are drawn by (seed, image) and (seed, position), and what a pass gives
a row does not depend on the others in it; so neither does the row. docs/inference.md says where to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, count

import torch
from torch import Tensor

from ..errors import UserError
from ..export import Exported
from ..rng import generator_for
from ..sequence import Image
from .events import Done, Event, Failed, ImageEnd, ImageStart, TextDelta
from .image_decoding import CodeDecoder, LatentDecoder, sample
from .kv_cache import PrefixKeys, Segment, SlotAllocator, image_keys
from .model_runner import ModelRunner, StepInput
from .sequence_state import Request, SequenceState, accept, split_on_oom


class Engine:
    """Runs requests against one model, any number of them one after another, at most `slots` together.

    slots, positions: all the cache there will ever be. A request lies in one slot as long as it runs: its prompt, what
    it may write and draw, and at the far end the branches its drawings are guided by. positions, if not given: the
    model's context, and the null branch of an image as large as it was trained on.
    """

    def __init__(self, exported: Exported | ModelRunner, slots: int = 8, positions: int | None = None) -> None:
        runner = exported if isinstance(exported, ModelRunner) else ModelRunner(exported)
        self.runner, self.exported = runner, runner.exported
        self.config, self.grammar, self.tokenizer = runner.config, runner.grammar, runner.tokenizer
        if positions is None:
            side = self.exported.image_size
            cfg_len = len(runner.null_tokens) + runner.drawn((side, side))[1]
            positions = self.config.max_seq_len + (cfg_len if self.config.images != "none" else 0)
        if min(slots, positions) < 1:
            raise UserError(f"engine: expected at least 1 slot of 1 position, found {slots} of {positions}")
        self.positions = positions
        self.slots = SlotAllocator(slots)
        self.cache = runner.cache(slots, positions)
        self.drawer = (
            LatentDecoder(runner, self.cache) if self.grammar.first_code is None else CodeDecoder(runner, self.cache)
        )
        self._used: set[int] = set()
        self._numbers = count()
        self._waiting: deque[SequenceState] = deque()
        self._running: dict[int, SequenceState] = {}
        self._last: Engine | None = None
        """what `run` made last, with its cache, where passes are recorded"""

    def submit(self, request: Request) -> int:
        """Have a request run as soon as a slot is free, first come, first served; its number, which its events carry.

        Raises UserError, one line, for one that can not be, or that no slot could ever hold.
        """
        row = accept(self.runner, request, next(self._numbers), "request")
        if row.max_len + row.cfg_len > self.positions:
            raise UserError(
                f"request: expected at most {self.positions} positions in all, as a slot of the cache has, "
                f"found {row.max_len} to write and draw in and {row.cfg_len} to guide by"
            )
        self._waiting.append(row)
        return row.number

    def cancel(self, number: int) -> None:
        """Forget a request, wherever it is; nothing more is heard of it. One that has ended stays as it is."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        if number in self._running:
            self._leave(self._running[number], None)

    def cost(self, number: int) -> tuple[int, int]:
        """Of a request that waits or runs: positions of its prompt, and those that the network may compute for it."""
        row = next(row for row in (*self._waiting, *self._running.values()) if row.number == number)
        return len(row.layout), self.drawer.cost(row)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def schedule(self) -> list[int]:
        """Give free slots to those who wait; their numbers. A step begins with it, too."""
        rows = [self._waiting.popleft() for _ in range(min(len(self._waiting), len(self.slots)))]
        for row in rows:
            self._join(row)
        return [row.number for row in rows]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Take one step of every running request, and say what happened.

        Where memory does not suffice for all at once, they are computed in parts; one that is too large alone fails.
        """
        self.schedule()
        rows = sorted(self._running.values(), key=lambda row: row.slot)  # neighbours are computed together
        events: list[Event] = []
        for writing, logits in split_on_oom([row for row in rows if row.drawing is None], self._read):
            events += self._write(writing, logits)
        drawing = [row for row in rows if row.drawing is not None and not row.too_large]
        for row, progress in self.drawer.step(drawing):
            events += [progress] if progress is not None else []
            if row.finished is not None:
                events += self._end_image(row, row.finished)
        for row in rows:
            if row.too_large:
                self._leave(row, None)
                events.append(Failed(row.number))
        return events

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Run a list of requests together, in a cache made for them, and give their events as they happen.

        Recorded passes belong to their cache: where there are any, it is kept for the next run that it has room for.
        Rows are numbered from 0. Raises UserError before any work for a bad one, MemoryError where it does not suffice.
        """
        where = [f"request {number}" if number else "request" for number in range(len(requests))]
        rows = [accept(self.runner, request, number, where[number]) for number, request in enumerate(requests)]
        if not rows:
            return
        positions, engine = max(row.max_len + row.cfg_len for row in rows), self._last
        if engine is None or engine.busy or len(engine.slots) != len(rows) or engine.positions < positions:
            engine = Engine(self.runner, len(rows), positions)
        self._last = engine if self.runner.record is not None else None
        engine._waiting.extend(rows)
        while engine.busy:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise MemoryError(f"{where[event.request_id]}: {event.reason}")
                yield event

    def forget(self) -> None:
        """Give the cache back that `run` has kept."""
        self._last = None

    def _join(self, row: SequenceState) -> None:
        row.slot, row.length = self.slots.allocate(row.prefix_keys)
        if row.slot in self._used:  # one that is new is clear, and its memory, on most systems, not even taken
            self.cache.clear(row.slot, row.length, row.max_len)
            self.cache.clear(row.slot, self.cache.positions - row.cfg_len, self.cache.positions)
        self._used.add(row.slot)
        self._running[row.number] = row

    def _leave(self, row: SequenceState, prefix_keys: PrefixKeys | None) -> None:
        del self._running[row.number]
        self.slots.free(row.slot, prefix_keys)

    def _read(self, rows: Sequence[SequenceState]) -> Tensor:
        """One LM pass: every row reads its feed; logits `[row, id]` behind it."""
        feeds = [self._feed(row) for row in rows]
        others = [(row, other) for row in rows for other in self._branches(row)]
        passed = [*feeds, *(feed for _, feed in others)]
        last = [end - 1 for end in accumulate(feed.segment.count for feed in passed)]
        logits, _ = self.runner.forward(self.cache, passed, last)
        for row, feed, scores in zip(rows, feeds, logits, strict=False):
            if row.prefix_keys is not None and feed.segment.start >= len(row.layout):
                row.prefix_keys += [row.next_token] if row.finished is None else self._content(row.finished)
            row.length, row.finished = feed.segment.end, None
            if row.drawing is not None:
                # Of a branch that is read beside, what is behind its last feed, BOI.
                behind = [found for (other, _), found in zip(others, logits[len(rows) :], strict=True) if other is row]
                self.drawer.on_boi(row, [scores, *behind[-1:]])
        return logits[: len(rows)] + self.runner.logit_mask

    def _write(self, rows: Sequence[SequenceState], logits: Tensor) -> Iterator[Event]:
        """Rows that are not about to draw choose their next token."""
        writers = [number for number, row in enumerate(rows) if not self._may_draw(row)]
        if writers:
            logits[writers, self.grammar.boi] = -torch.inf
        for row, scores, likeliest in zip(rows, logits, logits.argmax(-1).tolist(), strict=True):
            if row.drawing is not None:
                row.next_token = None
                yield ImageStart(row.number, row.images)
            else:
                yield from self._choose(row, scores, likeliest)

    def _feed(self, row: SequenceState) -> StepInput:
        """What a writing row gives the model next: its prompt, its chosen token, or a finished image and EOI."""
        if row.length < len(row.layout):
            return self.runner.read(row.layout, row.slot, known=row.length)
        if row.finished is not None:
            return self.runner.commit(row.finished, row.slot, row.length)
        assert row.next_token is not None
        return StepInput(Segment(row.slot, row.length, 1), [row.next_token])

    def _branches(self, row: SequenceState) -> list[StepInput]:
        """Where a row is about to read BOI, what the other branches of the drawing read."""
        reads_token = row.length >= len(row.layout) and row.finished is None
        return self.drawer.start(row) if reads_token and row.next_token == self.grammar.boi else []

    def _content(self, latent: Tensor) -> PrefixKeys:
        """Of a finished image and EOI."""
        if self.grammar.first_code is not None:
            return [*(latent.flatten() + self.grammar.first_code).tolist(), self.grammar.eoi]
        return [*image_keys(latent, self.runner.patches(*latent.shape[1:])), self.grammar.eoi]

    def _may_draw(self, row: SequenceState) -> bool:
        return (
            row.request.draw != "never"
            and self.config.images != "none"
            and row.images < row.request.max_images
            and row.length + 2 + row.patches <= self.config.max_seq_len
        )

    def _choose(self, row: SequenceState, logits: Tensor, likeliest: int) -> Iterator[Event]:
        """Choose a row's next token from its logits `[vocabulary]`, of which `likeliest` is the largest."""
        request = row.request
        room = row.length + 1 < self.config.max_seq_len
        if request.draw == "force" and row.images == 0:
            row.next_token = self.grammar.boi
            return
        if row.written >= request.max_tokens or not room:
            yield from self._finish(row, "images" if request.max_tokens == 0 else "length")
            return
        token = likeliest
        if request.temperature > 0:
            generator = generator_for(request.seed, "token", row.length)
            token = sample(logits, request.temperature, request.top_p, generator)
        if token == self.grammar.eos:
            yield from self._finish(row, "stop")
            return
        row.next_token = token
        if token == self.grammar.boi:
            yield from self._flush(row)
            return
        row.written += 1
        for written, text in row.detokenizer.add(token):
            yield TextDelta(row.number, text, written)

    def _flush(self, row: SequenceState) -> Iterator[Event]:
        """Give the text that waits for the rest of a character: a picture, or the end, comes first."""
        for written, text in row.detokenizer.flush():
            yield TextDelta(row.number, text, written)

    def _finish(self, row: SequenceState, reason: str) -> Iterator[Event]:
        yield from self._flush(row)
        self._leave(row, row.prefix_keys)
        yield Done(row.number, reason, row.written, row.images, row.evaluations, row.images * row.patches)

    def _end_image(self, row: SequenceState, latent: Tensor) -> Iterator[Event]:
        row.seen.append(Image(latent, target=False))
        yield ImageEnd(row.number, row.images, latent)
        row.images += 1
        if row.request.max_tokens == 0 and row.images == row.request.max_images:
            yield from self._finish(row, "images")
