"""Curves and gauges as inline SVG: no scripts, colours from the page's style, so light and dark come for free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 40


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in order; colour: any CSS colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def chart(title: str, curves: Sequence[Curve], x_label: str, logarithmic: bool = False) -> str:
    """An SVG of curves with axes, "" where none has two points to show. `logarithmic`: the y axis, positive values."""
    curves = [curve for curve in curves if len(curve.points) > 1]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points if y > 0 or not logarithmic]
    if not ys:
        return ""
    low, high = _bounds(ys, logarithmic)
    scale = math.log10 if logarithmic else float
    right_most = max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        up = (scale(max(y, low)) - scale(low)) / (scale(high) - scale(low))
        return LEFT + (WIDTH - LEFT - RIGHT) * x / right_most, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [_opened(title)]
    for y in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        _, at = place(0, y)
        parts.append(_level(at, f"{y:.6g}"))
    for x in _ticks(0, right_most):
        at, _ = place(x, high)
        parts.append(_below(at, f"{x:.6g}"))
    parts.append(_axis(x_label))
    for curve in curves:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(x, y) for x, y in curve.points))
        parts.append(f'<polyline class="curve" style="stroke:{curve.colour}" points="{points}"/>')
    return "".join([*parts, "</svg>"])


def shade(number: int, count: int) -> str:
    """Colour of one of `count` ordered curves, from the page's calm colour to its warm one: what `ramp` explains."""
    warm = round(100 * number / max(1, count - 1))
    return f"color-mix(in oklch, var(--accent) {100 - warm}%, var(--warm))"


def ramp(first: str, last: str) -> str:
    """The legend of ordered curves: what the two ends of the colours mean."""
    return f'<div class="ramp"><span>{escape(first)}</span><i></i><span>{escape(last)}</span></div>'


def gauge(value: float, low: float, high: float, chance: float, reference: float) -> str:
    """Return a bar from 0 to 1 with the value, its interval, and marks for chance and a reference."""

    def mark(at: float, name: str) -> str:
        x = 2 + 196 * at
        return f'<line class="{name}" x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="19"/>'

    return (
        '<svg class="gauge" viewBox="0 0 200 22" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" x="2" y="8" width="196" height="6" rx="3"/>'
        f'<rect class="fill" x="2" y="8" width="{196 * value:.1f}" height="6" rx="3"/>'
        f'<rect class="band" x="{2 + 196 * low:.1f}" y="5" width="{max(1.5, 196 * (high - low)):.1f}" height="12"/>'
        f"{mark(chance, 'chance')}{mark(reference, 'ceiling')}</svg>"
    )


def _opened(title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'


def _level(at: float, said: str) -> str:
    """A line across at a height, and what it stands for."""
    return (
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{said}</text>'
    )


def _below(at: float, said: str) -> str:
    """What a place along the lower edge stands for."""
    anchor = "end" if at > WIDTH - RIGHT - 12 else "middle"
    return f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 21}" text-anchor="{anchor}">{said}</text>'


