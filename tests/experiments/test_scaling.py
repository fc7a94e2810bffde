"""What the scaling study says of results whose laws are known: made up here, to test the analysis, never reported."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import ablations, editing
from experiments.common import EvalSize, Study, check_grid, read_result, write_report
from experiments.scaling import AXES, MEASURES, analyse, plan_scaling, plot, scaling_page, summary, write
from transfuse.cli import run
from transfuse.config import read_json
from transfuse.errors import UserError
from transfuse.report import render

SIZES = {"xs": 1e6, "s": 3e6, "m": 6e6}
BUDGETS = (1e6, 4e6)
SPEED = {"transfusion": 1e11, "chameleon": 0.5e11, "llama": 1e11}
SHARES = ("noun", "both", "caption_noun")
RATIO = 0.4
CELL = re.compile(r"<t[dh][^>]*>([^<]*)</t[dh]>|class=\"value\">([^<]*)<")
"""every number of a page: cells of tables, values of bars"""


def result(arm: str, size: str, budget: float, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A run whose perplexity is 100 (FLOPs / 1e13)^-0.1, Chameleon's as that of RATIO times its FLOPs."""
    longer = 1 + 0.001 * seed
    flops = 6 * SIZES[size] * budget * longer
    worth = flops * (RATIO if arm == "chameleon" else 1.0) / 1e13
    found: dict[str, Any] = {
        "run": f"{arm}-{size}-{budget:g}-seed{seed}",
        "variant": arm,
        "size": size,
        "budget": budget,
        "seed": seed,
        "parameters": int(SIZES[size]),
        "positions": budget * longer,
        "text_targets": budget / 2,
        "definition_positions": budget * longer / 2,
        "images": budget / 60,
        "theoretical_flops": flops,
        "executed_flops": 0.8 * flops,
        "seconds": flops / SPEED[arm],
        "machine": {"host": "a", "device": "cpu", "threads": 1, "precision": "float32"},
        "text_perplexity": 100 * worth**-0.1,
    }
    if arm != "llama":
        found |= {"caption_perplexity": 9 * worth**-0.1, "caption_cider": 50 * worth**0.2, "frechet": 30 * worth**-0.3}
        found |= {name: min(0.9, 0.3 * worth**0.1) for name in SHARES}
        found |= {f"{name}_chance": 0.01 for name in SHARES}
    found |= {
        f"{name}_interval": [value * 0.97, value * 1.03]
        for name, value in list(found.items())
        if name in {measure.key for measure in MEASURES}
    }
    return {**found, **changes}


def grid(*arms: str, seeds: int = 1) -> list[dict[str, Any]]:
    return [
        result(arm, size, budget, seed) for arm in arms for size in SIZES for budget in BUDGETS for seed in range(seeds)
    ]


@pytest.mark.parametrize(("read", "comparable"), [(0.5, True), (0.49, True), (0.3, False)])
def test_perplexities_of_arms_that_read_unequally_much_are_not_compared(read: float, comparable: bool) -> None:
    results = grid("transfusion", "chameleon")
    for one in results:
        if one["variant"] == "chameleon":
            one["definition_positions"] = read * one["positions"]
    parity = analyse(results)["parity"]["flops"]
    found = parity["text_perplexity"]["transfusion"]["observed"]
    assert (found["ratio"] is not None) == comparable
    assert ("1.7 times the text at equal positions: not comparable" in found["note"]) != comparable
    assert parity["frechet"]["transfusion"]["observed"]["ratio"] is not None, "pictures are compared all the same"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_ratio_is_found_for_every_measure_and_way_of_counting(seeds: int) -> None:
    report = analyse(grid("transfusion", "chameleon", seeds=seeds))
    for measure in MEASURES:
        for axis, times in (("flops", 1.0), ("executed", 1.0), ("seconds", 0.5)):
            for target in ("observed", "fitted"):
                found = report["parity"][axis][measure.key]["transfusion"][target]
                assert found["ratio"] == pytest.approx(RATIO * times, rel=1e-6), (measure.key, axis)
                assert found["is_cheaper"] == "reproduced"
        alone = report["parity"]["same size"][measure.key]["transfusion"]["observed"]
        assert "too few points: expected 3 of different cost, found 2" in alone["note"], (
            "two budgets, whatever the seeds"
        )


def test_a_small_run_on_a_slow_machine_is_no_result_to_equal() -> None:
    results = grid("transfusion", "chameleon")
    slow = next(one for one in results if (one["variant"], one["size"], one["budget"]) == ("chameleon", "xs", 1e6))
    slow["seconds"] = 1e9
    dearest = max((one for one in results if one["variant"] == "chameleon"), key=lambda one: one["theoretical_flops"])
    found = analyse(results)["parity"]["seconds"]["text_perplexity"]["transfusion"]["observed"]
    assert found["target"] == pytest.approx(dearest["text_perplexity"])
    assert found["cost"] == pytest.approx(dearest["seconds"])


