"""The strict judge of drawings: it names what is plain, refuses what is not, and is the same for everybody."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import pytest

from emoji_scenes import NOUNS, PALETTE, Scene, World, WorldConfig
from emoji_scenes.accuracy import draw_accuracy, held_out_scenes
from emoji_scenes.scene_classifier import OPEN_SET_WEIGHTS, OpenSetClassifier, bundled_classifier
from transfuse.errors import UserError

ALL = WorldConfig(size=32, max_objects=1, max_count=1, sizes=("large",), seed=41)
DEMO = replace(ALL, nouns=16, styles=("fluent-flat",))


def scenes(config: WorldConfig, count: int) -> tuple[list[Scene], np.ndarray, list[str]]:
    """Scenes, their pictures, and their nouns."""
    world = World(config)
    made = [world.scene(n) for n in range(count)]
    return made, np.stack([world.render(scene) for scene in made]), [scene.things[0].noun for scene in made]


def right(images: np.ndarray, nouns: list[str]) -> float:
    return float(np.mean([name == noun for name, noun in zip(bundled_classifier()(images), nouns, strict=True)]))


def accepted(images: np.ndarray) -> float:
    return float(np.mean([name is not None for name in bundled_classifier()(images)]))


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (ALL, 0.95),
        (DEMO, 0.97),
        (replace(ALL, split="heldout"), 0.95),
        (replace(ALL, size=64), 0.9),
        (replace(ALL, size=64, sizes=None), 0.7),
    ],
    ids=["all", "demo", "held out", "64 pixels", "64 pixels, every size"],
)
def test_clean_drawings_are_named(config: WorldConfig, least: float) -> None:
    _, images, nouns = scenes(config, 300)
    assert right(images, nouns) >= least


def test_a_little_grain_does_no_harm() -> None:
    _, images, nouns = scenes(ALL, 300)
    noise = np.random.default_rng(3).normal(0, 8, images.shape)
    assert right((images + noise).clip(0, 255).astype(np.uint8), nouns) >= 0.93


def square(scene: Scene) -> tuple[float, float, float]:
    place = scene.things[0].places[0]
    return place.x, place.y, place.side


def blur(image: PIL.Image.Image, scene: Scene) -> PIL.Image.Image:
    return image.filter(PIL.ImageFilter.BoxBlur(6))


def colour_alone(image: PIL.Image.Image, scene: Scene) -> PIL.Image.Image:
    """An ellipse of the thing's mean colour where the thing was."""
    x, y, side = (round(32 * value) for value in square(scene))
    pixels = np.asarray(image).astype(float)[y : y + side, x : x + side].reshape(-1, 3)
    away = np.abs(pixels - PALETTE[scene.background]).sum(1) > 60
    mean = tuple(int(value) for value in pixels[away].mean(0))
    drawn = PIL.Image.new("RGB", image.size, PALETTE[scene.background])
    PIL.ImageDraw.Draw(drawn).ellipse((x, y, x + side, y + side), fill=mean)
    return drawn


def shuffled(image: PIL.Image.Image, scene: Scene) -> PIL.Image.Image:
    """Its sixteen squares of 8 pixels, in another order."""
    squares = np.asarray(image).reshape(4, 8, 4, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
    squares = squares[np.random.default_rng(len(scene.background)).permutation(16)]
    return PIL.Image.fromarray(squares.reshape(4, 4, 8, 8, 3).swapaxes(1, 2).reshape(32, 32, 3).copy())


def half_gone(image: PIL.Image.Image, scene: Scene) -> PIL.Image.Image:
    """Its lower two thirds painted over."""
    _, y, side = (round(32 * value) for value in square(scene))
    drawn = image.copy()
    drawn.paste(PALETTE[scene.background], (0, y + side // 3, 32, 32))
    return drawn


def coarse(image: PIL.Image.Image, scene: Scene) -> PIL.Image.Image:
    return image.resize((5, 5), PIL.Image.Resampling.BOX).resize((32, 32), PIL.Image.Resampling.NEAREST)


@pytest.mark.parametrize("spoil", [blur, colour_alone, shuffled, half_gone, coarse])
def test_spoiled_drawings_are_refused(spoil) -> None:
    made, images, nouns = scenes(replace(ALL, seed=42), 200)
    spoiled = np.stack(
        [np.asarray(spoil(PIL.Image.fromarray(image), scene)) for image, scene in zip(images, made, strict=True)]
    )
    assert accepted(spoiled) <= 0.1
    assert right(images, nouns) >= 0.95, "the same ones, before"


def test_plain_backgrounds_and_noise_are_refused() -> None:
    plain = np.stack([np.full((32, 32, 3), colour, dtype=np.uint8) for colour in PALETTE.values()])
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    assert accepted(plain) == accepted(noise) == 0


class Painter:
    """Draws what was asked, through a filter."""

    def __init__(self, count: int, spoil=lambda image, scene: image) -> None:
        made, texts, pictures = held_out_scenes(DEMO, count)
        spoiled = [spoil(PIL.Image.fromarray(image), scene) for image, scene in zip(pictures, made, strict=True)]
        self.answers = dict(zip(texts, map(np.asarray, spoiled), strict=True))

    def __call__(self, prompts, **_):
        return SimpleNamespace(images=[self.answers[prompt] for prompt in prompts])


def in_order(count: int):
    """A closed choice that blobs of the right colour pass."""
    made, _, _ = held_out_scenes(DEMO, count)
    return lambda images: [scene.things[0].noun for scene in made]


def test_drawings_are_judged_strictly_beside_the_closed_choice() -> None:
    good = draw_accuracy(Painter(40), DEMO, 40, in_order(40))
    assert good.noun_strict.value == good.real_noun_strict.value >= 0.95
    assert good.noun_strict.low <= good.noun_strict.value <= good.noun_strict.high
    assert good.noun_strict.value == np.mean(good.noun_strict_right)
    blobs = draw_accuracy(Painter(40, colour_alone), DEMO, 40, in_order(40))
    assert blobs.noun.value == 1.0
    assert blobs.noun_strict.value <= 0.1
    assert blobs.named_strictly.count(None) >= 35
    assert blobs.real_noun_strict == good.real_noun_strict
    assert blobs.chance_noun_strict == 1 / 329
    assert blobs.strict_digest == bundled_classifier().digest


def test_the_bundled_one_is_small_and_knows_every_noun() -> None:
    classifier = OpenSetClassifier.load(OPEN_SET_WEIGHTS)
    assert classifier.nouns == tuple(NOUNS)
    assert OPEN_SET_WEIGHTS.stat().st_size < 1.5e6
    assert classifier.accuracy["large at 32 pixels"] >= 0.95
    assert classifier.false_acceptance["mean"] <= 0.1


def test_saved_whole_and_refused_where_it_is_something_else(tmp_path) -> None:
    classifier = bundled_classifier()
    classifier.save(tmp_path / "judge.safetensors")
    again = OpenSetClassifier.load(tmp_path / "judge.safetensors")
    assert again.digest == classifier.digest
    _, images, _ = scenes(ALL, 20)
    assert again(images) == classifier(images)
    stricter = replace(again, threshold=1.1)
    assert stricter.digest != again.digest
    assert stricter(images) == [None] * 20
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="expected a saved open-set classifier"):
        OpenSetClassifier.load(tmp_path / "other.safetensors")
