"""The cards of committed results: each result has one, and files, pages and cards have the same figures."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("results", ROOT / "tools" / "results.py")
assert spec is not None
assert spec.loader is not None
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)
CARDS = results.read_cards()


@pytest.mark.parametrize("name", CARDS)
def test_figures_are_those_of_files_and_pages(name: str) -> None:
    """After a new measurement, change the card (and its days), then run `python tools/results.py`."""
    assert list(results.differences(name, CARDS[name])) == []


def test_percentages_of_the_readme_are_on_cards() -> None:
    """All but what is in brackets, chance, and the judge's own score on real images."""
    figures = [figure for card in CARDS.values() for figure in card["figures"]]
    known = {figure["shown"] for figure in figures if "README.md: " in " ".join(figure.get("quoted", ()))}
    readme = re.sub(r"\([^)]*\)", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(re.findall(r"[\d.]+ %", readme)) - {"0.3 %", "100 %"} <= known


def test_the_page_is_that_of_the_cards() -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(CARDS), "run python tools/results.py"


def test_the_leaderboard_is_that_of_the_cards() -> None:
    page = results.LEADERBOARD.read_text(encoding="utf-8")
    assert page == results.leaderboard(CARDS), "run python tools/results.py"
    assert page.count("no entry yet") == sum(
        all(card.get("board") != board for card in CARDS.values()) for board in results.BOARDS
    )


def test_the_tables_of_benchmarks_are_those_of_the_readings() -> None:
    page = results.BENCHMARKS.read_text(encoding="utf-8")
    assert page == results.with_tables(page, CARDS), "run python tools/results.py"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"name": "a, rows/s", "at": "rows / a", "of": "b"},
            ("1,200", "300 b", "", "**4.00** (3.00 to 5.00), aim 6.00 missed"),
        ),
        ({"name": "a, ms", "ours": "fast / ms", "peer": "slow / ms"}, ("2.50", "10.0", "", "**4.00**")),
        (
            {"name": "a, ms", "ours": "slow / ms", "limit": "fast / ms", "of": "read"},
            ("10.0", "", "2.50 read", "**25 %**"),
        ),
        ({"name": "a, TFLOP/s", "ours": "flops", "ratio": "share", "scale": 1e-12}, ("400", "", "1,000", "**40 %**")),
        ({"name": "a, times b", "ratio": "rounds"}, ("", "", "", "**2.00** (1.00 to 9.00)")),
        ({"name": "a"}, ("not measured", "", "", "")),
        ({"name": "a", "ours": "fast / s"}, ("nothing under 's'", "", "", "")),
        ({"name": "a", "at": "rows / c"}, ("nothing under 'c'", "", "", "")),
    ],
)
def test_cells_of_a_row(tmp_path: Path, row: dict[str, Any], expected: tuple[str, ...]) -> None:
    rows = [{"name": "a", "ours": 1200.0, "peer": 300.0, "ratio": 4.0, "ratios": [3.0, 5.0, 4.0], "target": 6.0}]
    readings = {
        "rows": rows,
        "fast": {"ms": 2.5},
        "slow": {"ms": 10.0},
        "flops": 4e14,
        "share": 0.4,
        "rounds": [1, 2, 9],
    }
    (tmp_path / "docs" / "results" / "benchmarks").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "benchmarks" / "card.json").write_text(json.dumps(readings))
    assert results.cells("card", row, tmp_path) == expected
    if "nothing" in expected[0]:
        card = dict.fromkeys(results.FIELDS, "") | {"figures": [], "rows": [row]}
        assert any(expected[0] in line for line in results.differences("card", card, tmp_path))


def test_an_entry_of_the_race_has_its_row(tmp_path: Path) -> None:
    """The fastest first; without a log, three seeds or seconds it is refused."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    facts = {"board": "race-cpu", "log": "log.jsonl", "seeds": [3, 5, 8], "seconds": 900, "figures": []}
    card = dict.fromkeys(results.FIELDS, "x") | facts
    assert not list(results.differences("a", card, tmp_path))
    page = results.leaderboard({"slow": card, "fast": card | {"seconds": 300}})
    race = page[page.index("## The race on two cores") : page.index("## The race on one GPU")]
    assert race.index("fast.toml") < race.index("slow.toml")
    assert "[log](../log.jsonl)" in race
    assert "| 300 | 3, 5, 8 |" in race
    assert "no entry yet" not in race
    for wrong in ({"seeds": [3]}, {"seconds": "not recorded"}, {"log": "no.jsonl"}, {"board": "race-tpu"}):
        assert len(list(results.differences("a", card | wrong, tmp_path))) >= 1, wrong


def test_every_committed_result_has_a_card() -> None:
    known = {figure["at"].partition(": ")[0] for card in CARDS.values() for figure in card["figures"]}
    docs = ROOT / "docs"
    files = [*docs.glob("results/benchmarks/*.json"), *docs.glob("reports/*/report.json")]
    files += [*docs.glob("reports/*.json"), *docs.glob("reports/*.html")]
    assert {path.relative_to(docs).as_posix() for path in files} == known - {"LOG.md"}  # of results that were replaced


def test_what_differs_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.json").write_text(json.dumps({"rows": [{"name": "x", "unit": "s", "ratio": 2.04}]}))
    (tmp_path / "docs" / "a.html").write_text("<p>speed</p> <b>2.04</b>")
    (tmp_path / "README.md").write_text("| x |  2.0 times |")
    figure = {"name": "x", "value": 2.04, "shown": "2.0", "at": "a.json: rows / x & s / ratio"}
    figure["quoted"] = ["README.md: | x | 2.0 times |"]
    card = dict.fromkeys(results.FIELDS, "") | {"figures": [figure]}
    assert not list(results.differences("a", card, tmp_path))
    changes = [
        ({"value": 2.05}, "found 2.04 in a.json"),
        ({"shown": "2.1"}, "as it rounds, found '2.1'"),
        ({"at": "a.json: rows / y / ratio"}, "nothing under 'y'"),
        ({"quoted": ["README.md: | x | 2.0 fold |"]}, "in README.md, found other words"),
        ({"quoted": ["README.md: times |"]}, "'2.0' in its quotation"),
        ({"at": "a.html", "text": "speed 2.0"}, "at the end of its text"),
        ({"at": "a.html", "text": "pace 2.04"}, "expected 'pace 2.04' in a.html"),
    ]
    for change, expected in changes:
        wrong = copy.deepcopy(card)
        wrong["figures"][0] |= change
        lines = list(results.differences("a", wrong, tmp_path))
        assert any(expected in line for line in lines), (change, lines)
    del card["machine"]
    assert list(results.differences("a", card, tmp_path)) == ["a: machine: expected in a card, found none"]
    page = {"at": "a.html", "text": "speed 2.04", "quoted": []}
    assert not list(results.differences("a", {**card, "machine": "m", "figures": [figure | page]}, tmp_path))
