"""The open ablation table: every row is a settings file that differs from the base by what it is named for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.since import (
    BASE,
    BEST,
    FOLDER,
    MEASURES,
    analyse,
    plan_since,
    reference_of,
    row_names,
    row_recipe,
    row_title,
    since_page,
    summary,
)
from transfuse.cli import find_command, run
from transfuse.config import read_json, read_settings
from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.report import render


@pytest.mark.parametrize("name", row_names())
def test_a_row_is_a_settings_file_that_trains_alone(name: str) -> None:
    options = find_command(["train", "latents-32", "--config", str(FOLDER / f"{name}.toml")]).keywords
    assert options["recipe"] == row_recipe(name, "m")
    assert (row_recipe(name, "m") == preset("latents-32")) == (name == BASE), "it changes something"
    assert len(row_title(name)) > 20


def test_no_two_rows_are_the_same_and_leave_one_outs_leave_one_out() -> None:
    recipes = [row_recipe(name, "xs") for name in row_names()]
    assert all(recipe not in recipes[:at] for at, recipe in enumerate(recipes))
    assert row_names()[0] == BASE
    for name in row_names():
        if reference_of(name) == BEST:
            best, other = (read_settings(FOLDER / f"{each}.toml") for each in (BEST, name))
            assert other != best
            assert all(best[part].items() >= settings.items() for part, settings in other.items())


def test_rows_come_with_what_they_are_compared_with(tmp_path: Path) -> None:
    runs = plan_since(tmp_path, ("flow",), "xxs", 1e4, (0, 1))
    assert [planned.name for planned in runs] == ["base-seed0", "base-seed1", "flow-seed0", "flow-seed1"]
    assert len({planned.recipe.loop.steps for planned in runs}) == 1
    with pytest.raises(UserError, match=r'--rows: unknown name "flaw"; did you mean "flow"'):
        plan_since(tmp_path, ("flaw",), "xxs", 1e4, (0,))


def result(row: str, seed: int, **values: float) -> dict[str, object]:
    facts = {"size": "xs", "budget": 1e4, "steps": 9, "positions": 1e4, "images": 90.0, "parameters": 10}
    return {"run": f"{row}-seed{seed}", "variant": row, "seed": seed, **facts, **values}


def test_outcomes_are_paired_by_seed_and_know_their_direction() -> None:
    base, flow, v = (30.0, 40.0, 50.0), (20.0, 31.0, 39.0), (31.0, 39.0, 51.0)
    results = [
        result(row, seed, frechet=values[seed], noun_strict=values[seed] / 100)
        for row, values in {"base": base, "flow": flow, "v": v}.items()
        for seed in range(3)
    ]
    report = analyse(results)
    found = {(each["row"], each["measure"]): each for each in report["comparisons"]}
    assert found["flow", "frechet"]["mean"] == pytest.approx(-10)
    assert found["flow", "frechet"]["outcome"] == "better"
    assert found["flow", "noun_strict"]["outcome"] == "worse"
    assert found["v", "frechet"]["outcome"] == "undecided"
    assert ("flow", "seconds") not in found
    page = render(since_page(report, Path()))
    assert row_title("flow") in page.replace("&#39;", "'")
    assert "| flow | drawn: Fréchet distance | -10 |" in summary(report)
    with pytest.raises(UserError, match=r"expected results of one budget, found 10000\.0, 20000\.0"):
        analyse([*results, {**results[0], "budget": 2e4}])


@pytest.mark.long
def test_the_table_from_the_command(tmp_path: Path) -> None:
    command = ["study", "since", "--rows", "flow", "--size", "xxs", "--positions", "2e3", "--seeds", "0"]
    quick = ["--pictures", "2", "--definitions", "2", "--recogniser-steps", "2", "--run", str(tmp_path)]
    assert run([*command, *quick]) == 0
    report = read_json(tmp_path / "report.json")
    assert {each["measure"] for each in report["comparisons"]} == set(MEASURES) - {"image_loss"}, "of another process"
    assert "Rectified flow" in (tmp_path / "report.html").read_text()
    config = read_json(tmp_path / "runs" / "flow-seed0" / "config.json")
    assert config["diffusion"] == asdict(row_recipe("flow", "xxs").diffusion)
