"""Model cards: the Hub's own reader takes their metadata, and measured numbers become its `model-index`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.folders import WEIGHTS, bundled_models
from transfuse.model_card import add_results, read_card, write_card


def result(**changes: object) -> dict[str, object]:
    values = {"measure": "captioning", "name": "nouns right", "value": 0.75, "low": 0.5, "high": 1.0, "count": 8}
    return {**values, "implementation": "transfuse 0", "data": "pets:train, 8 images", "drawing": None, **changes}


def test_the_hub_reads_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(write_card({"library_name": "transfuse", "tags": ["a: b"]}, "# Pets\n\nKnows pets.\n"))
    drawn = {"measure": "drawing", "name": "FID", "value": 31.5, "low": None, "high": None, "drawing": {"steps": 20}}
    speed = {"measure": "speed", "name": "tokens a second"}
    add_results(path, "pets", [result(), result(**drawn), result(**speed), result(name="x", value=math.nan)])
    card = ModelCard.load(path)
    assert card.data.model_name == "pets"
    assert {
        (each.task_type, each.metric_type, each.metric_name, each.metric_value) for each in card.data.eval_results
    } == {
        ("image-to-text", "captioning", "nouns right", 0.75),
        ("text-to-image", "drawing", "FID", 31.5),
    }
    (captioning, _) = card.data.eval_results
    assert captioning.dataset_name == "pets:train, 8 images"
    assert captioning.metric_args == {"low": 0.5, "high": 1.0, "count": 8, "implementation": "transfuse 0"}
    assert card.data.tags == ["a: b"]
    assert "Knows pets." in card.text
    assert "| captioning: nouns right | 0.75 | 0.5 to 1 | pets:train, 8 images |" in card.text


def test_a_number_measured_again_replaces_its_earlier_value(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("No metadata.\n\n## Measured\nby hand\n\n## Limits\nmany\n")
    add_results(path, "a", [result(), result(data="other, 8 images")])
    add_results(path, "a", [result(value=0.5)])
    card = ModelCard.load(path)
    values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
    assert values == {"pets:train, 8 images": 0.5, "other, 8 images": 0.75}
    assert card.text.count("## Measured") == 1
    assert "by hand" not in card.text
    assert "## Limits\nmany" in card.text
    assert "No metadata." in card.text


@pytest.mark.parametrize(("text", "says"), [("---\na: [\n---\n", "metadata in YAML"), ("---\n- a\n---\n", "by name")])
def test_damaged_metadata_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_card(path)
    assert "\n" not in str(caught.value)


def test_cards_of_bundled_models_are_valid_and_hold_their_numbers() -> None:
    for name in bundled_models():
        card = ModelCard.load(WEIGHTS / name / "README.md")
        assert card.data.library_name == "transfuse"
        assert card.data.model_name == name
        for each in card.data.eval_results:
            row = f"| {each.metric_type}: {each.metric_name} | {each.metric_value:.3g} |"
            assert row in card.text, row


@pytest.mark.long
def test_a_run_is_trained_measured_and_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "tiny", "--run", "runs/a", "--loop.steps", "2"]) == 0
    assert ModelCard.load("runs/a/export/README.md").data.license == "apache-2.0"
    words = ["evaluate", "--model", "runs/a/export", "--suite", "text", "--count", "5", "--card"]
    assert run([*words, "--out", "measured"]) == 0
    (first,) = [
        each for each in json.loads(Path("measured/results.json").read_text())["results"] if "perp" in each["name"]
    ]
    card = ModelCard.load("runs/a/export/README.md")
    assert card.data.model_name == "a"
    assert first["value"] in [each.metric_value for each in card.data.eval_results]
    assert run(["export", "runs/a/export", "--out", "theirs", "--format", "diffusers"]) == 0
    assert ModelCard.load("theirs/README.md").data.eval_results == card.data.eval_results
    assert run(["evaluate", "--model", "small-64", "--suite", "text", "--card"]) == 2
    assert "--card: expected an export of yours, found the bundled model small-64" in capsys.readouterr().err
