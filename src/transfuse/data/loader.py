"""The batches of a step, as a function of the step's number: this is what makes resuming exact and simple.

The items of a step are samples or, where they are packed, rows of samples. Step s has items `s * batch_size` and on;
each rank takes its stretch of them. So what a step learns from depends neither on the number of ranks nor on that of
workers. A corrupt document is left out and recorded; nothing moves up, so ranks and restarts stay in step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_all_start_methods
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..io import append_jsonl
from ..log import logger
from ..sequence import FILL, Batch, Document, ImageAttention, SequenceFormat, collate
from .dataset import FREE_FAULTS, CorruptSample, CorruptSampleError
from .packing import Packer
from .prefetch import SentObject, SharedMemory

AHEAD = 4  # steps that each worker is ahead

EMPTY = Document([], sample=-1, closed=False, predict=False)
"""stands in for a part of a step whose samples are all left out: nothing is learned from it"""

Finish = Callable[[Batch], Batch]


def unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class LoadedStep:
    """A step's batches, its corrupt samples, where its rows begin (`Packer.position`), and a user's mistake if any."""

    batches: list[Batch]
    corrupt: list[CorruptSample]
    position: dict[str, int]
    mistake: str = ""


class StepLoader:
    """`loader(step)` returns this rank's micro-batches of a step.

    A sample for which `document` returns None, or which is corrupt, is left out; the others are where they would be
    anyway. on_corrupt: called with the corrupt ones. workers: processes that prepare coming steps; 0: this one.
    padding_image: for `collate`, if a network is sharded. finish: applied to each batch ahead of its step.
    """

    def __init__(
        self,
        document: Callable[[int], Document | None],
        form: SequenceFormat,
        batch_size: int,
        accumulate: int = 1,
        image_attention: ImageAttention = "bidirectional",
        workers: int = 0,
        packer: Packer | None = None,
        rank: int = 0,
        ranks: int = 1,
        on_corrupt: Callable[[Iterable[CorruptSample]], None] = lambda samples: None,
        padding_image: torch.Tensor | None = None,
        finish: Finish = unchanged,
    ) -> None:
        if batch_size < 1 or batch_size % accumulate:
            raise ValueError(f"batch_size: expected a multiple of accumulate ({accumulate}), found {batch_size}")
        self.document, self.form, self.image_attention = document, form, image_attention
        self.batch_size, self.accumulate, self.workers = batch_size, accumulate, workers
        self.packer, self.rank, self.ranks, self.on_corrupt = packer, rank, ranks, on_corrupt
        self.padding_image, self.finish = padding_image, finish
        self._next: tuple[int, Future[LoadedStep], Callable[[], Future[LoadedStep]]] | None = None
        self._position: dict[str, int] = {}

    def __call__(self, step: int) -> list[Batch]:
        loaded = self._receive(step) if self.workers else self.load(step)
        if loaded.mistake:
            raise UserError(loaded.mistake)
        self.on_corrupt(loaded.corrupt)
        self._position = loaded.position
        return loaded.batches

    def position(self) -> dict[str, int]:
        """Return a few numbers that let `start_from` resume after the last step at once; it works without them, too."""
        return self._position

    def start_from(self, position: dict[str, int]) -> None:
        """Resume at a position."""
        if self.packer is not None and position:
            self.packer.start_from(position)
            self._position = position

    def load(self, step: int) -> LoadedStep:
        """Read and collate a step in this process."""
        first, count = step * self.batch_size, self.batch_size
        start, stop = (first + count * rank // self.ranks for rank in (self.rank, self.rank + 1))
        cuts = [start + (stop - start) * part // self.accumulate for part in range(self.accumulate + 1)]
        corrupt: list[CorruptSample] = []
        try:
            batches = [self._batch(cuts[i], cuts[i + 1], corrupt) for i in range(self.accumulate)]
        except UserError as error:  # from another process an exception would come with its traceback in it
            return LoadedStep([], [], {}, str(error))
        return LoadedStep(batches, corrupt, {} if self.packer is None else self.packer.position(first))

    def _batch(self, start: int, stop: int, corrupt: list[CorruptSample]) -> Batch:
        samples: Iterable[int] = range(start, stop)
        fill = FILL
        if self.packer is not None:
            samples = [sample for row in range(start, stop) for sample in self.packer.row(row)]
            fill = max(1, stop - start) * self.packer.length  # one size for all steps
        documents = []
        for sample in samples:
            try:
                document = self.document(sample)
            except CorruptSampleError as error:
                corrupt.append(error.sample)
                continue
            if document is not None:
                documents.append(document)
        batch = collate(documents or [EMPTY], self.form, self.image_attention, fill, self.padding_image)
        return self.finish(batch if documents else replace(batch, n_padding=batch.positions))

    def _receive(self, step: int) -> LoadedStep:
        """Return a step from the worker processes; a thread receives the next one meanwhile."""
        if self._next is None or self._next[0] != step:
            # A worker may be AHEAD steps ahead of the one being received.
            memory = SharedMemory(self.workers, AHEAD + 1)
            # Forked where possible: then nothing of the loader needs to be pickled.
            start_method = "fork" if "fork" in get_all_start_methods() else None
            loader = DataLoader(
                _Steps(self, step, memory),
                None,
                num_workers=self.workers,
                prefetch_factor=AHEAD,
                multiprocessing_context=start_method,
            )
            steps: Iterator[SentObject] = iter(loader)
            thread = ThreadPoolExecutor(1, thread_name_prefix="receive")

            def receive() -> Future[LoadedStep]:
                return thread.submit(lambda: memory.receive(next(steps)))

            self._next = step, receive(), receive
        _, waiting, receive = self._next
        loaded = waiting.result()
        self._next = step + 1, receive(), receive
        return loaded


class _Steps(Dataset[SentObject]):
    """Steps from `first` on, for torch's workers."""

    def __init__(self, loader: StepLoader, first: int, memory: SharedMemory) -> None:
        self.loader, self.first, self.memory = loader, first, memory

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> SentObject:
        torch.set_num_threads(1)
        return self.memory.send(self.loader.load(self.first + index))


