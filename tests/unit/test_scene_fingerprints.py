"""Scenes, images, captions, edits and the judges' verdicts never change by accident: their hashes are kept.

A hash that changes on purpose changes every kept result that depends on these scenes: say so in CHANGELOG.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from emoji_scenes import World, WorldConfig, caption, edit, glosses, held_out_background, nouns_in, questions
from emoji_scenes.metrics import scene_edits, task_scenes
from emoji_scenes.scene_classifier import bundled_classifier
from emoji_scenes.scene_detector import Seen
from emoji_scenes.scorer import SceneScorer, definition_questions

SAMPLES = 150
WORLDS = {
    "default": WorldConfig(),
    "held out": WorldConfig(size=64, nouns=24, split="heldout", seed=3),
    "demo": WorldConfig(nouns=16, styles=("fluent-flat",), max_objects=1, max_count=1, sizes=("large",)),
    "narrow": WorldConfig(nouns=3, kinds=("pair", "group"), backgrounds=("white", "blue", "black", "red"), max_count=2),
}
EXPECTED = {
    "default": {
        "scenes": "b6bfeb1d0eaa",
        "images": "38084cc9e22b",
        "captions": "c455414a29cc",
        "questions": "bd189ddf2f48",
        "edits": "e7c9846eadea",
    },
    "held out": {
        "scenes": "7eea42cc9d3d",
        "images": "bbe138d2bb50",
        "captions": "ff8c5e42abd2",
        "questions": "c5b4ef6bdcc8",
        "edits": "b5d12527e68f",
    },
    "demo": {
        "scenes": "4bceaa8e6657",
        "images": "ff534afdf4fe",
        "captions": "c935a4f6fb1e",
        "questions": "dffacdffac71",
        "edits": "2af02d42e888",
    },
    "narrow": {
        "scenes": "c7cee18b6e40",
        "images": "589f554c78f1",
        "captions": "c185d58d9003",
        "questions": "8455719f9750",
        "edits": "83f49f4b4d6c",
    },
    "verdicts": {
        "composition": "ab07a6b6cd93",
        "prompts": "a6f28854b0d0",
        "edits": "b0bb9ca17232",
        "strict judge": "22b851c367bf",
        "strict judge, upside down": "268a4a9508b7",
    },
    "texts": {
        "glosses": "3ad3cf923906",
        "nouns": "5a1e8ba5f222",
        "held-out backgrounds": "ab115826a682",
        "questions": "de0b8422b0e3",
        "pairs": "8f76c2df3583",
    },
}


def digest(parts: Iterable[object]) -> str:
    """Return twelve digits of a hash of arrays, by their bytes, and of other objects, by their representation."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return total.hexdigest()[:12]


@pytest.mark.parametrize("name", WORLDS)
def test_samples_of_a_world(name: str) -> None:
    world = World(WORLDS[name])
    indices = [*range(SAMPLES), *(10**6 * n + 17 for n in range(1, SAMPLES))]
    scenes = [world.scene(index) for index in indices]
    assert {
        "scenes": digest(scenes),
        "images": digest(world.render(scene) for scene in scenes),
        "captions": digest(caption(scene, index, index % 3) for scene, index in zip(scenes, indices, strict=True)),
        "questions": digest(questions(scene, n, n % 2, world.nouns) for n, scene in enumerate(scenes)),
        "edits": digest(edit(scene, world, index) for scene, index in zip(scenes, indices, strict=True)),
    } == EXPECTED[name]


def blurred_detections(scenes: list, seed: int) -> list[list[Seen]]:
    """Return the things of scenes with errors: places and sizes a little off, some missing, some misnamed."""
    errors = np.random.default_rng(seed)
    detections = []
    for scene in scenes:
        places = [(thing.noun, *place.centre, place.side) for thing in scene.things for place in thing.places]
        shifted = [
            Seen(noun, *(np.array([x, y, side]) * (1 + 0.2 * errors.normal(size=3))).tolist())
            for noun, x, y, side in places
            if errors.random() > 0.1
        ]
        detections.append([replace(seen, noun="key") if errors.random() < 0.05 else seen for seen in shifted])
    return detections


def test_verdicts() -> None:
    config = WorldConfig(size=32, nouns=6, styles=("fluent-flat",))
    tasks = task_scenes(config, "train", 24) + task_scenes(config, "heldout", 24)
    edits = scene_edits(config, 120)
    targets = [change.target for change in edits.edits]
    judged = edits.judge(np.roll(edits.targets, 3, axis=1), lambda images: blurred_detections(targets, 7))
    world = World(WorldConfig(max_objects=1, max_count=1, sizes=("large",), seed=41))
    images = np.stack([world.render(world.scene(index)) for index in range(64)])
    assert {
        "composition": digest(
            task.judge(task.real[::-1], lambda images, scenes=task.scenes: blurred_detections(scenes, 5))[0]
            for task in tasks
        ),
        "prompts": digest(task.prompts for task in tasks),
        "edits": digest(part for part in (judged.things, judged.obeyed, judged.rest.round(6))),
        "strict judge": digest(bundled_classifier()(images)),
        "strict judge, upside down": digest(bundled_classifier()(images[:, ::-1].copy())),
    } == EXPECTED["verdicts"]


def test_texts() -> None:
    pairs = SceneScorer(WorldConfig(nouns=16)).pairs(40, 32)
    assert {
        "glosses": digest([glosses("train"), glosses("heldout")]),
        "nouns": digest(sorted(nouns_in(line)) for line in glosses("train")[::20]),
        "held-out backgrounds": digest(held_out_background(noun) for noun in World().nouns),
        "questions": digest(definition_questions(200, seed=1)),
        "pairs": digest([pairs.prompts, pairs.references, pairs.ids]),
    } == EXPECTED["texts"]