def _axis(said: str) -> str:
    """What the lower edge counts."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(said)}</text>'


def _bounds(ys: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """The range of the y axis. One early spike must not flatten all else: a linear axis starts at 0."""
    low, high = min(ys), max(ys)
    if logarithmic:
        return low / 1.15, high * 1.15
    return min(0.0, low), max(0.0, high) * 1.05 or 1.0


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers across a range."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    if high / low < 5:
        return _ticks(low, high, 4)  # of a decade's round numbers too few would lie within
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1,) if high / low > 300 else (1, 3) if high / low > 20 else (1, 2, 5)
    return [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]


def histogram(title: str, values: Sequence[float], x_label: str, mark: float | None = None) -> str:
    """An SVG of how many values lie between round numbers, in about twenty bars; a line at `mark`; "" for no value.

    Bars of whole numbers hold one or more: narrower ones would leave gaps. Ticks are in the middle of a number.
    """
    if not len(values):
        return ""
    least, most = min(values), max(values)
    if most - least < 1e-6 * max(1.0, abs(most)):
        least, most = least - 0.5, most + 0.5
    first, second = _ticks(least, most, 20)[:2]
    step = second - first
    whole = all(value == int(value) for value in values)
    if whole:
        step = max(1.0, step)  # 1, 2 or 5 times a power of ten
    start = math.floor(least / step + 1e-9)
    bars = [0] * (math.floor(most / step + 1e-9) + 1 - start)
    for value in values:
        bars[min(len(bars) - 1, max(0, math.floor(value / step + 1e-9) - start))] += 1
    low, high, tallest = start * step, (start + len(bars)) * step, max(bars)
    base = HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - low) / (high - low)

    def up(count: float) -> float:
        return base - (base - TOP) * count / (1.05 * tallest)

    parts = [_opened(title)]
    for count in (tick for tick in _ticks(0, tallest) if abs(tick - round(tick)) < 1e-9):
        at = up(count)
        parts.append(_level(at, f"{count:.6g}"))
    for number, count in enumerate(bars):
        if not count:
            continue
        left, right = low + number * step, low + (number + 1) * step
        parts.append(
            f'<rect class="fill" x="{across(left) + 0.75:.1f}" width="{across(right) - across(left) - 1.5:.1f}" '
            f'y="{up(count):.1f}" height="{base - up(count):.1f}">'
            f"<title>{left:.6g} to {right:.6g}: {count}</title></rect>"
        )
    middle = 0.5 if whole else 0.0  # of a number that takes the stretch up to the next
    for x in _ticks(low, high):
        if whole and (x != int(x) or x == high):
            continue
        at = across(x + middle)
        parts.append(_below(at, f"{x:.6g}"))
    if mark is not None:
        at = across(mark + middle)
        parts.append(f'<line class="ceiling" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{base}"/>')
    return "".join([*parts, _axis(x_label), "</svg>"])


@dataclass(frozen=True)
class Series:
    """Runs of one arm: points (x, y, low, high), those that do not count, and a fitted line by its two ends."""

    name: str
    colour: str
    points: Sequence[tuple[float, float, float, float]]
    left_out: Sequence[tuple[float, float]] = ()
    line: tuple[tuple[float, float], tuple[float, float]] | None = None


def log_log(title: str, series: Sequence[Series], x_label: str) -> str:
    """An SVG with both axes logarithmic, as the paper's Figure 5; hollow: left out of the line. "" without a point.

    All numbers must be positive.
    """
    xs = [point[0] for one in series for point in [*one.points, *one.left_out]]
    ys = [point[1] for one in series for point in [*one.points, *one.left_out]]
    if not xs:
        return ""
    (left, right), (low, high) = ((min(values) / 1.2, max(values) * 1.2) for values in (xs, ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = math.log(x / left) / math.log(right / left), math.log(y / low) / math.log(high / low)
        return LEFT + (WIDTH - LEFT - RIGHT) * across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    parts = [_opened(title)]
    for y in _log_ticks(low, high):
        _, at = place(left, y)
        parts.append(_level(at, f"{y:.6g}"))
    for x in _log_ticks(left, right):
        at, _ = place(x, low)
        parts.append(_below(at, f"{x:.2g}"))
    parts.append(_axis(x_label))
    for one in series:
        colour = f"stroke:{one.colour}"
        if one.line is not None:
            ends = [(x, min(high, max(low, y))) for x, y in one.line]
            (x1, y1), (x2, y2) = (place(*end) for end in ends)
            parts.append(
                f'<line class="curve" style="{colour}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
            )
        for x, y, least, most in one.points:
            at, above = place(x, y)
            ends_y = [place(x, min(high, max(low, bound)))[1] for bound in (least, most)]
            parts.append(
                f'<line class="curve" style="{colour}" x1="{at:.1f}" x2="{at:.1f}" y1="{ends_y[0]:.1f}" '
                f'y2="{ends_y[1]:.1f}"/><circle cx="{at:.1f}" cy="{above:.1f}" r="3" style="fill:{one.colour}">'
                f"<title>{escape(one.name)}: {x:.3g}, {y:.4g}</title></circle>"
            )
        for x, y in one.left_out:
            at, above = place(x, y)
            parts.append(f'<circle class="curve" style="{colour}" cx="{at:.1f}" cy="{above:.1f}" r="3"/>')
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """What the colours mean."""
    items = "".join(f'<li><i style="background:{one.colour}"></i>{escape(one.name)}</li>' for one in series)
    return f'<ul class="legend">{items}</ul>'


def standalone(svg: str, series: Sequence[Series]) -> str:
    """A chart as a file of its own, on white, with its legend below."""
    body = svg.partition(">")[2].removesuffix("</svg>")
    title = svg.partition('aria-label="')[2].partition('"')[0]
    style = (
        "svg { --ink: #22262b; --soft: #626a73; --line: #e6e2da; --accent: #17706a; --warm: #c2602f; "
        "font-family: system-ui, sans-serif; background: #fff; } .rule { stroke: var(--line); } "
        ".tick { fill: var(--soft); font-size: 12.5px; } .curve { fill: none; stroke-width: 1.8; } "
        ".title { fill: var(--ink); font-size: 14px; font-weight: 600; }"
    )
    rows = []
    for number, one in enumerate(series):
        y = HEIGHT + 14 + 18 * number
        rows.append(f'<circle cx="{LEFT + 6}" cy="{y - 4}" r="4" style="fill:{one.colour}"/>')
        rows.append(f'<text class="tick" x="{LEFT + 18}" y="{y}">{escape(one.name)}</text>')
    height = HEIGHT + 24 + 18 * len(series)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -24 {WIDTH} {height + 24}" width="{2 * WIDTH}" role="img">'
        f"<title>{title}</title><style>{style}</style>"
        f'<rect x="0" y="-24" width="{WIDTH}" height="{height + 24}" fill="#fff"/>'
        f'<text class="title" x="8" y="-8">{title}</text>{body}{"".join(rows)}</svg>\n'
    )
