"""Measures while a run trains: in the same metrics, the same again, the best kept, and training as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_equal, tensors

import transfuse
from transfuse.errors import UserError
from transfuse.evaluation import Result
from transfuse.recipes import Recipe, preset
from transfuse.runs.monitor import is_best
from transfuse.train import Trained, train
from transfuse.training import LoopConfig
from transfuse.training.metrics import read_metrics


def measured(**loop: object) -> Recipe:
    recipe = preset("tiny")
    settings = {"steps": 6, "measure_every": 2, "measure_count": 4, "sample_every": 0, "checkpoint_every": 3, **loop}
    return replace(recipe, loop=replace(recipe.loop, **settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("measured") / "run"
    return train(measured(best="captioning/CIDEr-D x 100"), folder), folder


def lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "captioning/CIDEr-D x 100" in line]


def test_numbers_in_the_metrics_and_the_best_kept(trained: tuple[Trained, Path]) -> None:
    _, folder = trained
    found = lines(folder)
    assert [line["step"] for line in found] == [2, 4, 6]
    best = json.loads((folder / "best.json").read_text())
    values = [line["captioning/CIDEr-D x 100"] for line in found]
    assert best["value"] == max(values)
    assert best["step"] == found[values.index(max(values))]["step"]  # the first of equals
    assert transfuse.load(str(folder / "best")).caption is not None


def test_training_is_the_same_without(trained: tuple[Trained, Path], tmp_path: Path) -> None:
    plain = train(measured(measure_every=0), tmp_path / "run")
    assert_equal(tensors(plain.trainer), tensors(trained[0].trainer))


def test_stopped_and_gone_on_with(trained: tuple[Trained, Path], tmp_path: Path) -> None:
    recipe = measured(best="captioning/CIDEr-D x 100")
    first = train(replace(recipe, loop=replace(recipe.loop, session_seconds=0.0)), tmp_path / "run")
    assert first.outcome == "stopped"
    train(recipe, tmp_path / "run")
    assert lines(tmp_path / "run") == lines(trained[1])
    assert (tmp_path / "run" / "best.json").read_text() == (trained[1] / "best.json").read_text()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'^loop.measures: unknown measure "captionin"; did you mean "captioning"'):
        train(measured(measures=("captionin",)), tmp_path / "a")
    with pytest.raises(UserError, match=r'^loop.best: unknown number "drawing/FID".*captioning/BLEU-4 x 100'):
        train(measured(best="drawing/FID"), tmp_path / "b")
    with pytest.raises(UserError, match=r'unknown number "captioning/CIDER"; did you mean "captioning/CIDEr-D x 100"'):
        train(measured(best="captioning/CIDER"), tmp_path / "c")
    with pytest.raises(UserError, match=r"^clip: expected the package open_clip|^--clip: expected weights"):
        train(measured(measures=("clip",)), tmp_path / "d")
    with pytest.raises(ValueError, match=r"loop\.measure_every: expected above 0 where loop\.best"):
        LoopConfig(best="captioning/CIDEr-D x 100")
    assert not any(read_metrics(path) for path in tmp_path.rglob("metrics.jsonl")), "all before the first step"


DIRECTIONS = [("higher", 2.0, True), ("lower", 2.0, False), ("lower", 0.5, True), ("lower", 1.0, False)]


@pytest.mark.parametrize(("better", "value", "expected"), DIRECTIONS)
def test_better_in_either_direction(tmp_path: Path, better: str, value: float, expected: bool) -> None:
    note = tmp_path / "best.json"
    result = Result("x", value, None, None, 1, better, "", "")  # type: ignore[arg-type]
    assert is_best(note, "m/x", result)
    note.write_text(json.dumps({"measure": "m/x", "value": 1.0, "step": 1}))
    assert is_best(note, "m/x", result) is expected
    assert is_best(note, "m/other", result)
