"""A run says before training when no image is learned at the timesteps that drawing begins with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from transfuse.autoencoders import Pixels
from transfuse.data import DataSet, PairConfig
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.recipes import Recipe, preset
from transfuse.runs import open_run, open_sources, unseen_noise
from transfuse.runs.sources import mixture
from transfuse.sequence import Tokenizer
from transfuse.train import build_trainer

FIRST = PairConfig(caption_first=0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Sets of documents whose images come first, or are asked for; all of one tokenizer."""
    root = tmp_path_factory.mktemp("sets")
    for number in range(3):
        PIL.Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(root / f"{number}.png")
    kinds = {
        "captions": lambda i: [{"image": f"{i % 3}.png"}, {"text": f"picture {i}"}],
        "albums": lambda i: [{"image": "0.png"}, {"image": f"{i % 3}.png"}, {"text": f"album {i}"}],
        "stories": lambda i: [{"text": f"story {i}"}, {"image": f"{i % 3}.png"}, {"text": "the end"}],
    }
    config = BuildConfig(size=8, vocabulary=300, heldout=0.0)
    for name, parts in kinds.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"parts": parts(i)}) for i in range(30)))
        build_set(str(root / f"{name}.jsonl"), root / name, config, workers=0)
        config = replace(config, tokenizer=str(root / "captions"))
    return root


def recipe(*sources: str, pairs: PairConfig | None = None, timesteps: int = 1000) -> Recipe:
    base = preset("tiny")
    data = replace(base.data, sources=sources, pairs=pairs or PairConfig())
    return replace(base, data=data, diffusion=replace(base.diffusion, timesteps=timesteps))


def warning_of(recipe: Recipe, tokenizer: Tokenizer) -> str | None:
    opened = open_sources(recipe.data)
    grammar = recipe.model.sequence_format(tokenizer)
    return unseen_noise(recipe, mixture(recipe, opened, tokenizer, grammar, Pixels()).document)


@pytest.mark.parametrize(
    ("pairs", "timesteps"),
    [
        (PairConfig(), 1000),
        (PairConfig(caption_first=0.05), 1000),
        (replace(FIRST, image_first_max_timestep=None), 1000),
        (replace(FIRST, image_first_max_timestep=300), 250),
        (replace(FIRST, image_first_max_timestep=1000), 1000),
    ],
)
def test_a_run_that_sees_all_noise_says_nothing(pairs: PairConfig, timesteps: int, tokenizer: Tokenizer) -> None:
    assert warning_of(recipe("world", "glosses", pairs=pairs, timesteps=timesteps), tokenizer) is None


@pytest.mark.parametrize(("limit", "timesteps", "levels"), [(500, 1000, "501 to 1000"), (200, 300, "201 to 300"),
                                                            (0, 1000, "1 to 1000")])  # fmt: skip
def test_a_run_that_only_captions_says_so(limit: int, timesteps: int, levels: str, tokenizer: Tokenizer) -> None:
    pairs = replace(FIRST, image_first_max_timestep=limit)
    line = warning_of(recipe("world", "glosses", pairs=pairs, timesteps=timesteps), tokenizer)
    assert line is not None
    assert line.startswith(f"world: no image is learned at timesteps {levels}, where drawing begins; ")
    assert f"data.pairs.image_first_max_timestep {limit}, data.pairs.caption_first 0)" in line
    assert "\n" not in line


def test_sets_are_looked_at_themselves(sets: Path) -> None:
    """No setting says that a set holds images before their text alone; one that has others is enough."""
    tokenizer = DataSet(str(sets / "captions")).tokenizer()
    for name in ("captions", "albums"):
        line = warning_of(recipe(str(sets / name)), tokenizer)
        assert line is not None
        assert line.startswith(f"{sets / name}: no image is learned at timesteps 501 to 1000")
    both = warning_of(recipe(str(sets / "captions"), str(sets / "albums")), tokenizer)
    assert both is not None
    assert str(sets / "captions") in both
    assert str(sets / "albums") in both
    assert warning_of(recipe(str(sets / "stories")), tokenizer) is None
    assert warning_of(recipe(str(sets / "captions"), f"{sets / 'stories'},weight=0.1"), tokenizer) is None
    assert warning_of(recipe("edits", pairs=FIRST), tokenizer) is None, "their targets are drawn"


def test_training_says_it_first(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("captions", 1), ("stories", 0)):
        made = open_run(recipe(str(sets / name)), tmp_path / name)
        build_trainer(made, tmp_path / name)
        assert capsys.readouterr().err.count("where drawing begins") == expected
