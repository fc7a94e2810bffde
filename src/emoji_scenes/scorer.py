"""The scorer of emoji scenes: held-out pairs, texts and questions, and networks that judge images.

scorer = SceneScorer(WorldConfig(size=32, nouns=16))
context = EvalContext(pipe, "a model", folder, scorer)
for result in evaluate(context, named(["composition", "editing"])): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transfuse.errors import UserError
from transfuse.evaluation.context import EvalContext
from transfuse.evaluation.generate import short_hash
from transfuse.evaluation.pairs import Pairs
from transfuse.evaluation.text import CHOICES, Question
from transfuse.rng import Draws

from .language import caption, colours_in, glosses, nouns_in
from .scene_classifier import SceneClassifier, keep_scene_classifier
from .scene_detector import SceneDetector, keep_scene_detector
from .scenes import World, WorldConfig

WORDINGS = 5  # reference captions of a scene, as many as COCO has; fewer where wordings coincide
NEIGHBOURS = 12  # wrong endings of a question are drawn from this many endings of nearly the same length
SHORTEST = 6  # words of the shortest definition that is cut into a question


@dataclass(frozen=True)
class SceneScorer:
    """The scorer of scenes with the settings `world`; its image size is given by the caller."""

    world: WorldConfig

    def pairs(self, count: int, size: int, split: Any = "heldout") -> Pairs:
        """Return scenes of a split, each with several wordings of its caption; the first is the prompt."""
        world = World(replace(self.world, size=size, split=split))
        scenes = [world.scene(index) for index in range(count)]
        references = [
            list(dict.fromkeys(caption(scene, index, seed) for seed in range(WORDINGS)))
            for index, scene in enumerate(scenes)
        ]

        def picture(number: int) -> np.ndarray:
            return world.render(scenes[number])

        return Pairs(
            f"world:{split}:{size}",
            [f"{index}:{short_hash(repr(scene))}" for index, scene in enumerate(scenes)],
            [wordings[0] for wordings in references],
            references,
            picture,
            lambda number: picture(number).tobytes(),
        )

    def texts(self) -> list[str]:
        """Return the held-out definitions."""
        return glosses("heldout")

    def questions(self, count: int) -> list[Question]:
        """Return questions about held-out definitions."""
        return definition_questions(count)

    def classifier(self, folder: Path, steps: int | None = None) -> SceneClassifier:
        """Return the classifier of scenes with one thing, trained once per folder and world."""
        return keep_scene_classifier(folder / "recogniser.safetensors", self.world, steps)

    def detector(self, folder: Path, steps: int | None = None) -> SceneDetector:
        """Return the detector of scenes with several things, trained once per folder and world."""
        return keep_scene_detector(folder / "detector.safetensors", self.world, steps)

    def caption_facts(self) -> Mapping[str, Callable[[str], set[str]]]:
        """Return the nouns and the background colours of a caption."""
        return {"nouns right": nouns_in, "background right": colours_in}


def scene_scorer(context: EvalContext, metric: str) -> SceneScorer:
    """Return the context's scorer. Raises UserError where it is another data set's."""
    if not isinstance(context.scorer, SceneScorer):
        raise UserError(f"{metric}: expected a model of the bundled scenes, found a data set without them")
    return context.scorer


def definition_questions(count: int, seed: int = 0) -> list[Question]:
    """Return at most `count` questions: which of four endings of like length belongs to a held-out definition?"""
    halves = []
    for line in glosses("heldout"):
        words = line.split()
        if len(words) >= SHORTEST + 1:
            cut = 1 + len(words) // 2
            halves.append((" ".join(words[:cut]), " " + " ".join(words[cut:])))
    by_length = sorted(range(len(halves)), key=lambda n: (len(halves[n][1]), n))
    place = {number: at for at, number in enumerate(by_length)}
    questions = []
    for number in range(min(count, len(halves))):
        draws = Draws("choice", seed, number)
        start = max(0, min(place[number] - NEIGHBOURS // 2, len(halves) - NEIGHBOURS - 1))
        context, ending = halves[number]
        near = [halves[n][1] for n in by_length[start : start + NEIGHBOURS + 1] if halves[n][1] != ending]
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            picked = draws.pick(near)
            wrong += [picked] if picked not in wrong else []
        answer = draws.below(CHOICES)
        questions.append(Question(context, (*wrong[:answer], ending, *wrong[answer:]), answer))
    return questions
