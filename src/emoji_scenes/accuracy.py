"""The accuracy of drawings and captions on combinations that training never showed.

`draw_accuracy` reads the background's colour off the border. Two classifiers name the thing: one chooses among the
configuration's own nouns, the strict one among all nouns and "none". The same scores on real images are the reference;
good scenes that ignore the prompt set chance. `caption_accuracy`: a caption must name the right noun and no other, and
the right colour and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from transfuse.errors import UserError
from transfuse.evaluation.confidence import Estimate, agreement_by_chance, share
from transfuse.inference import TransfusionPipeline
from transfuse.log import progress

from .language import caption, colours_in, nouns_in
from .nouns import background_of
from .scene_classifier import bundled_classifier
from .scenes import Scene, World, WorldConfig

Name = Callable[[np.ndarray], list[str]]
"""Maps uint8 images `[image, row, column, 3]` to a noun for each; a `SceneClassifier`."""


@dataclass(eq=False, kw_only=True)
class Result:
    """The common part of both results: images uint8 `[image, row, column, 3]`, bool `[image]`, and shares.

    seconds   for drawing or captioning alone
    """

    images: np.ndarray
    noun_right: np.ndarray
    background_right: np.ndarray
    chance_noun: float
    chance_background: float
    chance_both: float
    seconds: float

    @property
    def noun(self) -> Estimate:
        return share(self.noun_right)

    @property
    def background(self) -> Estimate:
        return share(self.background_right)

    @property
    def both(self) -> Estimate:
        return share(self.noun_right & self.background_right)


@dataclass(eq=False, kw_only=True)
class DrawingResult(Result):
    """Drawings of held-out prompts and their accuracy; lists and arrays are by prompt, in order.

    real_images                the scenes of the prompts, as the world renders them
    nouns, backgrounds         what was asked for
    named, seen                the noun and the background that were found
    named_strictly             the noun that is plain to the bundled classifier, of all that it knows, or None
    noun_strict_right          bool `[image]`: that noun is the one asked for
    strict_digest              the bundled classifier's fingerprint
    """

    prompts: list[str]
    nouns: list[str]
    backgrounds: list[str]
    real_images: np.ndarray
    named: list[str]
    seen: list[str]
    named_strictly: list[str | None]
    noun_strict_right: np.ndarray
    strict_digest: str
    real_noun: Estimate
    real_noun_strict: Estimate
    real_background: Estimate
    chance_noun_strict: float

    @property
    def noun_strict(self) -> Estimate:
        return share(self.noun_strict_right)


@dataclass(eq=False, kw_only=True)
class CaptionResult(Result):
    """Captions of held-out images and their accuracy; `truths` are the scenes' captions."""

    captions: list[str]
    truths: list[str]


def held_out_scenes(config: WorldConfig, count: int, seed: int = 0) -> tuple[list[Scene], list[str], np.ndarray]:
    """Return `count` held-out scenes, their captions, and images uint8 `[image, row, column, 3]`.

    Raises UserError for scenes with more than one thing: these scores know only one.
    """
    if config.max_objects > 1 or config.max_count > 1:
        raise UserError("evaluation: world: expected scenes of one thing (max_objects 1, max_count 1), found more")
    if count < 1:
        raise UserError(f"evaluation: count: expected at least 1, found {count}")
    world = World(replace(config, split="heldout"))
    first = seed * 1_000_000
    scenes = [world.scene(first + index) for index in range(count)]
    texts = [caption(scene, first + index) for index, scene in enumerate(scenes)]
    return scenes, texts, np.stack([world.render(scene) for scene in scenes])


def draw_accuracy(
    pipe: TransfusionPipeline, world_config: WorldConfig, count: int, recogniser: Name, batch: int = 24
) -> DrawingResult:
    """Draw `count` held-out prompts in the model's own number of denoising steps, and score the drawings."""
    scenes, prompts, real = held_out_scenes(world_config, count)
    nouns, backgrounds, chances = _truth(scenes)
    drawn, seconds = _in_batches(
        "draw", prompts, batch, lambda start, chunk: pipe(chunk, generator=start, output_type="np").images
    )
    images, strict = np.stack(drawn), bundled_classifier()
    named, seen, named_strictly = recogniser(images), [background_of(image) for image in images], strict(images)
    return DrawingResult(
        prompts=prompts,
        nouns=nouns,
        backgrounds=backgrounds,
        images=images,
        real_images=real,
        named=named,
        seen=seen,
        noun_right=_same(named, nouns),
        background_right=_same(seen, backgrounds),
        named_strictly=named_strictly,
        noun_strict_right=_same(named_strictly, nouns),
        strict_digest=strict.digest,
        real_noun=share(_same(recogniser(real), nouns)),
        real_noun_strict=share(_same(strict(real), nouns)),
        real_background=share(_same([background_of(image) for image in real], backgrounds)),
        chance_noun_strict=1 / (len(strict.nouns) + 1),  # of a guess among the nouns and "none"
        seconds=seconds,
        **chances,
    )


def caption_accuracy(
    pipe: TransfusionPipeline, world_config: WorldConfig, count: int, batch: int = 24
) -> CaptionResult:
    """Caption `count` held-out images greedily and score the words."""
    scenes, truths, images = held_out_scenes(world_config, count)
    nouns, backgrounds, chances = _truth(scenes)
    pictures = [PIL.Image.fromarray(image) for image in images]
    captions, seconds = _in_batches("caption", pictures, batch, lambda _, chunk: pipe.caption(chunk))
    return CaptionResult(
        images=images,
        captions=captions,
        truths=truths,
        noun_right=_same([nouns_in(text, world_config.noun_names) for text in captions], [{noun} for noun in nouns]),
        background_right=_same([colours_in(text) for text in captions], [{colour} for colour in backgrounds]),
        seconds=seconds,
        **chances,
    )


def _in_batches(
    name: str, items: Sequence[Any], batch: int, work: Callable[[int, Any], list[Any]]
) -> tuple[list[Any], float]:
    """Return the results of `work(start, chunk)` over all items, and the seconds that it took."""
    results: list[Any] = []
    began = time.monotonic()
    with progress(name, len(items), unit="images") as bar:
        for start in range(0, len(items), batch):
            chunk = items[start : start + batch]
            results += work(start, chunk)
            bar.advance(len(chunk))
    return results, time.monotonic() - began


def _truth(scenes: list[Scene]) -> tuple[list[str], list[str], dict[str, float]]:
    """Return the nouns and backgrounds of scenes, and the accuracy of good scenes that ignore the prompt."""
    nouns, backgrounds = [scene.things[0].noun for scene in scenes], [scene.background for scene in scenes]
    chances = {
        "chance_noun": agreement_by_chance(nouns),
        "chance_background": agreement_by_chance(backgrounds),
        "chance_both": agreement_by_chance(list(zip(nouns, backgrounds, strict=True))),
    }
    return nouns, backgrounds, chances


def _same(answers: Sequence[Any], truths: Sequence[Any]) -> np.ndarray:
    return np.array([answer == truth for answer, truth in zip(answers, truths, strict=True)])
