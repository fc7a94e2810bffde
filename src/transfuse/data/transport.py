"""Objects full of tensors, from worker processes to the one that trains: tensors through memory that both see.

    transport = Transport(workers)          before the workers are forked
    sent = transport.pack(made)             in a worker
    made = transport.unpack(sent)           in the process that forked it

A pipe copies every byte several times, with Python's lock held: the ten megabytes of a step cost 40 ms, more than a
GPU takes to train on them. Shared files of torch's own would be as fast, but lie in /dev/shm, of which containers have
64 MB by default; this memory is anonymous and has no such limit.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

SLOT = 2**26
"""bytes of address space a slot has; memory is taken as it is written to"""

ALIGNED = 64
"""bytes"""


@dataclass(frozen=True)
class Sent:
    """What goes through the pipe: the object without its tensors, and where those lie, or themselves."""

    pickled: bytes
    sizes: Sequence[int]
    slot: int | None
    buffers: Sequence[bytes] = ()


class Transport:
    """slots: objects of one worker that may be under way at a time, the one that is being unpacked included.

    Where there is no such memory, or an object is larger than a slot, everything goes through the pipe.
    """

    def __init__(self, workers: int, slots: int) -> None:
        self.slots, self._turn = slots, 0
        self._memory: np.ndarray | None = None
        try:
            shared = mmap.mmap(-1, workers * slots * SLOT)
        except OSError:
            return
        self._memory = np.frombuffer(shared, np.uint8).reshape(workers, slots, SLOT)

    def pack(self, value: Any) -> Sent:
        found: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=found.append).dump(value)
        buffers = [buffer.raw() for buffer in found]
        sizes, worker = [len(buffer) for buffer in buffers], get_worker_info()
        places = _places(sizes)
        if self._memory is None or worker is None or places[-1] > SLOT:
            return Sent(stream.getvalue(), sizes, None, [bytes(buffer) for buffer in buffers])
        number, self._turn = self._turn, (self._turn + 1) % self.slots
        for buffer, size, place in zip(buffers, sizes, places, strict=False):
            self._memory[worker.id, number, place : place + size] = np.frombuffer(buffer, np.uint8)
        return Sent(stream.getvalue(), sizes, worker.id * self.slots + number)

    def unpack(self, sent: Sent) -> Any:
        buffers: Sequence[Any] = [bytearray(buffer) for buffer in sent.buffers]
        if sent.slot is not None:
            assert self._memory is not None
            places = _places(sent.sizes)
            # A copy, which NumPy makes without the lock: the slot will be written to again.
            copy = self._memory[divmod(sent.slot, self.slots)][: places[-1]].copy()
            buffers = [copy[place : place + size] for size, place in zip(sent.sizes, places, strict=False)]
        return pickle.loads(sent.pickled, buffers=buffers)


def _places(sizes: Sequence[int]) -> list[int]:
    """Where buffers of so many bytes begin, each aligned, and where the last one ends."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // ALIGNED) * ALIGNED)
    return places


class _Pickler(pickle.Pickler):
    """Tensors as arrays, which are left out of the stream."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if value.is_meta:
            return partial(torch.empty, device="meta"), (tuple(value.shape),)
        return torch.from_numpy, (value.contiguous().numpy(),)
