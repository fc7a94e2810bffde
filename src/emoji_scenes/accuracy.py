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

import numpy as np
import PIL.Image

from transfuse.errors import UserError
from transfuse.evaluation.confidence import Estimate, agreement_by_chance, share
from transfuse.inference import TransfusionPipeline
from transfuse.log import progress

from . import Scene, World, WorldConfig, background_of, caption, colours_in, nouns_in
from .open_set import bundled_classifier

Name = Callable[[np.ndarray], list[str]]
"""Maps uint8 images `[image, row, column, 3]` to a noun for each; a `Recogniser`."""


@dataclass(eq=False)
class DrawingResult:
    """Drawings of held-out prompts and their accuracy; lists and arrays are by prompt, in order.

    images, real_images   uint8 `[image, row, column, 3]`: drawn, and rendered by the world
    nouns, backgrounds    what was asked for
    named, seen           the noun and the background that were found; noun_right, background_right: bool `[image]`
    named_strictly        the noun, of all that the bundled classifier knows, that is plain to see, or None
    noun_strict_right     bool `[image]`: that noun is the one asked for; strict_digest: the classifier's fingerprint
    seconds               for drawing alone
    """

    prompts: list[str]
    nouns: list[str]
    backgrounds: list[str]
    images: np.ndarray
    real_images: np.ndarray
    named: list[str]
    seen: list[str]
    noun_right: np.ndarray
    background_right: np.ndarray
    named_strictly: list[str | None]
    noun_strict_right: np.ndarray
    strict_digest: str
    noun: Estimate
    noun_strict: Estimate
    background: Estimate
    both: Estimate
    real_noun: Estimate
    real_noun_strict: Estimate
    real_background: Estimate
    chance_noun: float
    chance_noun_strict: float
    chance_background: float
    chance_both: float
    seconds: float


@dataclass(eq=False)
class CaptionResult:
    """Captions of held-out images `[image, row, column, 3]` and their accuracy; `truths` are the scenes' captions."""

    images: np.ndarray
    captions: list[str]
    truths: list[str]
    noun_right: np.ndarray
    background_right: np.ndarray
    noun: Estimate
    background: Estimate
    both: Estimate
    chance_noun: float
    chance_background: float
    chance_both: float
    seconds: float


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
    pipe: TransfusionPipeline,
    world_config: WorldConfig,
    count: int,
    recogniser: Name,
    seed: int = 0,
    batch: int = 24,
    steps: int | None = None,
) -> DrawingResult:
    """Draw `count` held-out prompts and score them; `steps`: denoising steps, the model's default unless given."""
    scenes, prompts, real = held_out_scenes(world_config, count, seed)
    nouns, backgrounds = _asked(scenes)
    drawn: list[np.ndarray] = []
    began = time.monotonic()
    with progress("draw", count, unit="images") as bar:
        for start in range(0, count, batch):
            chunk = prompts[start : start + batch]
            drawn += pipe(chunk, num_inference_steps=steps, generator=seed + start, output_type="np").images
            bar.advance(len(chunk))
    seconds = time.monotonic() - began
    images = np.stack(drawn)
    named, seen = recogniser(images), [background_of(image) for image in images]
    noun_right, background_right = _same(named, nouns), _same(seen, backgrounds)
    strict = bundled_classifier()
    named_strictly = strict(images)
    noun_strict_right = _same(named_strictly, nouns)
    return DrawingResult(
        prompts,
        nouns,
        backgrounds,
        images,
        real,
        named,
        seen,
        noun_right,
        background_right,
        named_strictly,
        noun_strict_right,
        strict.digest,
        noun=share(noun_right),
        noun_strict=share(noun_strict_right),
        background=share(background_right),
        both=share(noun_right & background_right),
        real_noun=share(_same(recogniser(real), nouns)),
        real_noun_strict=share(_same(strict(real), nouns)),
        real_background=share(_same([background_of(picture) for picture in real], backgrounds)),
        chance_noun=agreement_by_chance(nouns),
        chance_noun_strict=strict.chance,
        chance_background=agreement_by_chance(backgrounds),
        chance_both=agreement_by_chance(list(zip(nouns, backgrounds, strict=True))),
        seconds=seconds,
    )


def caption_accuracy(
    pipe: TransfusionPipeline, world_config: WorldConfig, count: int, seed: int = 0, batch: int = 24
) -> CaptionResult:
    """Caption `count` held-out images greedily and score the words."""
    scenes, truths, pictures = held_out_scenes(world_config, count, seed)
    nouns, backgrounds = _asked(scenes)
    captions: list[str] = []
    began = time.monotonic()
    with progress("caption", count, unit="images") as bar:
        for start in range(0, count, batch):
            chunk = [PIL.Image.fromarray(picture) for picture in pictures[start : start + batch]]
            captions += pipe.caption(chunk)
            bar.advance(len(chunk))
    seconds = time.monotonic() - began
    known = world_config.noun_names
    noun_right = np.array([nouns_in(text, known) == {noun} for text, noun in zip(captions, nouns, strict=True)])
    background_right = np.array([colours_in(t) == {colour} for t, colour in zip(captions, backgrounds, strict=True)])
    return CaptionResult(
        pictures,
        captions,
        truths,
        noun_right,
        background_right,
        noun=share(noun_right),
        background=share(background_right),
        both=share(noun_right & background_right),
        chance_noun=agreement_by_chance(nouns),
        chance_background=agreement_by_chance(backgrounds),
        chance_both=agreement_by_chance(list(zip(nouns, backgrounds, strict=True))),
        seconds=seconds,
    )


def _asked(scenes: list[Scene]) -> tuple[list[str], list[str]]:
    return [scene.things[0].noun for scene in scenes], [scene.background for scene in scenes]


def _same(named: Sequence[str | None], wanted: list[str]) -> np.ndarray:
    return np.array([name == noun for name, noun in zip(named, wanted, strict=True)])
