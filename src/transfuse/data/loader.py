"""The batches of a step, as a function of the step's number: what makes resuming exact and simple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset

from ..sequence import Batch, Document, Grammar, ImageAttention, collate

FILL = 64
"""batches are filled up to a multiple of this many positions: fewer sizes for matrix kernels to be prepared for"""


EMPTY = Document([], sample=-1, closed=False, predict=False)
"""stands in for a part of a step whose samples are all left out: nothing is learned from it"""


class StepLoader:
    """`loader(step)` gives the micro-batches of that step: samples `step * batch_size` and on, split into parts.

    A sample for which `document` gives None is left out; the others are in the step they would be in anyway.

    With `workers`, coming steps are prepared in other processes; what they hold does not change.
    """

    def __init__(
        self,
        document: Callable[[int], Document | None],
        grammar: Grammar,
        batch_size: int,
        accumulate: int = 1,
        image_attention: ImageAttention = "bidirectional",
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or batch_size % accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate ({accumulate}), found {batch_size}")
        self.document, self.grammar, self.image_attention = document, grammar, image_attention
        self.batch_size, self.accumulate, self.workers = batch_size, accumulate, workers
        self._next: tuple[int, Iterator[list[Batch]]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        if not self.workers:
            return self.make(step)
        if self._next is None or self._next[0] != step:
            steps = _Steps(self, step)
            self._next = step, iter(DataLoader(steps, batch_size=None, num_workers=self.workers, prefetch_factor=4))
        batches = next(self._next[1])
        self._next = step + 1, self._next[1]
        return batches

    def make(self, step: int) -> list[Batch]:
        size = self.batch_size // self.accumulate
        batches = []
        for first in range(step * self.batch_size, (step + 1) * self.batch_size, size):
            found = [self.document(sample) for sample in range(first, first + size)]
            documents = [document for document in found if document is not None]
            batch = collate(documents or [EMPTY], self.grammar, self.image_attention, FILL)
            batches.append(batch if documents else replace(batch, idle=batch.positions))
        return batches


class _Steps(Dataset[list[Batch]]):
    """Steps from `first` on, for torch's workers."""

    def __init__(self, loader: StepLoader, first: int) -> None:
        self.loader, self.first = loader, first

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> list[Batch]:
        torch.set_num_threads(1)
        return self.loader.make(self.first + index)
