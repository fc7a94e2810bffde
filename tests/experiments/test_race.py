"""The race and time to quality: from nothing to a verdict by both judges, and where a run first meets its aims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emoji_scenes.metrics import task_scenes
from emoji_scenes.scene_detector import Seen
from experiments.race import AIMS, JUDGES, Race, aims_like, main, meets, report_of, run_seed, table, verdicts
from transfuse.cli import run
from transfuse.config import read_json
from transfuse.errors import UserError
from transfuse.evaluation import Estimate
from transfuse.recipes import preset

SMALLER = """
[model]
text_vocab_size = 512
d_model = 24
n_layers = 1
n_heads = 1
d_ff = 32
unet_channels = [16, 16]
[data]
batch_size = 2
[loop]
steps = 2
[generation.sampler]
steps = 2
[generation]
max_tokens = 4
"""


def test_the_race_from_nothing_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of two steps meets no aim; both judges looked, and the same command repeats nothing."""
    monkeypatch.setattr("emoji_scenes.scene_detector.TEST_SCENES", 20)
    (tmp_path / "smaller.toml").write_text(SMALLER)
    command = [
        "study",
        "race",
        "--config",
        str(tmp_path / "smaller.toml"),
        "--seeds",
        "4",
        "--run",
        str(tmp_path / "r"),
    ]
    command += ["--pictures", "3", "--judge-steps", "2"]
    assert run(command) == 0
    report = read_json(tmp_path / "r" / "report.json")
    (row,) = report["runs"][0]["measured"]
    assert row["scores"].keys() == AIMS.keys() == row["intervals"].keys()
    assert all(low <= row["scores"][name] <= high for name, (low, high) in row["intervals"].items())
    assert report["seconds"] is None
    assert report["bounds"].keys() == AIMS.keys() - {"captions, nouns right"}
    assert report["bounds"]["one thing right, first judge"]["ceiling"] > 0.6, "the strict classifier knows real images"
    assert "| real images | | | " in table(report)
    assert (row["step"], row["ended"], row["seconds"] > 0) == (2, True, True)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*.safetensors")}
    assert {"first-judge.safetensors", "second-judge.safetensors"} <= {path.name for path in before}
    assert run(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match=r"expected --pictures 3, found 4"):
        main([*command[2:], "--pictures", "4"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["race-cpu", "race-gpu"])
def test_the_scripts_race(tmp_path: Path, name: str) -> None:
    """A user starts them, here with a smaller network: options after the script's own replace them."""
    root = Path(__file__).parents[2]
    (tmp_path / "smaller.toml").write_text(SMALLER)
    (tmp_path / "transfuse").write_text(f'#!/bin/bash\nexec {sys.executable} -m transfuse "$@"\n')
    (tmp_path / "transfuse").chmod(0o755)
    options = ["--config", str(tmp_path / "smaller.toml"), "--run", str(tmp_path / "r"), "--seeds", "5", "7"]
    command = [root / "docs" / "launch" / "studies" / f"{name}.sh", *options, "--pictures", "2", "--judge-steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert "The median seed does not reach all aims." in done.stdout
    assert [entry["seed"] for entry in read_json(tmp_path / "r" / "report.json")["runs"]] == [5, 7]


def test_time_until_the_scores_of_another_run(tmp_path: Path) -> None:
    """Scores that anything reaches are met at the first measurement, those that nothing reaches never."""
    easy = {"noun_strict_accuracy": 0.0, "frechet_distance": 1e9, "caption_noun_accuracy": 0.0, "seconds": 1e4}
    (tmp_path / "easy.json").write_text(json.dumps(easy))
    (tmp_path / "hard.json").write_text(json.dumps({"noun_strict": 1, "frechet": 0, "caption_noun": 1, "seconds": 9}))
    (tmp_path / "short.json").write_text(json.dumps({"loop": {"steps": 3}}))
    common = ["--preset", "tiny", "--config", str(tmp_path / "short.json"), "--seeds", "0", "--every", "1e-6"]
    common += ["--pictures", "4", "--judge-steps", "1"]
    _, report = main([*common, "--like", str(tmp_path / "easy.json"), "--run", str(tmp_path / "easy")])
    (row,) = report["runs"][0]["measured"]
    assert (row["step"], row["ended"]) == (1, False)
    assert report["seconds"] == row["seconds"]
    assert report["ratio"] == pytest.approx(row["seconds"] / 1e4)
    _, report = main([*common, "--like", str(tmp_path / "hard.json"), "--run", str(tmp_path / "hard")])
    assert [row["step"] for row in report["runs"][0]["measured"]] == [1, 2, 3]
    assert report["seconds"] is None
    for other in ({"pictures_measured": 5}, {"recogniser_digest": "0123abcd"}):
        (tmp_path / "other.json").write_text(json.dumps(easy | other))
        with pytest.raises(UserError, match=rf"{next(iter(other))}: expected .*, as here, found"):
            main([*common, "--like", str(tmp_path / "other.json"), "--run", str(tmp_path / "other")])


def test_a_run_stops_where_it_meets_all_aims_at_once(tmp_path: Path) -> None:
    aims = {"captions, nouns right": 0.5, "Fréchet distance": 10.0}
    given = iter([(0.9, 11.0), (0.4, 3.0), (0.5, 10.0), (1.0, 0.0)])

    def measure(pipe: object) -> dict[str, Estimate]:
        return {name: Estimate(value, value, value, 1) for name, value in zip(aims, next(given), strict=True)}

    recipe = preset("tiny")
    for seed in (0, 1):  # the second begins with the last scores, and ends at once
        assert run_seed(replace(recipe, seed=seed), tmp_path / f"seed{seed}", 1e-6, measure, aims)
    steps = [[row["step"] for row in read_json(tmp_path / f"seed{seed}" / "scores.json")] for seed in (0, 1)]
    assert steps == [[1, 2, 3], [1]]
    report = report_of(Race(run=tmp_path, seeds=(0, 1)), aims, 100.0)
    seconds = [entry["seconds"] for entry in report["runs"]]
    assert report["seconds"] == pytest.approx(np.mean(seconds))
    assert "of the reference's 100 seconds" in table(report)


def test_the_median_needs_most_seeds(tmp_path: Path) -> None:
    for seed, reached in enumerate((True, False, True)):
        row = {"step": 5, "seconds": 10.0 + seed, "ended": True, "scores": {"a": float(reached)}}
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "scores.json").write_text(json.dumps([{**row, "intervals": {"a": [0, 1]}}]))
    report = report_of(Race(run=tmp_path), {"a": 1.0}, None)
    assert (report["seconds"], report["runs"][1]["seconds"]) == (12.0, None)
    report = report_of(Race(run=tmp_path, seeds=(0, 1)), {"a": 1.0}, None)
    assert report["seconds"] is None
    assert "not reached" in table(report)


def test_both_judges_must_agree() -> None:
    """The second sees a thing too many in every other image of a single thing, and no thing in others."""
    world = preset("small-64").data.world
    tasks = {task.task: task for task in task_scenes(world, "heldout", 4)}
    lists = iter([task.scenes for task in tasks.values() if task.task in ("single object", "two objects")])

    def second(images: np.ndarray) -> list[list[Seen]]:
        seen = [[Seen(thing.noun, 0.5, 0.5, 0.5) for thing in scene.things] for scene in next(lists)]
        return [[*things, *[Seen("crab", 0, 0, 1)] * (n % 2)] for n, things in enumerate(seen)]

    single = tasks["single object"]
    first, other = verdicts(single, single.real, [second, second])
    assert first.mean() >= 0.75, "the strict classifier knows the real images"
    assert other.tolist() == [True, False, True, False]
    scores = dict.fromkeys(AIMS, 1.0)
    assert meets(scores, AIMS)
    assert not any(meets({**scores, name: aim - 0.01}, AIMS) for name, aim in AIMS.items())
    assert sum(name.endswith(JUDGES[1]) for name in AIMS) == 2


def test_what_does_not_race_is_refused(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text('{"start": "small-64"}')
    (tmp_path / "photos.json").write_text('{"data": {"sources": ["world", "photos/"]}}')
    (tmp_path / "scores.json").write_text('{"noun_strict": 0.5}')
    cases = {
        "expected none, as training begins with nothing": ["--config", str(tmp_path / "start.json")],
        "found photos/": ["--config", str(tmp_path / "photos.json")],
        "data.world: expected that of small-64": ["--preset", "demo"],
        "expected scenes of one thing": ["--like", str(tmp_path / "scores.json")],
        "--every: expected more than 0, found 0": ["--every", "0"],
        "--seeds: expected at least one": ["--seeds", "1", "1"],
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message):
            main(["--run", str(tmp_path / "r"), *arguments])
    with pytest.raises(UserError, match=r"scores.json: frechet: expected a number, found none"):
        aims_like(tmp_path / "scores.json")
    assert not (tmp_path / "r").exists()
