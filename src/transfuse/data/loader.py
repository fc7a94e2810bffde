"""The batches of a step, as a function of the step's number: what makes resuming exact and simple.

The items of a step are samples or, where they are packed beforehand, rows of samples. Step s has items
`s * batch_size` and on; each rank takes its stretch of them. So what a step learns from depends neither on the number
of ranks nor on that of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_all_start_methods

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..sequence import FILL, Batch, Document, ImageAttention, SequenceFormat, collate
from .dataset import DamagedError
from .faults import Damage
from .rows import Rows
from .transport import Sent, Transport

AHEAD = 4
"""steps that each worker is ahead"""

EMPTY = Document([], sample=-1, closed=False, predict=False)
"""stands in for a part of a step whose samples are all left out: nothing is learned from it"""


@dataclass(frozen=True)
class Made:
    """A step's batches, the documents that had to be left out, where its rows begin (`Rows.position`), and a mistake of
    the user's, if that came of it."""

    batches: list[Batch]
    faults: list[Damage]
    position: dict[str, int]
    mistake: str = ""


Finish = Callable[[Batch], Batch]


def unchanged(batch: Batch) -> Batch:
    return batch


class StepLoader:
    """`loader(step)` gives this rank's micro-batches of a step.

    A sample for which `document` gives None, or which is damaged, is left out; the others are where they would be
    anyway. on_faults is told of the damaged ones. With `workers`, coming steps are prepared in other processes.
    padding_image: for `collate`, if a network is sharded. finish: what else is to be done to a batch ahead of its step.
    """

    def __init__(
        self,
        document: Callable[[int], Document | None],
        grammar: SequenceFormat,
        batch_size: int,
        accumulate: int = 1,
        image_attention: ImageAttention = "bidirectional",
        workers: int = 0,
        rows: Rows | None = None,
        rank: int = 0,
        ranks: int = 1,
        on_faults: Callable[[Iterable[Damage]], None] = lambda faults: None,
        padding_image: torch.Tensor | None = None,
        finish: Finish = unchanged,
    ) -> None:
        if batch_size < 1 or batch_size % accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate ({accumulate}), found {batch_size}")
        self.document, self.grammar, self.image_attention = document, grammar, image_attention
        self.batch_size, self.accumulate, self.workers = batch_size, accumulate, workers
        self.rows, self.rank, self.ranks, self.on_faults = rows, rank, ranks, on_faults
        self.padding_image, self.finish = padding_image, finish
        self._next: tuple[int, Future[Made], Callable[[], Future[Made]]] | None = None
        self._position: dict[str, int] = {}

    def __call__(self, step: int) -> list[Batch]:
        made = self._fetched(step) if self.workers else self.make(step)
        if made.mistake:
            raise UserError(made.mistake)
        self.on_faults(made.faults)
        self._position = made.position
        return made.batches

    def position(self) -> dict[str, int]:
        """A few numbers that let `start_from` go on after the last step at once; a step is found without them, too."""
        return self._position

    def start_from(self, position: dict[str, int]) -> None:
        if self.rows is not None and position:
            self.rows.start_from(position)
            self._position = position

    def make(self, step: int) -> Made:
        first, count = step * self.batch_size, self.batch_size
        start, stop = (first + count * rank // self.ranks for rank in (self.rank, self.rank + 1))
        cuts = [start + (stop - start) * part // self.accumulate for part in range(self.accumulate + 1)]
        faults: list[Damage] = []
        try:
            batches = [self._batch(cuts[i], cuts[i + 1], faults) for i in range(self.accumulate)]
        except UserError as error:  # from another process an exception would come with its traceback in it
            return Made([], [], {}, str(error))
        return Made(batches, faults, {} if self.rows is None else self.rows.position(first))

    def _batch(self, start: int, stop: int, faults: list[Damage]) -> Batch:
        samples: Iterable[int] = range(start, stop)
        fill = FILL
        if self.rows is not None:
            samples = [sample for row in range(start, stop) for sample in self.rows.row(row)]
            fill = max(1, stop - start) * self.rows.length  # one size for all steps
        documents = []
        for sample in samples:
            try:
                found = self.document(sample)
            except DamagedError as error:
                faults.append(Damage(error.source, error.shard, error.key, error.reason))
                continue
            if found is not None:
                documents.append(found)
        batch = collate(documents or [EMPTY], self.grammar, self.image_attention, fill, self.padding_image)
        return self.finish(batch if documents else replace(batch, n_padding=batch.positions))

    def _fetched(self, step: int) -> Made:
        """From other processes; the step after it is received by a thread meanwhile."""
        if self._next is None or self._next[0] != step:
            # A worker may be AHEAD steps ahead of the one that is unpacked.
            transport = Transport(self.workers, AHEAD + 1)
            steps = _Steps(self, step, transport)
            # forked, where there is a choice: then nothing of the loader needs to be pickled
            start = "fork" if "fork" in get_all_start_methods() else None
            loader = DataLoader(
                steps, None, num_workers=self.workers, prefetch_factor=AHEAD, multiprocessing_context=start
            )
            receive = partial(_receive, transport, iter(loader))
            thread = ThreadPoolExecutor(1, thread_name_prefix="receive")
            self._next = step, thread.submit(receive), lambda: thread.submit(receive)
        _, waiting, submit = self._next
        made = waiting.result()
        self._next = step + 1, submit(), submit
        return made


def _receive(transport: Transport, steps: Iterator[Sent]) -> Made:
    made: Made = transport.unpack(next(steps))
    return made


class _Steps(Dataset[Sent]):
    """Steps from `first` on, for torch's workers."""

    def __init__(self, loader: StepLoader, first: int, transport: Transport) -> None:
        self.loader, self.first, self.transport = loader, first, transport

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Sent:
        torch.set_num_threads(1)
        return self.transport.pack(self.loader.make(self.first + index))
