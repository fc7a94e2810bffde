"""Turns of a conversation: each reads what is new alone, and hears what a fresh reading of everything would."""

from __future__ import annotations

from dataclasses import replace

import PIL.Image
import pytest
import torch
from conftest import exported, latent
from engines import ARMS, POSITIONS, codes, packed, plain

from transfuse.errors import UserError
from transfuse.inference import Conversation, Done, Engine, Event, ImageEnd, TextDelta, TransfusionPipeline
from transfuse.inference.scheduling import SlotAllocator
from transfuse.sequence import Document, Image, Text, Tokenizer, layout_document
from transfuse.sequence.chat import chat_prompt

SETTINGS = {"max_tokens": 6, "temperature": 1.0, "code_temperature": 1.0}


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, TextDelta)]


@pytest.mark.parametrize("arm", ["linear", "unet", "causal", "codes", "stable codes"])
@pytest.mark.parametrize("draw", ["force", "auto", "never"])
def test_turns_equal_fresh_readings(tokenizer: Tokenizer, arm: str, draw: str, sizes: list[int]) -> None:
    """Four turns of words, shown pictures, drawn ones; only what is new is read."""
    one = ARMS[arm](tokenizer)
    pipe = TransfusionPipeline(one)
    talk, shown = Conversation(pipe), PIL.Image.new("RGB", (8, 8), "red")
    known = 0
    for seed, said in enumerate((["a crab"], [shown, "two balloons"], ["on a red"], ["the moon", shown])):
        asked = talk.request(said, seed=seed, draw=draw, **SETTINGS)
        whole = len(layout_document(asked.document, talk.engine.grammar))
        fresh = list(Engine(one).run([replace(asked, reuse=False)]))
        sizes.clear()
        heard = list(talk.say(said, seed=seed, draw=draw, **SETTINGS))
        assert sizes[0] == whole - known
        done = heard[-1]
        assert isinstance(done, Done)
        assert tokens(heard) == tokens(fresh)
        for mine, theirs in zip(heard, fresh, strict=True):
            assert type(mine) is type(theirs)
            if isinstance(mine, ImageEnd) and isinstance(theirs, ImageEnd):
                torch.testing.assert_close(mine.latent, theirs.latent, atol=1e-5, rtol=1e-4)
        known = len(layout_document(chat_prompt(tokenizer, talk.messages), talk.engine.grammar))
        drawn = [part for part in talk.messages[-1].parts if isinstance(part, Image)]
        assert len(drawn) == done.images


def test_the_cache_of_a_second_turn_is_that_of_a_fresh_reading(tokenizer: Tokenizer) -> None:
    one = packed(exported(tokenizer))
    talk = Conversation(TransfusionPipeline(one))
    list(talk.say(["a crab"], draw="force", **SETTINGS))
    list(talk.say(["two balloons"], draw="never", **SETTINGS))
    fresh = Engine(one, slots=1)
    fresh.submit(replace(talk.request([]), draw="never", max_tokens=0))
    fresh.step()
    length = len(layout_document(chat_prompt(tokenizer, talk.messages), fresh.grammar)) - 1
    for mine, theirs in ((talk.engine.cache.keys, fresh.cache.keys), (talk.engine.cache.values, fresh.cache.values)):
        torch.testing.assert_close(mine[:, 0, :, :length], theirs[:, 0, :, :length], atol=1e-5, rtol=1e-4)


def test_a_turn_that_is_left_is_forgotten(tokenizer: Tokenizer) -> None:
    one = packed(exported(tokenizer))
    talk, other = (Conversation(TransfusionPipeline(one)) for _ in range(2))
    for each in (talk, other):
        list(each.say(["a crab"], draw="force", **SETTINGS))
    half = talk.say(["two balloons"], draw="force", **SETTINGS)
    for _ in range(5):
        next(half)
    half.close()
    assert not talk.engine.busy
    with pytest.raises(UserError, match="prompt: expected at most 256 positions"):
        list(talk.say(["crab " * 300]))
    assert [len(message.parts) for message in talk.messages] == [len(message.parts) for message in other.messages]
    last = [list(each.say(["the moon"], draw="never", **SETTINGS)) for each in (talk, other)]
    assert tokens(last[0]) == tokens(last[1])


