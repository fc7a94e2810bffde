"""The page of an evaluation: each number with its interval, chance, reference and origin, and what is behind it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from ..evaluation import Drawing, Example, Metric, MetricResult, Result
from .charts import Curve, chart
from .page import folded, grid, image, page, section

AT_ONCE = 12
"""exhibits of a group shown at once; its others are folded away, none is left out"""

_STYLE = """<style>
.numbers th { width: auto; color: var(--ink); } .numbers thead th { color: var(--soft); white-space: nowrap; }
.numbers td { white-space: nowrap; }
.numbers .origin { white-space: normal; color: var(--soft); font-size: 12.5px; min-width: 15em; }
.pair { display: flex; gap: 10px; flex-wrap: wrap; margin-bottom: 8px; }
.pair figure { width: 112px; } .pair figcaption { color: var(--soft); font-size: 12.5px; margin-top: 3px; }
.swept { max-width: 420px; }
h3 { margin-top: 26px; } .card h3 { margin-top: 0; }
</style>"""


def evaluation_page(report: dict[str, Any], measures: Sequence[Metric], found: Sequence[MetricResult]) -> str:
    """The whole document. found: one of a measure for each drawing of a sweep."""
    sections = [_STYLE]
    for measure in measures:
        some = [findings for findings in found if findings.measure == measure.name]
        results = [result for findings in some for result in findings]
        body = _numbers(results) + _swept(results)
        for findings in some:
            if len(some) > 1:
                body += f"<h3>{escape(said_drawing(findings.drawing))}</h3>"
            body += _exhibits(findings.exhibits)
            body += "".join(_table(name, table) for name, table in findings.tables.items())
        sections.append(section(measure.name.capitalize(), f"{measure.about}. {measure.compared}".strip(), body))
    lead = (
        f"Model {report['model_hash']}, measured by Transfuse {report['version']}. Intervals are over items, 95 %. "
        "Chance and reference are other answers, scored by the same measure; under each heading is which."
    )
    return page("What the model can do", lead, sections, "Each number with all that it depends on is in results.json.")


def _numbers(results: Sequence[Result]) -> str:
    head = "".join(
        f"<th scope='col'>{name}</th>" for name in ("", "value", "95 %", "chance", "reference", "items", "from")
    )
    rows = []
    for result in results:
        interval = "" if result.low is None or result.high is None else f"{_plain(result.low)} to {_plain(result.high)}"
        arrow = "↑" if result.better == "higher" else "↓"
        drawn = "" if result.drawing is None else f"; {said_drawing(result.drawing)}"
        cells = [
            f"<b>{_plain(result.value)}</b> {arrow}",
            interval,
            "" if result.floor is None else _plain(result.floor),
            "" if result.ceiling is None else _plain(result.ceiling),
            f"{result.count:,}",
        ]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        origin = f"<td class='origin'>{escape(result.implementation + drawn)}<br>{escape(result.data)}</td>"
        rows.append(f"<tr><th scope='row'>{escape(result.name)}</th>{body}{origin}</tr>")
    return _scrolled(head, rows)


def _plain(value: float) -> str:
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def said_drawing(drawing: Drawing | None) -> str:
    """How pictures were drawn; "" where none were."""
    if drawing is None:
        return ""
    by = "code by code" if drawing.sampler is None else f"{drawing.sampler}, {drawing.steps} steps"
    interval = drawing.guidance_interval
    where = f" at {interval[0]:g} to {interval[1]:g} of the noise" if interval else ""
    best = f", the likeliest of {drawing.candidates}" if drawing.candidates > 1 else ""
    return f"{by}, guidance {drawing.guidance_scale:g}{where}, seed {drawing.seed}{best}"


def _swept(results: Sequence[Result]) -> str:
    """A curve of each number over the guidance scale, where more than one was tried."""
    panels = []
    for name in dict.fromkeys(result.name for result in results if result.drawing is not None):
        points = sorted(
            (result.drawing.guidance_scale, result.value)
            for result in results
            if result.name == name and result.drawing is not None and result.drawing.guidance_scale is not None
        )
        if len({x for x, _ in points}) > 1:
            svg = chart(f"{name} by guidance scale", [Curve(name, points, "var(--accent)")], "guidance scale")
            panels.append(f'<div class="card swept"><h3>{escape(name)}</h3>{svg}</div>')
    return grid("charts", panels) if panels else ""


def _exhibits(exhibits: Sequence[Example]) -> str:
    """Groups under their titles."""
    groups: dict[str, list[str]] = {}
    for exhibit in exhibits:
        groups.setdefault(exhibit.group, []).append(_card(exhibit))
    body = ""
    for title, items in groups.items():
        rest = items[AT_ONCE:]
        more = folded(f"The other {len(rest)}", grid("wide", rest)) if rest else ""
        body += f"<h3>{escape(title)}</h3>{grid('wide', items[:AT_ONCE])}{more}"
    return body


def _card(exhibit: Example) -> str:
    pictures = "".join(
        f"<figure>{image(pixels, said)}<figcaption>{escape(said)}</figcaption></figure>"
        for pixels, said in exhibit.pictures
    )
    marks = "".join(
        f'<span class="{"yes" if right else "no"}">{escape(asked)}'
        f'<span class="heard">: {"right" if right else "wrong"}</span>'
        f"{escape(f', found {found}') if found and not right else ''}</span>"
        for asked, right, found in exhibit.marks
    )
    shown = f'<div class="pair">{pictures}</div>' if pictures else ""
    return f'<div class="card">{shown}<div>{escape(exhibit.text)}</div><div class="marks">{marks}</div></div>'


def _table(name: str, table: Any) -> str:
    """A named table of rows, the first of which is its head; folded away."""
    head, *rows = table
    cells = "".join(f"<th scope='col'>{escape(str(cell))}</th>" for cell in head)
    lines = ["<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    return folded(name, _scrolled(cells, lines))


def _scrolled(head: str, rows: Sequence[str]) -> str:
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'