class CorruptLog:
    """Records corrupt samples in `quarantine.jsonl`, a line each; each counts once, restarts included.

    Rank 3 writes `quarantine-rank3.jsonl`, and reads what the others wrote whenever it meets one: so the budget is the
    whole run's, and each file has one writer.

    sizes: documents of each source. share: of a source, above which `add` raises; ten are always let pass.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], share: float, rank: int = 0) -> None:
        self.folder, self.sizes, self.share = folder, sizes, share
        self.path = folder / (f"quarantine-rank{rank}.jsonl" if rank else "quarantine.jsonl")
        self.known: set[CorruptSample] = set()
        self._counts: Counter[str] = Counter()
        self._ends: dict[Path, int] = {}  # how far each file was read
        self._read()

    def add(self, samples: Iterable[CorruptSample]) -> None:
        """Record samples that are not known yet. Raises UserError above the budget."""
        distinct = dict.fromkeys(samples)
        if self.known.issuperset(distinct):
            return
        self._read()
        for sample in distinct:
            if sample not in self.known:
                append_jsonl(self.path, [asdict(sample)])
                logger.info(f"left out: {sample.source}/{sample.shard}: {sample.key}: {sample.reason}")
        self._read()
        for source, count in self._counts.items():
            if count > max(FREE_FAULTS, self.share * self.sizes.get(source, 0)):
                raise UserError(
                    f"{source}: {count} damaged documents, more than data.max_errors {self.share} lets pass (see "
                    f"{self.folder / 'quarantine*.jsonl'}); look with: transfuse data verify {source}"
                )

    def _read(self) -> None:
        """Read the lines that ranks have added; an incomplete one is left for later."""
        for path in self.folder.glob("quarantine*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._ends.get(path, 0))
                text = file.read()
            whole = text.rfind(b"\n") + 1
            self._ends[path] = self._ends.get(path, 0) + whole
            for line in text[:whole].splitlines():
                try:
                    sample = CorruptSample(**json.loads(line))
                except (ValueError, TypeError):  # cut short by a kill: it will be met again
                    continue
                self._counts[sample.source] += sample not in self.known
                self.known.add(sample)