def test_what_says_nothing_is_left_out_and_named() -> None:
    results = grid("transfusion", "chameleon")
    results[0] |= {"noun": 0.02, "noun_interval": [0.005, 0.04], "both": 0.99, "both_interval": [0.97, 1.0]}
    report = analyse(results)
    name = results[0]["run"]
    assert "no better than guessing" in report["lines"]["noun"]["transfusion"]["left_out"][name]
    assert "no better than guessing" in report["lines"]["frechet"]["transfusion"]["left_out"][name]
    assert "100 %" in report["lines"]["both"]["transfusion"]["left_out"][name]
    assert report["lines"]["caption_cider"]["transfusion"]["left_out"] == {}
    assert report["parity"]["flops"]["noun"]["transfusion"]["observed"]["count"] == len(results) / 2 - 1
    assert report["parity"]["flops"]["noun"]["transfusion"]["observed"]["ratio"] == pytest.approx(RATIO)
    weak = max((one for one in results if one["variant"] == "chameleon"), key=lambda one: one["theoretical_flops"])
    weak |= {"noun": 0.0, "noun_interval": [0.0, 0.01]}
    found = analyse(results)["parity"]["flops"]["frechet"]["transfusion"]["observed"]
    assert found["ratio"] is None
    assert "the baseline's largest run does not count" in found["note"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_runs_that_a_cheaper_one_of_their_arm_beats_are_no_law(seeds: int) -> None:
    """Networks too large for their positions, of either arm, change neither lines nor ratios; they are named."""
    good = grid("transfusion", "chameleon", seeds=seeds)
    waste = [
        result(arm, size, 1e6, seed) | {"size": "xl", "run": f"waste-{arm}-{size}-{seed}", measure.key: bad}
        for arm in ("transfusion", "chameleon")
        for size in SIZES
        for seed in range(seeds)
        for measure, bad in ((MEASURES[0], 1e3),)
    ]
    for one in waste:
        one["theoretical_flops"] *= 300
    before, after = (analyse(results)["parity"]["flops"]["text_perplexity"] for results in (good, [*good, *waste]))
    assert after["transfusion"]["observed"]["ratio"] == pytest.approx(before["transfusion"]["observed"]["ratio"])
    lines = analyse([*good, *waste])["lines"]["text_perplexity"]
    for arm in ("transfusion", "chameleon"):
        reasons = lines[arm]["left_out"]
        assert reasons.keys() == {one["run"] for one in waste if one["variant"] == arm}
        assert all("is cheaper and better" in reason for reason in reasons.values())


def test_a_run_that_guesses_beats_none() -> None:
    """Blurs may lie nearer to real pictures than a beginner's drawings do: they are no better, and no bargain."""
    results = grid("transfusion", "chameleon")
    before = analyse(results)["parity"]["flops"]["frechet"]["transfusion"]["observed"]
    blur = result("transfusion", "xs", 5e5, frechet=1.0, noun=0.01, noun_interval=[0.0, 0.02])
    report = analyse([*results, blur])
    assert report["lines"]["frechet"]["transfusion"]["left_out"] == {blur["run"]: "noun no better than guessing"}
    assert report["parity"]["flops"]["frechet"]["transfusion"]["observed"] == before


def test_equal_size_is_asked_where_the_rival_has_budgets() -> None:
    """One run of a larger size, which makes no line, does not take the place of a size with several."""
    several = [result(arm, "s", budget) for arm in ("transfusion", "chameleon") for budget in (1e6, 2e6, 4e6)]
    larger = [result(arm, "m", 1e6) for arm in ("transfusion", "chameleon")]
    ratios = [
        analyse(runs)["parity"]["same size"]["frechet"]["transfusion"]["observed"]["ratio"]
        for runs in (several, [*several, *larger])
    ]
    assert ratios == [pytest.approx(RATIO)] * 2


@pytest.mark.parametrize(
    "other", [{"device": "a card"}, {"processor": "another"}, {"threads": 2}, {"precision": "bfloat16"}]
)
def test_seconds_of_different_machines_are_marked(other: dict[str, Any]) -> None:
    results = grid("transfusion", "chameleon")
    alike = analyse(results)["parity"]
    assert "different machines" not in alike["seconds"]["frechet"]["transfusion"]["observed"]["note"]
    results[0]["machine"] |= other
    report = analyse(results)["parity"]
    seconds = report["seconds"]["frechet"]["transfusion"]["observed"]
    assert "different machines" in seconds["note"]
    assert (seconds["ratio"], seconds["is_cheaper"]) == (None, "undecided")
    assert "different machines" not in report["flops"]["frechet"]["transfusion"]["observed"]["note"]


def test_without_the_rival_or_pictures_nothing_is_made_up() -> None:
    report = analyse(grid("llama"))
    assert list(report["lines"]["text_perplexity"]) == ["llama"]
    assert report["lines"]["frechet"] == {}
    found = report["parity"]["flops"]["text_perplexity"]["llama"]["observed"]
    assert (found["ratio"], found["note"]) == (None, "no run of the baseline is done")


@pytest.mark.long
def test_the_report_is_made_of_the_results_or_of_an_earlier_report(tmp_path: Path) -> None:
    """Figures too, and the same ones: a report that was moved elsewhere is enough."""
    (tmp_path / "results").mkdir()
    failed = {"run": "llama-l", "variant": "llama", "why": "step 3: a loss <of> nan"}
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "llama-l.json").write_text(json.dumps(failed))
    for one in grid("transfusion", "chameleon", "llama"):
        (tmp_path / "results" / f"{one['run']}.json").write_text(json.dumps(one))
    report = write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "a loss &lt;of&gt; nan" in page
    assert page.count("<svg") == len(MEASURES)
    assert f"{RATIO:g} (" in summary(report)
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "report.json").write_text((tmp_path / "report.json").read_text())
    assert run(["study", "scaling", "--run", str(tmp_path / "moved"), "--report-only"]) == 0
    for name in ("report.html", "report.json", *(f"figures/{path.name}" for path in (tmp_path / "figures").iterdir())):
        assert (tmp_path / "moved" / name).read_text() == (tmp_path / name).read_text(), name
    for name in ("study.json", "report.json"):
        (tmp_path / "moved" / name).write_text(json.dumps({**report, "study": "ablations"}))
        with pytest.raises(UserError, match=f"{name}: expected the study scaling, found ablations"):
            write_report(tmp_path / "moved", analyse, scaling_page)
        (tmp_path / "moved" / name).write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"expected results of runs, or a report\.json"):
        write_report(tmp_path / "nothing", analyse, scaling_page)


