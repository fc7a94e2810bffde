"""Work of other processes arrives whole and in order, through shared memory or a pipe."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from transfuse.data.prefetch import SLOT_BYTES, SharedMemory, parallel_map, prefetch
from transfuse.errors import UserError
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate

GRAMMAR = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)


def batch(seed: int = 0, sides: tuple[int, ...] = (4, 4, 4)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = [Image(torch.randn(3, side, side, generator=generator)) for side in sides]
    return collate([Document([Text((7, 8)), image], sample=i) for i, image in enumerate(images)], GRAMMAR)


def same(a: Batch, b: Batch) -> bool:
    for name, ours in vars(a).items():
        other = getattr(b, name)
        pairs = zip(ours, other, strict=True) if isinstance(ours, tuple) else [(ours, other)]
        for x, y in pairs:
            if isinstance(x, torch.Tensor) and not x.is_meta:
                if x.dtype != y.dtype or not torch.equal(x, y):
                    return False
            elif isinstance(x, torch.Tensor):
                if x.shape != y.shape:
                    return False
            elif x != y:
                return False
    return True


@pytest.mark.parametrize("sides", [(4, 4, 4), (4, 8), (4,), ()])
@pytest.mark.parametrize("slot_bytes", [SLOT_BYTES, 64])
def test_a_batch_arrives_as_it_was_sent(sides: tuple[int, ...], slot_bytes: int) -> None:
    """Also where it is larger than a slot."""
    sent = collate([Document([Text((7, 8))])], GRAMMAR) if not sides else batch(sides=sides)
    memory = SharedMemory(workers=2, slots=3, slot_bytes=slot_bytes)
    packed = memory.send(sent, worker=1)
    assert (packed.slot is None) == (slot_bytes == 64)
    received = memory.receive(packed)
    assert same(received, sent)
    assert all(x.data_ptr() % 16 == 0 for x in (received.input_ids, received.loss_positions)) or packed.slot is None


def test_a_received_batch_stays_when_its_slot_is_written_to_again() -> None:
    memory, first = SharedMemory(1, 2), batch(1)
    received = memory.receive(memory.send(first, worker=0))
    slots = [memory.send(batch(seed), worker=0).slot for seed in (2, 3, 4)]
    assert slots == [1, 0, 1]
    assert same(received, first)


def test_without_shared_memory_everything_goes_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr("mmap.mmap", refuse)
    memory, sent = SharedMemory(1, 2), batch()
    packed = memory.send(sent, worker=0)
    assert packed.slot is None
    assert same(memory.receive(packed), sent)


def test_from_a_forked_process() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork")
    context = multiprocessing.get_context("fork")
    memory, pipe = SharedMemory(1, 2), context.SimpleQueue()
    process = context.Process(target=lambda: pipe.put(memory.send(batch(5), worker=0)))
    process.start()
    packed = pipe.get()
    process.join()
    assert packed.slot is not None
    assert same(memory.receive(packed), batch(5))


def test_results_come_in_order_and_few_are_ahead() -> None:
    begun: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return -item

    with ThreadPoolExecutor(3) as pool:
        results = prefetch(lambda item: pool.submit(read, item), range(100), window=10)
        assert [next(results) for _ in range(5)] == [0, -1, -2, -3, -4]
        results.close()
        assert len(begun) <= 15
        results = prefetch(lambda item: pool.submit(read, item), range(7), window=10)
        assert list(results) == [0, -1, -2, -3, -4, -5, -6]


def negation() -> Callable[[int], int]:
    return lambda item: -item


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_over_processes_is_in_order(workers: int) -> None:
    assert list(parallel_map(negation, range(20), workers, "here")) == [-item for item in range(20)]


def death() -> Callable[[int], None]:
    return lambda item: os._exit(1)


def test_a_worker_that_dies_is_reported_in_a_line() -> None:
    with pytest.raises(UserError, match="here: a worker process died, perhaps of too little memory; call again"):
        list(parallel_map(death, range(3), 1, "here"))
