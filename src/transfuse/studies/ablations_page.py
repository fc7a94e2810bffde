"""The page of the ablations: made of `report.json` alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .ablations import MEASURES
from .page import columns, failures, made_of_report, page, section

_NOTE = (
    "A difference is the mean over seeds of paired differences, with its 95 % interval (Student's t). Reproduced: "
    "the interval lies on the paper's side of 0; not reproduced: on the other; undecided: 0 is in it, or there is one "
    "seed. No direction: the paper has no such row, or its difference is no more than rounding."
)
_COST = (
    "The paper's numbers are of 0.76 billion parameters and other data: only directions compare. Measures stand for "
    "those in brackets."
)


def ablations_page(report: dict[str, Any], folder: Path) -> str:
    """The whole document. folder: of the study, for the command line that makes the page anew."""
    comparisons, results = report["comparisons"], report["results"]
    counted = Counter(one["verdict"] for one in comparisons)
    said = ", ".join(f"{counted[name]} {name}" for name in ("reproduced", "not reproduced", "undecided"))
    tables = list(dict.fromkeys(one["table"] for one in comparisons))
    sections = [section("How to read it", _NOTE, "")]
    for table in tables:
        some = [one for one in comparisons if one["table"] == table]
        sections.append(section(table or "Not in the paper", _COST if table else "", _rows(some)))
    sections.append(section("Every run", "", _runs(results, report["failures"])))
    footer = made_of_report(report["version"], "ablations")
    return page("The paper's ablations, small", f"{len(results)} runs: {said}.", sections, footer)


def summary(report: dict[str, Any]) -> str:
    """Every comparison as a row of Markdown."""
    lines = ["| table | | measure | difference | 95 % | paper | |", "| --- | --- | --- | ---: | --- | ---: | --- |"]
    for one in report["comparisons"]:
        interval = "" if one["low"] is None else f"{one['low']:+.3g} to {one['high']:+.3g}"
        paper = "" if one["paper"] is None else f"{one['paper']:+.1f}"
        cells = [one["table"], one["asks"], one["measure"], f"{one['mean']:+.3g}", interval, paper, one["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(comparisons: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{one['asks']}: {MEASURES[one['measure']][1]}",
            f"{one['mean']:+.3g}",
            "" if one["low"] is None else f"{one['low']:+.3g} to {one['high']:+.3g}",
            str(one["count"]),
            "" if one["paper"] is None else f"{one['paper']:+.1f}",
            one["verdict"],
        ]
        for one in comparisons
    ]
    return columns(["", "difference", "95 %", "seeds", "paper", ""], rows)


def _runs(results: list[dict[str, Any]], failed: list[dict[str, Any]]) -> str:
    head = ["", "6 N D", "positions", "text tokens", "pictures", "steps", "parameters"]
    head += [words for _, words in MEASURES.values()]
    rows = [
        [
            one["run"],
            f"{one['theoretical_flops']:.3g}",
            f"{one['positions']:,.0f}",
            f"{one['text_targets']:,.0f}",
            f"{one['images']:,.0f}",
            f"{one['steps']:,}",
            f"{one['parameters']:,}",
            *[f"{one[key]:.4g}" if key in one else "" for key, _ in MEASURES.values()],
        ]
        for one in sorted(results, key=lambda one: (one["arm"], one["seed"]))
    ]
    return columns(head, rows) + failures(failed)
