"""Continuous batching: whoever joins and leaves, and when, a request's events are those of the request alone, to the
last bit (CPU, float32, packed as `transfuse.load` packs it)."""

from __future__ import annotations

import contextlib
import gc
import random
from dataclasses import replace

import pytest
import torch
from conftest import latent
from engines import ARMS, POSITIONS, alone, codes, exactly, finish, plain, some_request

from transfuse.diffusion import SamplerConfig
from transfuse.errors import UserError
from transfuse.inference import Done, Engine, ImageProgress, ImageStart, Request
from transfuse.sequence import Document, Image, Text, Tokenizer


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("schedule", range(4))
def test_any_schedule_gives_what_each_request_gives_alone(tokenizer: Tokenizer, arm: str, schedule: int) -> None:
    """Twelve requests join at random ticks and share five slots; a third of them is cancelled at random ticks."""
    one, draws = ARMS[arm](tokenizer), random.Random(f"{arm} {schedule}")
    engine = Engine(one, slots=5, positions=POSITIONS)
    requests: dict[int, Request] = {}
    told_of: dict[int, list[list[object]]] = {}
    cancelled: dict[int, int] = {}
    left = 12
    for step in range(400):
        while left and draws.random() < 0.4:
            asked = some_request(draws, one.model.config.images == "codes")
            number = engine.submit(asked)
            requests[number], told_of[number] = asked, []
            left -= 1
            if draws.random() < 1 / 3:
                cancelled[number] = step + draws.randrange(12)
        for number, at in cancelled.items():
            if at == step:
                engine.cancel(number)
        for event in engine.step():
            assert cancelled.get(event.request_id, step + 1) > step, "nothing more is heard of a cancelled one"
            told_of[event.request_id].append(exactly(event))
        if not left and not engine.busy:
            break
    assert not engine.busy
    assert len(engine.slots) == 5
    assert any(told_of.values())
    for number, asked in requests.items():
        whole = alone(one, asked)
        mine = told_of[number]
        assert mine == whole[: len(mine)], (number, asked)
        assert len(mine) == len(whole) or number in cancelled


@pytest.mark.parametrize("arm", ["linear", "codes"])
def test_two_threads(tokenizer: Tokenizer, arm: str) -> None:
    """Which thread computes a row is not seen in it."""
    draws, before = random.Random(arm), torch.get_num_threads()
    one = ARMS[arm](tokenizer)
    requests = [some_request(draws, arm == "codes") for _ in range(5)]
    torch.set_num_threads(2)
    try:
        together = [exactly(event) for event in Engine(one).run(requests)]
        rows = [event.request_id for event in Engine(one).run(requests)]
        for row, asked in enumerate(requests):
            assert [event for event, of in zip(together, rows, strict=True) if of == row] == alone(one, asked)
    finally:
        torch.set_num_threads(before)


def test_first_come_first_served_and_nobody_waits_for_ever(tokenizer: Tokenizer) -> None:
    """Two slots, long requests first and short ones behind: they begin in order, while others keep coming."""
    engine = Engine(ARMS["linear"](tokenizer), slots=2, positions=POSITIONS)
    begun: list[int] = []
    count = 0
    for _ in range(60):
        if count < 20:
            engine.submit(plain(sampler=SamplerConfig("ddim", 9 if count < 2 else 1), seed=count))
            count += 1
        begun += [event.request_id for event in engine.step() if isinstance(event, ImageStart)]
    begun += [event.request_id for event in finish(engine) if isinstance(event, ImageStart)]
    assert begun == list(range(20))


def test_what_can_never_fit_is_refused_and_nothing_else_is_touched(tokenizer: Tokenizer) -> None:
    engine = Engine(ARMS["linear"](tokenizer), slots=1, positions=64)
    words = Document([Text((9,) * 20)], closed=False)
    first = engine.submit(plain())
    with pytest.raises(
        UserError, match=r"^request: expected at most 64 positions in all, .* found 71 .* and 0 to guide by$"
    ):
        engine.submit(plain(words, draw="never", max_tokens=49))
    with pytest.raises(UserError, match=r"found 42 to write and draw in and 34 to guide by$"):
        engine.submit(plain(Document([Text((9,) * 6)], closed=False), size=(8, 16)))
    with pytest.raises(UserError, match="prompt: expected at most 256 positions"):
        engine.submit(plain(Document([Text((9,) * 300)], closed=False)))
    with pytest.raises(UserError, match="expected at least 1 slot"):
        Engine(ARMS["linear"](tokenizer), slots=0)
    fits = engine.submit(plain(words, draw="never", max_tokens=42))
    assert {event.request_id for event in finish(engine) if isinstance(event, Done)} == {first, fits}