def test_what_is_left_in_a_slot(tokenizer: Tokenizer) -> None:
    """The slot with the longest equal beginning; else an empty one, the lowest; else the one left longest ago."""
    slots = SlotAllocator(3)
    assert slots.allocate(None) == (0, 0)
    assert slots.allocate([1, 2, 3]) == (1, 0)
    slots.free(1, [1, 2, 3, 4])
    slots.free(0, None)
    assert slots.allocate([1, 2, 3, 9]) == (1, 3)
    slots.free(1, [1, 2, 3, 9])
    assert slots.allocate([1, 2]) == (1, 1), "one is left to read, for its logits"
    slots.free(1, [1, 2])
    assert slots.allocate([1]) == (0, 0)
    slots.free(0, [7, 8])
    assert slots.allocate(None) == (2, 0)
    assert slots.allocate(None) == (1, 0), "the one left longest ago"
    assert slots.allocate([7, 8, 9]) == (0, 2)
    assert len(slots) == 0


@pytest.mark.parametrize("arm", ["linear", "codes"])
def test_many_conversations_share_an_engine(tokenizer: Tokenizer, arm: str, sizes: list[int]) -> None:
    """Two slots, three conversations whose turns come in any order: reused or read anew, the words are the same."""
    one = ARMS[arm](tokenizer)
    engine = Engine(one, slots=2, positions=POSITIONS)
    image = codes(2, 2) if arm == "codes" else latent(4, 4)
    documents = {n: [Text((20 + n, 30)), Image(image, target=False)] for n in range(3)}
    reused = 0
    for turn, number in enumerate((0, 1, 0, 2, 1, 0, 0, 2, 2)):
        documents[number] = [*documents[number], Text((40 + turn,) * 3)]
        asked = plain(
            Document(documents[number], closed=False), draw="never", max_tokens=5, reuse=True, temperature=1.0
        )
        expected = list(Engine(one).run([replace(asked, reuse=False)]))
        sizes.clear()
        engine.submit(asked)
        events = []
        while engine.busy:
            events += engine.step()
        assert tokens(events) == tokens(expected)
        reused += sizes[0] < len(layout_document(asked.document, engine.grammar))
        documents[number] = [*documents[number], Text(tuple(tokens(events)))]
    assert 3 <= reused < 9
    bare = plain(Document(documents[2], closed=False), draw="never", max_tokens=1)
    sizes.clear()
    engine.submit(bare)
    engine.step()
    assert sizes[0] == len(layout_document(bare.document, engine.grammar)), "without asking for it nothing is reused"


def test_a_long_conversation_forgets_its_oldest_turns(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """One that fits never reads otherwise; one that does not hears what a talk without the forgotten turns hears."""
    one = packed(exported(tokenizer))
    talk = Conversation(TransfusionPipeline(one), "be brief")
    for number in range(12):
        before = talk.turns
        events = list(talk.say([f"a crab and {number} balloons on a red background"], draw="force", **SETTINGS))
        assert isinstance(events[-1], Done)
        assert events[-1].images == 1
        assert talk.turns[:-1] == before[len(before) + 1 - len(talk.turns) :]
        length = len(layout_document(chat_prompt(tokenizer, talk.messages), talk.engine.grammar))
        assert length <= one.model.config.max_seq_len
    assert 1 < len(talk.turns) < 12
    assert "turns are forgotten" in caplog.text
    other = Conversation(TransfusionPipeline(one), "be brief")
    other.turns = list(talk.turns)
    assert tokens(list(talk.say(["the moon"], **SETTINGS))) == tokens(list(other.say(["the moon"], **SETTINGS)))
