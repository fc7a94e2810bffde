"""What goes from a loader's process to the training one arrives whole, through shared memory or a pipe."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from transfuse.data import transport
from transfuse.data.transport import Transport
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate

GRAMMAR = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)


def batch(seed: int = 0, sides: tuple[int, ...] = (4, 4, 4)) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = [Image(torch.randn(3, side, side, generator=generator)) for side in sides]
    return collate([Document([Text((7, 8)), image], sample=i) for i, image in enumerate(images)], GRAMMAR)


def same(a: Batch, b: Batch) -> bool:
    for name, ours in vars(a).items():
        theirs = getattr(b, name)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
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
@pytest.mark.parametrize("slot", [transport.SLOT, 64])
def test_a_batch_arrives_as_it_was_sent(sides: tuple[int, ...], slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is larger than a slot."""
    monkeypatch.setattr(transport, "SLOT", slot)
    monkeypatch.setattr(transport, "get_worker_info", lambda: SimpleNamespace(id=1))
    sent = collate([Document([Text((7, 8))])], GRAMMAR) if not sides else batch(sides=sides)
    road = Transport(workers=2, slots=3)
    packed = road.pack(sent)
    assert (packed.slot is None) == (slot == 64)
    found = road.unpack(packed)
    assert same(found, sent)
    assert all(x.data_ptr() % 16 == 0 for x in (found.input_ids, found.loss_positions)) or packed.slot is None


def test_what_was_unpacked_stays_when_its_slot_is_written_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "get_worker_info", lambda: SimpleNamespace(id=0))
    road, first = Transport(1, 2), batch(1)
    found = road.unpack(road.pack(first))
    slots = [road.pack(batch(seed)).slot for seed in (2, 3, 4)]
    assert slots == [1, 0, 1]
    assert same(found, first)


def test_without_shared_memory_all_goes_through_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(transport.mmap, "mmap", refuse)
    monkeypatch.setattr(transport, "get_worker_info", lambda: SimpleNamespace(id=0))
    road, sent = Transport(1, 2), batch()
    packed = road.pack(sent)
    assert packed.slot is None
    assert same(road.unpack(packed), sent)


def test_from_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork")
    monkeypatch.setattr(transport, "get_worker_info", lambda: SimpleNamespace(id=0))
    context = multiprocessing.get_context("fork")
    road, pipe = Transport(1, 2), context.SimpleQueue()
    process = context.Process(target=lambda: pipe.put(road.pack(batch(5))))
    process.start()
    packed = pipe.get()
    process.join()
    assert packed.slot is not None
    assert same(road.unpack(packed), batch(5))
