"""The page of the scaling study: made of `report.json` and the contact sheets beside it, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..images import read_image
from . import published
from .charts import Series, legend, log_log, standalone
from .page import columns, failures, folded, grid, image, made_of_report, page, section
from .power_law import REACH, Line
from .scaling import AXES, MEASURES, RIVAL, Measure

COLOURS = {
    "transfusion": "var(--accent)",
    "transfusion-unet": "#6a5acd",
    "chameleon": "var(--warm)",
    "llama": "var(--soft)",
}


def scaling_page(report: dict[str, Any], folder: Path) -> str:
    """The whole document."""
    results = report["results"]
    failed = f", {len(report['failures'])} failed" if report["failures"] else ""
    lead = (
        f"{len(results)} runs{failed} on the bundled world: what each arm scores for what it cost, and how much of the "
        "rival's compute the others need for the rival's best result."
    )
    sections = [
        section("Parity FLOP ratio", _PARITY, _parity(report, "flops")),
        section("Lines", _LINES, _plots(report)),
        *[section(f"Parity by {words}", _AXIS[axis], _parity(report, axis)) for axis, words in _others()],
        section("U-Net against linear patch layers", _UNET, _unet(report)),
        section("What they draw", _DRAWN, _drawn(report, folder)),
        section("Every run", "", _runs(report)),
    ]
    footer = made_of_report(report["version"], "scaling")
    return page("Transfusion and Chameleon, at equal compute", lead, [one for one in sections if one], footer)


_PARITY = (
    "The 6 N D at which an arm's line equals what the dearest Chameleon scored, over that Chameleon's 6 N D: below 1, "
    "less is needed. In brackets 95 % by Fieller's theorem: with few points Student's margin is wide, and the rival's "
    "own result has an error, too. The paper's ratios are of its own data and sizes, and have no interval."
)
_LINES = (
    "Both axes are logarithmic; bars are 95 % intervals of a run's measure over its items; hollow points say nothing "
    "of the law (no better than guessing, not to be told from 100 %, or worse than a cheaper run of the same arm) and "
    "are left out of the lines."
)
_AXIS = {
    "same size": "Only runs of the size that the rival has at the most budgets: the ratio is one of data alone.",
    "executed": "Operations that were executed, as counted: attention over visible keys, logits where one is learned.",
    "seconds": "What a clock said. It holds for the machines of these runs, and only where nothing else ran on them.",
}
_UNET = (
    "Fréchet distances at equal size, positions and seed. The paper's gap is largest at its smallest size "
    "(37.6 to 18.8, then 21.5 to 18.1; Table 7)."
)

_DRAWN = "The first prompts, none picked: the dearest run of each arm."


def _others() -> Iterator[tuple[str, str]]:
    return ((axis, words) for axis, (_, words) in AXES.items() if axis != "flops")


def _parity(report: dict[str, Any], axis: str) -> str:
    of_the_paper = axis == "flops"
    head = ["", "arm", "ratio", "to its line", *(["paper"] if of_the_paper else []), "below 1", "remarks"]
    rows = []
    for measure in MEASURES:
        for arm, found in report["parity"][axis][measure.key].items():
            observed, fitted = found["observed"], found["fitted"]
            rows.append(
                [
                    measure.title,
                    arm,
                    said_ratio(observed),
                    said_ratio(fitted),
                    *([_printed(measure) if arm == "transfusion" else ""] if of_the_paper else []),
                    observed["below_one"],
                    observed["note"],
                ]
            )
    return columns(head, rows) if rows else '<p class="note">No measure of any arm yet.</p>'


def said_ratio(found: dict[str, Any]) -> str:
    """A ratio with its interval, or a dash."""
    if found["ratio"] is None:
        return "–"
    interval = "" if found["low"] is None else f" ({_bound(found['low'])} to {_bound(found['high'])})"
    return f"{found['ratio']:.3g}{interval}"


def _bound(value: float) -> str:
    """Of an interval; far from the points a line says nothing of how far."""
    return f"{value:.3g}" if value < REACH else f"above {REACH:g}"


def _printed(measure: Measure) -> str:
    if measure.paper is None:
        return ""
    return f"{published.PRINTED[list(published.MEASURES).index(measure.paper)]:g} ({measure.paper})"


def summary(report: dict[str, Any]) -> str:
    """The parity FLOP ratios as a Markdown table."""
    lines = ["| | arm | parity FLOP ratio | below 1 | |", "| --- | --- | ---: | --- | --- |"]
    for measure in MEASURES:
        for arm, found in report["parity"]["flops"][measure.key].items():
            one = found["observed"]
            lines.append(f"| {measure.title} | {arm} | {said_ratio(one)} | {one['below_one']} | {one['note']} |")
    return "\n".join(lines) + "\n"


def series_of(report: dict[str, Any], measure: Measure) -> list[Series]:
    """Points and line of each arm, by 6 N D."""
    found = []
    for arm, fitted in report["lines"][measure.key].items():
        points, hollow = [], []
        for result in report["results"]:
            if result["arm"] != arm or measure.key not in result or result[measure.key] <= 0:
                continue
            x, y = result["theoretical_flops"], result[measure.key]
            if result["run"] in fitted["left_out"]:
                hollow.append((x, y))
            else:
                points.append((x, y, *result[f"{measure.key}_interval"]))
        line = None
        if fitted["line"] is not None:
            law = Line(**fitted["line"])
            line = ((law.cheapest, law.at(law.cheapest)), (law.dearest, law.at(law.dearest)))
        found.append(Series(arm, COLOURS[arm], points, hollow, line))
    return found


def scaling_figures(report: dict[str, Any]) -> dict[str, str]:
    """The plots as files of their own, by name."""
    found = {}
    for measure in MEASURES:
        series = series_of(report, measure)
        svg = log_log(measure.title, series, "6 N D")
        if svg:
            found[measure.key.replace("_", "-")] = standalone(svg, series)
    return found


def _plots(report: dict[str, Any]) -> str:
    panels = []
    for measure in MEASURES:
        series = series_of(report, measure)
        svg = log_log(measure.title, series, "6 N D")
        if svg:
            slopes = folded("Slopes", columns(["arm", "slope", "95 %", "runs", "left out"], _slopes(report, measure)))
            panels.append(
                f'<div class="card"><h3>{escape(measure.title)}</h3>{svg}{legend(series)}<div>{slopes}</div></div>'
            )
    return grid("charts", panels)


def _slopes(report: dict[str, Any], measure: Measure) -> list[list[str]]:
    rows = []
    for arm, fitted in report["lines"][measure.key].items():
        line, out = fitted["line"], str(len(fitted["left_out"]))
        if line is None:
            rows.append([arm, "–", "", "too few", out])
            continue
        interval = "" if line["low"] is None else f"{line['low']:.3f} to {line['high']:.3f}"
        rows.append([arm, f"{line['slope']:.3f}", interval, str(line["count"]), out])
    return rows


def _unet(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{one['size']}, {one['budget']:,.0f} positions, seed {one['seed']}",
            f"{one['frechet_linear']:.2f}",
            f"{one['frechet_unet']:.2f}",
            "–" if one["ratio"] is None else f"{one['ratio']:.2f}",
        ]
        for one in report["unet_gain"]
    ]
    if not rows:
        return '<p class="note">No pair of runs yet.</p>'
    return columns(["", "linear", "U-Net", "linear over U-Net"], rows)


def dearest(results: Sequence[dict[str, Any]], arm: str) -> dict[str, Any] | None:
    """The run of an arm that cost most, if there is one."""
    return max((one for one in results if one["arm"] == arm), key=lambda one: one["theoretical_flops"], default=None)


def _drawn(report: dict[str, Any], folder: Path) -> str:
    cards = []
    for arm in COLOURS:
        run = dearest(report["results"], arm)
        path = folder / "runs" / (run["run"] if run else "") / "drawings.png"
        if run is not None and path.is_file():
            picture = image(np.asarray(read_image(path)), f"drawings of {run['run']}")
            cards.append(f'<div class="card"><h3>{escape(run["run"])}</h3><figure>{picture}</figure></div>')
    return "".join(cards) or '<p class="note">No drawings lie beside the report.</p>'


def _where(machine: dict[str, Any]) -> str:
    """A GPU by its name; a processor by its own, where the result says it."""
    return str(machine.get("processor", "cpu") if machine["device"] == "cpu" else machine["device"])


def _runs(report: dict[str, Any]) -> str:
    head = ["", "6 N D", "positions", "text tokens", "pictures", "parameters", "seconds"]
    head += [*[measure.title for measure in MEASURES], "on"]
    rows = []
    for one in sorted(report["results"], key=lambda one: (one["arm"] == RIVAL, one["arm"], one["theoretical_flops"])):
        machine = one["machine"]
        rows.append(
            [
                one["run"],
                f"{one['theoretical_flops']:.3g}",
                f"{one['positions']:,.0f}",
                f"{one['text_targets']:,.0f}",
                f"{one['images']:,.0f}",
                f"{one['parameters']:,}",
                f"{one['seconds']:,.0f}",
                *[f"{one[measure.key]:.4g}" if measure.key in one else "" for measure in MEASURES],
                f"{_where(machine)}, {machine['threads']} threads, {machine['precision']}",
            ]
        )
    return columns(head, rows) + failures(report["failures"])
