"""Work done ahead by other processes: a parallel map in order, and shared memory for the tensors that come back."""

from __future__ import annotations

import io
import mmap
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing import get_all_start_methods, parent_process
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

SLOT_BYTES = 2**26  # of address space; memory is used only once it is written to
ALIGNMENT = 64  # bytes


def prefetch(
    submit: Callable[[Item], Future[Result]], items: Iterable[Item], window: int
) -> Generator[Result, None, None]:
    """Yield the results of `submit(item)` in the order of `items`, keeping up to `window` of them running."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def parallel_map(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int, what: str
) -> Generator[Result, None, None]:
    """Yield `work(item)` in the order of `items`, where each process calls `work = make()` once.

    workers: processes of one thread each, which end when this process ends, even if it is killed; 0: this process.

    Raises:
        UserError: "`what`: ...", a worker process died.
    """
    if not workers:
        yield from map(make(), items)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(make,)) as pool:
        try:
            yield from prefetch(lambda item: pool.submit(_run_work, item), items, 2 * workers)
        except BrokenProcessPool:
            raise UserError(f"{what}: a worker process died, perhaps of too little memory; call again") from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of this worker process


def _start_worker(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:  # otherwise a worker whose parent was killed would wait for work for ever
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _work = make()


def _run_work(item: Any) -> Any:
    return _work(item)


@dataclass(frozen=True)
class SentObject:
    """A pickled object without its tensors, which are in a slot of the shared memory (`slot`), or in `buffers`."""

    pickled: bytes
    sizes: Sequence[int]
    slot: int | None
    buffers: Sequence[bytes] = ()


class SharedMemory:
    """Send objects full of tensors from forked DataLoader workers to their parent.

        memory = SharedMemory(workers, slots)      before the workers are forked
        sent = memory.send(value)                  in a worker
        value = memory.receive(sent)               in the parent

    A pipe copies every byte several times with Python's lock held, and torch's own shared files are in /dev/shm, which
    containers limit to 64 MB. This memory is anonymous. An object larger than a slot, or any object where processes
    cannot be forked, goes through the pipe whole.

    slots: objects of one worker that may be on the way at a time, including the one being received.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int = SLOT_BYTES) -> None:
        self.slots, self.slot_bytes, self._turn = slots, slot_bytes, 0
        self._memory: np.ndarray | None = None
        if "fork" in get_all_start_methods():
            try:
                shared = mmap.mmap(-1, workers * slots * slot_bytes)
            except OSError:
                return
            self._memory = np.frombuffer(shared, np.uint8).reshape(workers, slots, slot_bytes)

    def send(self, value: Any, worker: int | None = None) -> SentObject:
        """Return what to put into the pipe. worker: number of this process; None: that of torch's DataLoader."""
        if worker is None:
            info = get_worker_info()
            worker = None if info is None else info.id
        pickled: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _TensorPickler(stream, protocol=5, buffer_callback=pickled.append).dump(value)
        buffers = [buffer.raw() for buffer in pickled]
        sizes = [len(buffer) for buffer in buffers]
        offsets = _offsets(sizes)
        if self._memory is None or worker is None or offsets[-1] > self.slot_bytes:
            return SentObject(stream.getvalue(), sizes, None, [bytes(buffer) for buffer in buffers])
        number, self._turn = self._turn, (self._turn + 1) % self.slots
        for buffer, size, offset in zip(buffers, sizes, offsets, strict=False):
            self._memory[worker, number, offset : offset + size] = np.frombuffer(buffer, np.uint8)
        return SentObject(stream.getvalue(), sizes, worker * self.slots + number)

    def receive(self, sent: SentObject) -> Any:
        """Return a sent object, whose tensors are copies."""
        buffers: Sequence[Any] = [bytearray(buffer) for buffer in sent.buffers]
        if sent.slot is not None:
            assert self._memory is not None
            offsets = _offsets(sent.sizes)
            # NumPy copies without Python's lock; the slot will be written to again.
            copy = self._memory[divmod(sent.slot, self.slots)][: offsets[-1]].copy()
            buffers = [copy[offset : offset + size] for size, offset in zip(sent.sizes, offsets, strict=False)]
        return pickle.loads(sent.pickled, buffers=buffers)


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Return where aligned buffers of these sizes begin, and where the last one ends."""
    return [*accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0)]


class _TensorPickler(pickle.Pickler):
    """Pickles tensors as arrays, whose bytes are left out of the stream."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if value.is_meta:
            return partial(torch.empty, device="meta"), (tuple(value.shape),)
        return torch.from_numpy, (value.contiguous().numpy(),)
