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
    references_of,
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
    settings = {name: read_settings(FOLDER / f"{name}.toml") for name in row_names()}
    left_out = [name.removeprefix("best-without-") for name in row_names() if references_of(name) == (BEST,)]
    assert len(row_names()) >= 14
    assert left_out, "each switch of the best together is a row alone, and is left out once"
    both = {part: {} for part in settings[BEST]}
    for name in left_out:
        without = {part: dict(values) for part, values in settings[BEST].items()}
        for part, values in settings[name].items():
            both[part] |= values
            assert without[part].items() >= values.items()
            without[part] = {key: value for key, value in without[part].items() if key not in values}
        assert {part: values for part, values in without.items() if values} == settings[f"best-without-{name}"]
    assert both == settings[BEST]


def test_capped_noise_and_clean_copies_differ_in_nothing_else(tmp_path: Path) -> None:
    """Equal pairs have the caption first, so that the rows compare; the one comes with the other."""
    capped, copied, base = (row_recipe(name, "xs") for name in ("capped", "clean-copy", BASE))
    shares = {recipe.data.pairs.caption_first for recipe in (capped, copied, base)}
    assert len(shares) == 1
    assert 0 < capped.data.pairs.image_first_max_timestep < 1000
    counted = Path(__file__).parents[2] / "docs" / "reports" / "since" / "positions.json"
    (tmp_path / "positions.json").write_text(counted.read_text())
    names = {planned.facts["variant"] for planned in plan_since(tmp_path, ("clean-copy",), "xxs", 1e4, (4,))}
    assert names == {"base", "capped", "clean-copy"}


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
    assert "| flow | 0.3 |  | 30 |" in summary(report), "its means"
    assert report["means"]["base"] == {"noun_strict": pytest.approx(0.4), "frechet": pytest.approx(40)}
    with pytest.raises(UserError, match=r"expected results of one budget, found 10000\.0, 20000\.0"):
        analyse([*results, {**results[0], "budget": 2e4}])


def test_seconds_and_a_second_reference_are_in_table_and_page() -> None:
    seconds = {"base": (90.0, 110.0), "capped": (100.0, 120.0), "clean-copy": (130.0, 150.0)}
    results = [result(row, seed, seconds=of[seed]) for row, of in seconds.items() for seed in range(2)]
    report = analyse(results)
    assert [report["means"][row]["seconds"] for row in seconds] == [100, 110, 140]
    pairs = {(each["row"], each["reference"]): each["mean"] for each in report["comparisons"]}
    assert pairs == {("capped", "base"): 10, ("clean-copy", "base"): 40, ("clean-copy", "capped"): 30}
    assert "| clean-copy against capped | seconds of training | +30 |" in summary(report)
    page = render(since_page(report, Path()))
    assert "clean-copy against capped" in page
    assert page.index("All rows") < page.index("140"), "the losing row stays, with its seconds"


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