def test_numbers_of_the_page_are_finite() -> None:
    """In every attribute that places something."""
    report = analyse(grid("transfusion", "chameleon", "llama"))
    for svg in [plot(report, measure) for measure in MEASURES]:
        assert svg
        assert "nan" not in svg
        assert "inf" not in svg.replace("infi", "")
    assert all(math.isfinite(one["theoretical_flops"]) for one in grid("llama"))
    assert set(AXES) == {"flops", "same size", "executed", "seconds"}


def test_grids_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sizes: expected at least one, and each once, found xs, xs"):
        check_grid(sizes=("xs", "xs"))
    with pytest.raises(UserError, match=r"--seeds: expected at least one, and each once, found none"):
        check_grid(seeds=())
    with pytest.raises(UserError, match=r"--budgets: expected positive numbers of positions, found -1"):
        check_grid(budgets=(-1.0,))
    with pytest.raises(UserError, match=r"--budgets: expected positive numbers of positions, found nan"):
        check_grid(budgets=(1e6, math.nan))
    with pytest.raises(UserError, match="expected runs of different names, found llama-xxs-1M-seed0 twice"):
        Study(tmp_path, plan_scaling(tmp_path, ("llama",), ("xxs",), (1e6, 1e6 + 1), (0,)), EvalSize(), {})
    with pytest.raises(UserError, match='size: unknown name "x"'):
        plan_scaling(tmp_path, ("transfusion",), ("x",), (1e3,), (0,))
    with pytest.raises(UserError, match='arm: unknown name "camel"; did you mean "chameleon"'):
        plan_scaling(tmp_path, ("camel",), ("xs",), (1e3,), (0,))


@pytest.mark.parametrize("study", ["scaling", "scaling-equal-documents", "ablations", "ablations-patches"])
def test_committed_results_give_the_committed_numbers(study: str) -> None:
    """Results from before `arm` was called `variant`, those of several seeds and sizes; and every table of the page."""
    folder = Path(__file__).parents[2] / "docs" / "reports" / study
    results = [read_result(path) for path in sorted((folder / "results").glob("*.json"))]
    assert results
    assert all("variant" in one and "arm" not in one for one in results)
    is_scaling = study.startswith("scaling")
    report = analyse(results) if is_scaling else ablations.analyse(results)
    committed = read_json(folder / "report.json")
    assert json.loads(json.dumps({**report, "version": ""})) == {**committed, "version": ""}
    page = render(scaling_page(report, folder) if is_scaling else ablations.ablations_page(report, folder))
    assert CELL.findall(page) == CELL.findall((folder / "report.html").read_text())
    assert "best" not in page


@pytest.mark.parametrize("study", ["image-editing", "image-editing-demo"])
def test_the_committed_pages_of_edits_show_their_numbers_and_images(study: str) -> None:
    folder = Path(__file__).parents[2] / "docs" / "reports" / study
    report = read_json(folder / "report.json")
    page = render(editing.editing_page(report, folder))
    assert CELL.findall(page) == CELL.findall((folder / "report.html").read_text())
    assert page.count("<img") == 4 * len(report["edits"])
    assert all(f"<td>{cell}</td>" in page for row in editing.rows_of(report) for cell in row[1:])
    assert "best" not in page
