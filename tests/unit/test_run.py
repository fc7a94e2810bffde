"""A resolved run opens each thing that its recipe names once, however many parts of the run use it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

import emoji_scenes
from transfuse.data import DataSet
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.recipes import Recipe, preset
from transfuse.runs import resolve
from transfuse.sequence import Tokenizer
from transfuse.train import train


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what is opened, by the public functions and classes that open it."""
    counts: Counter[str] = Counter()

    def counting(owner: object, name: str, label: object) -> None:
        original = getattr(owner, name)

        def opened(*args: object, **options: object) -> object:
            counts[label(*args) if callable(label) else str(label)] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, opened)

    counting(DataSet, "__init__", lambda data, path, *rest: f"data set {Path(path).name}")
    counting(emoji_scenes.World, "__init__", lambda world, config=None: f"world {config.split}")
    counting(Tokenizer, "load", "tokenizer")
    counting(Tokenizer, "train", "trained tokenizer")
    counting(__import__("transfuse.runs.resolve", fromlist=["resolve"]), "open_autoencoder", "autoencoder")
    return counts


def short(recipe: Recipe, **data: object) -> Recipe:
    """Return a recipe of three steps that draws a grid of samples."""
    return replace(
        recipe,
        device="cpu",
        data=replace(recipe.data, **data),  # type: ignore[arg-type]
        loop=replace(recipe.loop, steps=3, sample_every=2, checkpoint_every=2),
        optimizer=replace(recipe.optimizer, warmup=1),
    )


def test_a_run_on_the_bundled_world_opens_everything_once(openings: Counter[str], tmp_path: Path) -> None:
    """Two sources share the world; the held-out one serves the check, the prompts and the model card."""
    recipe = short(preset("tiny"), sources=("world", "edits", "glosses"))
    assert train(recipe, tmp_path / "run").outcome == "finished"
    assert openings == {"world train": 1, "world heldout": 1, "autoencoder": 1, "trained tokenizer": 1}


def test_a_run_on_a_data_set_opens_no_world(openings: Counter[str], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        PIL.Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"red number {number}")
    build_set(str(images), tmp_path / "set", BuildConfig(size=16, vocabulary=300), workers=0)
    openings.clear()
    recipe = short(preset("tiny"), sources=(str(tmp_path / "set"),), text_share=0.0)
    assert train(recipe, tmp_path / "run").outcome == "finished"
    assert openings == {"data set set": 1, "autoencoder": 1, "tokenizer": 1}


def test_a_resolved_recipe_stays_as_it_is() -> None:
    run = resolve(preset("tiny"))
    assert resolve(run.recipe).recipe == run.recipe
