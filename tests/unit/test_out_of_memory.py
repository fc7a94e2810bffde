"""Memory that does not suffice: passes are taken in parts, to the same bytes; one request fails, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import exported
from engines import coded

from transfuse.inference import Done, Engine, Event, Failed, ImageEnd, TextDelta, TransfusionPipeline
from transfuse.inference.model_runner import ModelRunner
from transfuse.inference.optimize import pack

PROMPTS = ["a crab", "two balloons on a red background", "the moon is above", "hello"]


@pytest.fixture(params=["latents", "codes"])
def pipe(request, tokenizer) -> TransfusionPipeline:
    found = coded(tokenizer) if request.param == "codes" else exported(tokenizer)
    pack(found.model)
    return TransfusionPipeline(found)


def limit(monkeypatch: pytest.MonkeyPatch, most: int, never: int | None = None) -> list[int]:
    """A pass of more positions fails as torch does, and every one of the request in slot `never`. Their sizes."""
    original, sizes = ModelRunner.forward, []

    def forward(self, cache, feeds, predict):
        count = sum(feed.segment.count for feed in feeds)
        if len(feeds) > 1 or count > most or any(feed.segment.slot == never for feed in feeds):
            failing = count > most or any(feed.segment.slot == never and feed.segment.start > 0 for feed in feeds)
            if failing:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        sizes.append(count)
        return original(self, cache, feeds, predict)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    return sizes


def requests(pipe: TransfusionPipeline):
    for number, prompt in enumerate(PROMPTS):
        asked = pipe.request([prompt], steps=3 if pipe.exported.model.config.images == "latents" else None)
        yield replace(asked, draw="force" if number % 2 else "auto", max_tokens=6, seed=number)


def key(event: Event):
    match event:
        case TextDelta(row, _, token):
            return row, token
        case ImageEnd(row, _, latent):
            return row, latent.numpy().tobytes()
        case _:
            return event.request_id, type(event).__name__


def drive(engine: Engine, pipe: TransfusionPipeline) -> list[Event]:
    for request in requests(pipe):
        engine.submit(request)
    found = []
    while engine.busy:
        found += engine.step()
    return found


def test_in_parts_to_the_same_bytes(pipe, monkeypatch) -> None:
    whole = drive(Engine(pipe.exported), pipe)
    sizes = limit(monkeypatch, most=70)
    parts = drive(Engine(pipe.exported), pipe)
    assert sorted(map(key, whole), key=repr) == sorted(map(key, parts), key=repr)
    assert max(sizes) <= 70


def test_one_fails_and_the_others_go_on(pipe, monkeypatch) -> None:
    whole = drive(Engine(pipe.exported), pipe)
    limit(monkeypatch, most=10_000, never=1)
    engine = Engine(pipe.exported)
    found = drive(engine, pipe)
    assert [event.request_id for event in found if isinstance(event, Failed)] == [1]
    assert {event.request_id for event in found if isinstance(event, Done)} == {0, 2, 3}
    assert [key(event) for event in whole if event.request_id != 1] == [
        key(event) for event in found if event.request_id != 1
    ]
    assert len(engine.slots) == 8  # its place is free again


def test_a_list_that_does_not_fit_says_which(tokenizer, monkeypatch) -> None:
    pipe = TransfusionPipeline(exported(tokenizer))
    limit(monkeypatch, most=10_000, never=0)
    with pytest.raises(MemoryError, match=r"^request: out of memory$"):
        pipe("a crab", num_inference_steps=2)


def test_other_mistakes_are_not_taken_for_it(tokenizer, monkeypatch) -> None:
    pipe = TransfusionPipeline(exported(tokenizer))

    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ModelRunner, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        pipe("a crab", num_inference_steps=2)


def test_torch_says_it_as_expected() -> None:
    from transfuse.devices import out_of_memory

    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert not out_of_memory(RuntimeError("shapes"))
