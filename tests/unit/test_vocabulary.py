"""Prompts are brought to the words that a model has learned; other words are reported, and refused on request."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import transfuse
from emoji_scenes import NOUNS, World, WorldConfig, caption, edit, nouns_in
from emoji_scenes.dialogues import dialogue, plural, vocabulary
from transfuse.cli import run
from transfuse.config import from_dict, read_json
from transfuse.errors import UserError
from transfuse.export import describe, relayout
from transfuse.folders import WEIGHTS
from transfuse.recipes import preset
from transfuse.runs import resolve
from transfuse.vocabulary import Vocabulary, edit_distance

CONFIG = WorldConfig(nouns=24, max_objects=2, max_count=3)
KNOWN = vocabulary(World(CONFIG), edits=True)
EVERY = vocabulary(World(WorldConfig()))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_what_is_said_about_known_things_stays_as_it_is(split: str) -> None:
    talking = vocabulary(World(CONFIG), edits=True, dialogues=True)
    world = World(replace(CONFIG, split=split))  # type: ignore[arg-type]
    for index in range(5_000, 5_200):
        for turn in dialogue(world, index):
            known = nouns_in(turn.request) <= set(world.nouns)
            reading = talking.read(turn.request)
            assert reading.text.lower() == turn.request.lower() or split == "heldout" or not known
            assert turn.kind != "unknown" or reading.unknown


def test_words_of_captions_are_written_as_there_in_conversations_too() -> None:
    talking = vocabulary(World(CONFIG), edits=True, dialogues=True)
    assert talking.read("A PUMPKIN ON A GREEN BACKGROUND").text == "a pumpkin on a green background"
    assert talking.read("Could you draw an UMBRELA, please?").text == "Could you draw an umbrella, please?"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_and_instructions_stay_as_they_are(split: str) -> None:
    world = World(replace(CONFIG, split=split))  # type: ignore[arg-type]
    for index in range(5_000, 5_400):
        scene = world.scene(index)
        for text in (caption(scene, index), edit(scene, world, index).instruction):
            assert KNOWN.read(text).text == text
            assert not KNOWN.read(text).unknown


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A PUMPKIN ON A GREEN BACKGROUND", "a pumpkin on a green background"),
        ("two Crab and Snowmen", "two crab and snowmen"),
        ("the background is purpel", "the background is purple"),
        ("a gutar next to a rokcet", "a guitar next to a rocket"),
        ("An automobile", "a car"),
        ("a lady bird over a brolly", "a ladybug above an umbrella"),
        ("3 motor  cars", "three cars"),
        ("a tiny tortoise on violet", "a small turtle on purple"),
        ("swap the football for a ballon!", "swap the soccer ball for a balloon!"),
        ("two fungi", "two mushrooms"),
    ],
)
def test_case_endings_errors_and_synonyms(prompt: str, expected: str) -> None:
    reading = KNOWN.read(prompt)
    assert reading.text == expected
    assert not reading.unknown
    assert KNOWN.read(reading.text) == replace(reading, changes=())


@pytest.mark.parametrize("word", ["cat", "horse", "mouse", "stair", "grape", "wizard", "cook", "boat", "goose"])
def test_other_english_words_are_unknown_and_not_mended(word: str) -> None:
    reading = KNOWN.read(f"a {word} on a red background")
    assert (reading.text, reading.unknown) == (f"a {word} on a red background", (word,))
    with pytest.raises(
        UserError, match=rf'^prompt: expected words that the model knows, found "{word}".*crab, balloon'
    ):
        KNOWN.read_strictly(f"a {word}")


def test_a_prompt_of_many_other_words_is_read_at_once() -> None:
    """No typing error is mended in it, however often it is read; in one of few other words all are."""
    wrong = "strawbery"
    few = [f"{'xyz'[number % 3]}qvw{'bcdfg'[number % 5]}{'hjklm'[number // 5 % 5]}" for number in range(60)]
    assert EVERY.read(" ".join([*few, wrong])).changes == ((wrong, "strawberry"),)
    letters = "bcdfghjklmnpqrstvwxz"
    many = " ".join(f"st{a}{b}{c}wber" for a in letters for b in letters for c in letters[:4])
    assert len(many) > 15_000
    began = time.process_time()
    reading = EVERY.read(f"{many} {wrong} a CRAB")
    assert time.process_time() - began < 0.1
    assert reading.changes == ()
    assert reading.text.endswith(f"{wrong} a crab")
    assert EVERY.read(reading.text) == reading
    with pytest.raises(UserError) as refused:
        EVERY.read_strictly(many)
    assert f"and {len(reading.unknown) - 1 - 20} more, never seen in training" in str(refused.value)


def test_every_noun_is_read_with_one_letter_wrong() -> None:
    """Where the error makes no other word: doubled, dropped or swapped letters of long words."""
    for noun in (noun for noun in KNOWN.things if len(noun) > 6 and noun.isalpha()):
        for wrong in (noun[:3] + noun[2:], noun[:4] + noun[5:], noun[:3] + noun[4] + noun[3] + noun[5:]):
            assert KNOWN.read(f"the {wrong}").text == f"the {noun}" or wrong in KNOWN.english


def test_every_synonym_is_read_and_names_one_noun() -> None:
    names = [other for noun in NOUNS.values() for other in noun.synonyms]
    assert len(set(names)) == len(names)
    for noun in NOUNS.values():
        assert noun.name not in noun.synonyms
        for other in noun.synonyms:
            if other not in EVERY.words:  # the palm of a palm tree
                assert EVERY.read(f"the {other} is there").text == f"the {noun.name} is there"
            several = plural(other)
            assert several in (*EVERY.words, other) or EVERY.read(f"two {several}").text == f"two {noun.plural}"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abcdefgh sS'-.,3\n", max_size=40))
def test_any_text_is_read_and_read_again_is_the_same(text: str) -> None:
    reading = KNOWN.read(text)
    assert KNOWN.read(reading.text).text == reading.text
    assert all(word in text for word in reading.unknown)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_shortest_way(first: str, second: str) -> None:
    """Compared with the recursive definition (optimal string alignment)."""

    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        ways = [slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0])]
        if len(a) > 1 < len(b) and a[0] == b[1] and a[1] == b[0]:
            ways.append(slow(a[2:], b[2:]) + 1)
        return min(ways)

    distance = slow(first[:4], second[:4])
    assert edit_distance(first[:4], second[:4], 2) == min(distance, 3)


def test_the_bundled_model_has_the_words_of_its_scenes(tmp_path: Path) -> None:
    folder = WEIGHTS / "small-64"
    config = from_dict(WorldConfig, read_json(folder / "config.json")["world"], "config.json")
    known = vocabulary(World(config), edits=True, dialogues=True)
    assert Vocabulary.load(folder / "vocabulary.json") == known
    relayout(folder, tmp_path / "diffusers", "diffusers")
    assert transfuse.load(str(tmp_path / "diffusers")).exported.vocabulary == known
    assert describe(folder).model.images == "latents"


def test_only_models_of_the_bundled_scenes_have_one() -> None:
    recipe = preset("tiny")
    assert resolve(recipe).vocabulary == vocabulary(World(recipe.data.world))
    assert resolve(preset("llama-32")).vocabulary is None


def test_from_the_command_and_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "A STRAWBERY", "--draw", "force", "--steps", "2", "--model", "small-64", "--max-tokens", "0"]
    assert run([*command, "--out", str(tmp_path)]) == 0
    assert 'prompt: read "STRAWBERY" as "strawberry"' in capsys.readouterr().err
    command[1] = "a cat on red"
    assert run([*command, "--out", str(tmp_path / "cat")]) == 0
    assert 'prompt: "cat", never seen in training; it draws crab,' in capsys.readouterr().err
    assert run([*command, "--out", str(tmp_path / "strict"), "--strict"]) == 2
    assert not (tmp_path / "strict").exists()
    pipe = transfuse.load("small-64")
    options = {"num_inference_steps": 2, "generator": 3, "output_type": "np"}
    mended, plain = (pipe(text, **options).images[0] for text in ("An AUTOMOBILE", "a car"))
    assert (mended == plain).all()
    with pytest.raises(UserError, match="never seen in training"):
        pipe("a spaniel", strict=True)
