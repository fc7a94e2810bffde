"""Charts as SVG, drawn by matplotlib in the pages' style; it is the extra `report`.

Without matplotlib, `line_chart` and `histogram` return "" and a page says in the chart's place how to install it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, WARM, VIOLET, SOFT, INK, LINE = "#17706a", "#c2602f", "#6a5acd", "#626a73", "#22262b", "#e2ddd3"
"""colours of charts; on a page they follow its theme"""
_THEME = {ACCENT: "accent", WARM: "warm", VIOLET: "violet", SOFT: "soft", INK: "ink", LINE: "line"}


@cache
def has_charts() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def new_chart(x_label: str, y_label: str = "") -> tuple[Figure, Axes]:
    """Return an empty chart in the pages' style; `svg_of` makes its SVG. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=SOFT)
    axes.set_ylabel(y_label, color=SOFT)
    axes.tick_params(which="both", colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg_of(figure: Figure, standalone: bool = False) -> str:
    """Return a chart as SVG: transparent and in the page's colours, or `standalone` on white as a separate file."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transfuse"}):
        figure.savefig(stream, format="svg", transparent=not standalone, metadata={"Date": None})
    svg = stream.getvalue()
    if standalone:
        return svg
    # Inside a page, namespaces are implied, fonts are the page's, a style element would apply to the whole page, and
    # ids of groups would be repeated by the next chart; those of clip paths and markers are hashes of their content.
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    for part in (r' xmlns(:xlink)?="[^"]*"', "<metadata>.*?</metadata>", "<style.*?</style>", " font-family: [^;]*;"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, name in _THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def standing_alone(chart: str) -> str:
    """Return a page's chart with the light theme's colours, for a notebook, which has no theme; "" as it is."""
    colours = ";".join(f"--{name}:{colour}" for colour, name in _THEME.items())
    return chart.replace("<svg", f'<svg style="{colours};background:white"', 1)


def line_chart(
    curves: Sequence[tuple[str, Sequence[tuple[float, float]], str]], x_label: str, logarithmic: bool = False
) -> str:
    """Return an SVG of curves (name, points, colour); "" without matplotlib or with fewer than two points.

    A linear y axis starts at 0. `logarithmic` leaves out values that are not positive.
    """
    curves = [(name, [(x, y) for x, y in points if y > 0 or not logarithmic], at) for name, points, at in curves]
    curves = [curve for curve in curves if len(curve[1]) > 1]
    if not curves or not has_charts():
        return ""
    figure, axes = new_chart(x_label)
    for name, points, colour in curves:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=name)
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize="small", ncols=2)
    return svg_of(figure)


def histogram(values: Sequence[float] | np.ndarray, x_label: str) -> str:
    """Return an SVG of how often values occur, in at most 30 bars, with a line at their mean; "" without matplotlib.

    A bar of whole numbers holds as many of them as every other bar.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not has_charts():
        return ""
    edges: Any = 20
    if (values == np.floor(values)).all():
        step = max(1, int(np.ceil((values.max() - values.min() + 1) / 30)))
        edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5
    figure, axes = new_chart(x_label)
    axes.hist(values, bins=edges, color=ACCENT, rwidth=0.9)
    axes.axvline(float(values.mean()), color=INK, linewidth=1.4)
    return svg_of(figure)