def test_the_cache_is_what_was_said(tokenizer: Tokenizer) -> None:
    """However many come and go; and the same tensors, never moved."""
    engine = Engine(ARMS["linear"](tokenizer), slots=3, positions=100)
    assert engine.cache.keys.shape == (2, 3, 4, 128, 16), "rounded up to blocks of 64"
    at = engine.cache.keys.data_ptr(), engine.cache.values.data_ptr()
    for seed in range(20):
        engine.submit(plain(seed=seed, guidance_scale=2.0))
    finish(engine)
    assert at == (engine.cache.keys.data_ptr(), engine.cache.values.data_ptr())


def tensors() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # a tensor without memory, left by a compiled graph of another test
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("arm", ["linear", "codes"])
def test_memory_comes_back(tokenizer: Tokenizer, arm: str) -> None:
    """After the end, and after a cancel in every phase: waiting, prompt read, drawing begun, half drawn, writing."""
    engine = Engine(ARMS[arm](tokenizer), slots=2, positions=POSITIONS)
    picture = codes(4, 4) if arm == "codes" else latent(8, 8)
    document = Document([Text((9,) * 30), Image(picture, target=False), Text((9,))], closed=False)
    asked = plain(document, max_tokens=9, image_guidance_scale=2.0, preview_every=1)
    engine.submit(asked)
    finish(engine)  # allocates once: the cache, the null prefix
    before = tensors()
    for ticks in (0, 1, 2, 3, 7, None):
        numbers = [engine.submit(replace(asked, seed=seed)) for seed in range(4)]
        if ticks is None:
            finish(engine)
        else:
            for _ in range(ticks):
                engine.step()
            assert engine.busy
            for number in numbers:
                engine.cancel(number)
        assert not engine.busy
        assert len(engine.slots) == 2
        assert engine.step() == []
        assert tensors() <= before  # fewer where another test's went meanwhile
        engine.cancel(numbers[0])  # an end and a cancel may cross


def test_whoever_was_there_before_is_not_seen(tokenizer: Tokenizer) -> None:
    """Not even where it left what is no number."""
    one = ARMS["linear"](tokenizer)
    expected = alone(one, plain(max_tokens=6))
    engine = Engine(one, slots=1, positions=POSITIONS)
    engine.submit(plain(Document([Text((9,) * 60)], closed=False), max_tokens=6, guidance_scale=2.0))
    finish(engine)
    with torch.inference_mode():
        for store in (engine.cache.keys, engine.cache.values):
            store.fill_(torch.nan)
    engine.submit(plain(max_tokens=6))
    assert [exactly(event) for event in finish(engine)] == expected


def test_a_tick_is_one_pass_to_write_and_one_to_draw(tokenizer: Tokenizer, sizes: list[int]) -> None:
    """Whatever the phases, and the null prefix is read once for all."""
    engine = Engine(ARMS["linear"](tokenizer), slots=8, positions=POSITIONS)
    draws, null, most = random.Random(0), 0, 0
    for step in range(60):
        if step < 16:
            engine.submit(replace(some_request(draws, False), guidance_scale=2.0))
        sizes.clear()
        engine.step()
        null += 2 in sizes and len(sizes) == 3
        assert len(sizes) <= 2 + (2 in sizes)
        most = max(most, len(sizes))
    assert (null, most) == (1, 3), "two passes a tick, and once the null prefix"


def test_previews_every_so_many_steps(tokenizer: Tokenizer) -> None:
    engine = Engine(ARMS["linear"](tokenizer))
    asked = plain(sampler=SamplerConfig("ddim", 7), preview_every=3)
    progress = [event for event in engine.run([asked]) if isinstance(event, ImageProgress)]
    assert [event.step for event in progress if event.preview is not None] == [3, 6]
    assert [event.t for event in progress] == [1000, 857, 714, 571, 429, 286, 143]
    plainly = [event for event in engine.run([replace(asked, preview_every=0)]) if isinstance(event, ImageProgress)]
    assert all(event.preview is None for event in plainly)
    assert [exactly(replace(event, preview=None)) for event in progress] == [exactly(event) for event in plainly]
