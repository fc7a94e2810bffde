"""Dialogues about scenes: true, of unseen wordings in the held-out split, and learned in a chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exported

import transfuse
from emoji_scenes import World, WorldConfig, colours_in, nouns_in
from emoji_scenes.dialogue_metric import TURNS as JUDGED_TURNS
from emoji_scenes.dialogue_metric import is_right
from emoji_scenes.dialogues import MOST_IMAGES, TEMPLATE, TURNS, Turn, dialogue
from emoji_scenes.language import listed
from emoji_scenes.scene_detector import Seen
from emoji_scenes.scorer import SceneScorer
from transfuse.autoencoders import Pixels
from transfuse.data import SceneDialogues
from transfuse.evaluation import EvalConfig, EvalContext, evaluate, named
from transfuse.folders import WEIGHTS
from transfuse.inference import TransfusionPipeline
from transfuse.recipes import preset
from transfuse.runs import resolve
from transfuse.sequence import Document, Image, Text, Tokenizer, layout_document
from transfuse.sequence.chat import Message, chat_prompt, chat_sample
from transfuse.train import train

CONFIG = WorldConfig(size=16, nouns=24, max_objects=2, max_count=3)


def turns_of(split: str, count: int = 300) -> list[Turn]:
    world = World(replace(CONFIG, split=split))  # type: ignore[arg-type]
    return [turn for index in range(count) for turn in dialogue(world, index)]


def test_every_reply_is_true_of_its_scene() -> None:
    world, kinds = World(CONFIG), set()
    for index in range(300):
        turns = dialogue(world, index)
        assert 1 <= sum(turn.scene is not None or turn.shown is not None for turn in turns) <= MOST_IMAGES
        assert TURNS[0] <= len(turns) <= TURNS[1]
        for turn in turns:
            kinds.add(turn.kind)
            assert (turn.scene is None) == (turn.kind not in ("draw", "change"))
            assert turn.shown is None or turn.kind in ("question", "change")
            assert turn.reply or turn.scene is not None
            if turn.kind == "draw":
                assert turn.scene is not None
                assert nouns_in(turn.request) == {t.noun for t in turn.scene.things}
                assert {turn.scene.background} >= colours_in(turn.request)
            if turn.kind == "draw" and turn.reply:
                assert nouns_in(turn.request) == nouns_in(turn.reply)
                assert colours_in(turn.reply) == {turn.scene.background}
            if turn.change is not None:
                assert (turn.shown or turn.change.source, turn.scene) == (turn.change.source, turn.change.target)
            if turn.kind == "unknown":
                assert not nouns_in(turn.request) & set(world.nouns)
            if turn.kind == "question":
                assert turn.answer.lower() in turn.reply.lower()
    assert kinds == {"greeting", "ability", "draw", "change", "question", "unknown", "thanks", "farewell"}


@pytest.mark.parametrize("turns", [(2, 2), (3, 3), (6, 10), (12, 12)])
def test_a_dialogue_has_as_many_turns_as_asked_for(turns: tuple[int, int]) -> None:
    for index in range(100):
        said = dialogue(World(CONFIG), index, turns)
        assert turns[0] <= len(said) <= turns[1]
        assert all(turn.kind != "farewell" for turn in said[:-1])


def test_people_type_with_and_without_capitals_and_marks() -> None:
    typed = [turn.request for turn in turns_of("train")]
    assert 0.4 < sum(text[0].isupper() for text in typed) / len(typed) < 0.6
    assert {text[-1] for text in typed if not text[-1].isalpha()} == {".", "!", "?"}
    assert not any(text.endswith((".!", "?!", "..")) for text in typed)


def test_a_dialogue_is_a_function_of_its_number() -> None:
    assert dialogue(World(CONFIG), 7) == dialogue(World(CONFIG), 7) != dialogue(World(CONFIG), 8)
    assert dialogue(World(replace(CONFIG, seed=1)), 7) != dialogue(World(CONFIG), 7)


def test_held_out_wordings_never_come_up_in_training() -> None:
    greetings, thanks = (
        {split: {turn.request for turn in turns_of(split) if turn.kind == kind} for split in ("train", "heldout")}
        for kind in ("greeting", "thanks")
    )
    for found in (greetings, thanks):
        assert found["train"]
        assert found["heldout"]
        assert not found["train"] & found["heldout"]


@pytest.fixture
def source(tokenizer: Tokenizer) -> SceneDialogues:
    return SceneDialogues(World(CONFIG), tokenizer.with_template(TEMPLATE), Pixels(), seed=0)


@pytest.mark.parametrize("number", [*range(3, 12)])
def test_the_assistants_turns_alone_are_learned(source: SceneDialogues, number: int) -> None:
    document = source.document(number, 5)
    turns = dialogue(World(CONFIG), number)
    learned = "".join(source.tokenizer.decode(p.ids) for p in document.parts if isinstance(p, Text) and p.predict)
    assert learned == "".join(turn.reply for turn in turns)
    images = [part for part in document.parts if isinstance(part, Image)]
    scenes = [scene for turn in turns for scene in (turn.shown, turn.scene) if scene is not None]
    shown = [scene is turn.shown for turn in turns for scene in (turn.shown, turn.scene) if scene is not None]
    assert [image.target for image in images] == [not each for each in shown]
    for image, scene in zip(images, scenes, strict=True):
        expected = World(CONFIG).render(scene)
        assert np.array_equal(source.autoencoder.decode(image.latent[None])[0], expected)


@pytest.mark.parametrize("turns", [(2, 8), (6, 10)])
def test_a_prompt_ends_where_the_reply_begins(turns: tuple[int, int]) -> None:
    """The ids of each prompt begin the document that was learned, so that every token of a reply is learned after it.

    By the tokenizer of the bundled model, which joins a space with the word after it.
    """
    world, tokenizer = World(CONFIG), Tokenizer.load(WEIGHTS / "small-64" / "tokenizer.json").with_template(TEMPLATE)
    blank = Image(torch.zeros(3, 16, 16))

    def flat(document: Document) -> list[int]:
        return [token for part in document.parts for token in (part.ids if isinstance(part, Text) else (-1,))]

    for index in range(8):
        messages = []
        for turn in dialogue(world, index, turns):
            messages.append(Message("user", (*([blank] if turn.shown else []), turn.request)))
            messages.append(Message("assistant", (turn.reply, *([blank] if turn.scene else []))))
        whole = flat(chat_sample(tokenizer, messages))
        for place in range(1, len(messages), 2):
            prompt = flat(chat_prompt(tokenizer, messages[:place]))
            assert whole[: len(prompt)] == prompt


def test_lengths_are_those_of_the_documents(source: SceneDialogues) -> None:
    form = source.tokenizer.sequence_format(patch_size=4)
    numbers = np.arange(12)
    expected = [len(layout_document(source.document(n, n), form).input_ids) for n in numbers.tolist()]
    assert source.lengths(numbers, numbers, form).tolist() == expected


@pytest.mark.long
def test_a_model_learns_and_exports_them_with_their_template(tmp_path: Path) -> None:
    base = preset("tiny")
    data = replace(base.data, sources=("world", "dialogues", "glosses"), batch_size=4)
    recipe = replace(base, data=data, loop=replace(base.loop, steps=2, checkpoint_every=1))
    assert resolve(recipe).tokenizer.text_format.chat_template == TEMPLATE
    export = train(recipe, tmp_path / "run").export
    assert export is not None
    tokenizer = transfuse.load(str(export)).exported.tokenizer
    assert tokenizer.text_format.chat_template == TEMPLATE


def test_verdicts_of_right_and_wrong_replies() -> None:
    world = World(replace(CONFIG, split="heldout"))
    counted = 0
    for index in range(80):
        for turn in dialogue(world, index):
            image = None if turn.scene is None else world.render(turn.scene)
            things = turn.scene.things if turn.scene else ()
            seen = [Seen(thing.noun, *place.centre, place.side) for thing in things for place in thing.places]
            assert is_right(turn, turn.reply, image, seen), turn
            assert not is_right(turn, turn.reply, np.zeros((16, 16, 3), np.uint8), [])
            assert not is_right(turn, "", None, [])
            assert turn.kind != "question" or not is_right(turn, "Elephants, I think.", None, [])
            assert turn.kind in ("draw", "change", "question") or not is_right(turn, "Here it is.", None, [])
            if turn.kind == "question":
                things = turn.answer.replace(" and ", ", ").split(", ")
                assert is_right(turn, listed(things[::-1]).capitalize(), None, [])
                assert len(things) < 2 or not is_right(turn, listed(things[1:]), None, [])
            counted += 1
    assert counted > 200


def test_a_model_is_judged_turn_by_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An untrained model answers nonsense: few turns are right, and every kind is reported with its reference."""
    model = replace(exported(tokenizer.with_template(TEMPLATE), max_seq_len=1024), image_size=16)
    scorer = SceneScorer(WorldConfig(size=16, nouns=4))
    context = EvalContext(TransfusionPipeline(model), "untrained", tmp_path, scorer, EvalConfig(count=3, judge_steps=2))
    (outcome,) = evaluate(context, named(["dialogues"]))
    results = {result.name: result for result in outcome}
    world = World(WorldConfig(nouns=4, split="heldout"))
    turns = [turn for index in range(3) for turn in dialogue(world, index, JUDGED_TURNS)]
    assert results["turns right"].count == len(turns)
    assert results["turns right"].ceiling is not None
