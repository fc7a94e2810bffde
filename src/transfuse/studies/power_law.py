"""Straight lines through logarithms, and how much less one arm needs than another: pure functions of numbers.

    line = fit(points)                      # ln value = intercept + slope * ln cost
    parity(ours, rivals, "lower").ratio     # 0.5: half the cost for the same result

The paper's procedure (Transfusion, section 4.2 and Figure 5): cost is 6 N D, one line for each family, and the ratio is
the cost at which Transfusion's line equals what the largest Chameleon scored, over that Chameleon's cost. `fit` on the
paper's own points gives its ratios (`published.py`, a test).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Better = Literal["higher", "lower"]

LEAST = 3
"""points of different cost, without which no ratio is given: through two a line always fits"""
ALIKE = 1.05
"""costs that are apart by less than this factor are one: seeds of a run, whose documents differ a little in length"""
REACH = 100.0
"""times beyond its points that a line is followed at most"""
UNSURE = 0.05
"""share of resamples whose slope has the wrong sign, above which there is no interval"""
DRAWS = 2000


@dataclass(frozen=True)
class Point:
    """A run: what it cost, in any unit, and what it scored; label: its name."""

    cost: float
    value: float
    label: str = ""


@dataclass(frozen=True)
class Line:
    """ln value = intercept + slope * ln cost.

    low, high           95 % interval of the slope over resampled points; None for fewer than `LEAST`
    scatter             root of the mean squared distance of the points, in natural logarithms
    cheapest, dearest   the costs between which the points lie
    """

    slope: float
    intercept: float
    low: float | None
    high: float | None
    count: int
    scatter: float
    cheapest: float
    dearest: float

    def at(self, cost: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(cost))

    def cost_of(self, value: float) -> float:
        """Infinity, or 0, where it is too large, or small, for a float. Raises ZeroDivisionError for a flat line."""
        exponent = (math.log(value) - self.intercept) / self.slope
        return math.exp(exponent) if abs(exponent) < 700 else math.inf if exponent > 0 else 0.0


@dataclass(frozen=True)
class Parity:
    """ratio: the cost that equals the rival's result, over the rival's cost; None where there is none, and why in note.

    low, high      95 % interval over resampled points; None where there is none, and why in note
    extrapolated   the cost lies outside those of our points
    target, cost   the rival's result and what it cost; needed: the cost of the same on our line
    cheapest, dearest   costs of our points; all five are 0 where there is none
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    extrapolated: bool = False
    note: str = ""
    target: float = 0.0
    cost: float = 0.0
    needed: float = 0.0
    cheapest: float = 0.0
    dearest: float = 0.0
    count: int = 0

    def below_one(self) -> Literal["reproduced", "not reproduced", "undecided"]:
        """Whether less is needed than by the rival, as the paper has it of all its measures (Table 3).

        Decided only where the interval lies on one side of 1 and the points bear it out: on the line between them
        the rival's result is reached at less than its cost, or not yet reached at more.
        """
        if self.ratio is None or self.low is None or self.high is None:
            return "undecided"
        if self.high < 1 and self.needed <= self.dearest and self.cheapest < self.cost:
            return "reproduced"
        if self.low > 1 and self.needed >= self.cheapest and self.dearest > self.cost:
            return "not reproduced"
        return "undecided"


@dataclass(frozen=True)
class Bounds:
    """Between which a value says something of the law: above what guessing scores, below what can not be passed."""

    least: float = 0.0
    most: float = math.inf

    def split(self, points: Sequence[Point]) -> tuple[list[Point], list[tuple[Point, str]]]:
        """Points that count, and those that do not, each with the reason. Only positive numbers have logarithms."""
        kept, left_out = [], []
        for point in points:
            if not (math.isfinite(point.value) and point.value > 0 and point.cost > 0):
                left_out.append((point, "not positive"))
            elif point.value < self.least:
                left_out.append((point, f"below {self.least:.4g}"))
            elif point.value > self.most:
                left_out.append((point, f"above {self.most:.4g}"))
            else:
                kept.append(point)
        return kept, left_out


def fit(points: Sequence[Point], draws: int = DRAWS, seed: int = 0) -> Line | None:
    """Least squares on the logarithms; None where all points cost about the same, or there are none."""
    if different(points) < 2:
        return None
    x, y = _logarithms(points)
    slope, intercept = _line(x, y)
    low = high = None
    if draws and different(points) >= LEAST:
        slopes, _ = _resampled(x, y, draws, np.random.default_rng(seed))
        low, high = (float(bound) for bound in np.percentile(slopes, [2.5, 97.5]))
    scatter = float(np.sqrt(np.mean((y - intercept - slope * x) ** 2)))
    costs = [point.cost for point in points]
    return Line(slope, intercept, low, high, len(points), scatter, min(costs), max(costs))


def different(points: Sequence[Point]) -> int:
    """How many different costs there are, those within `ALIKE` of one another counted once."""
    count, last = 0, 0.0
    for cost in sorted(point.cost for point in points):
        if cost > last * ALIKE:
            count, last = count + 1, cost
    return count


def middle(points: Sequence[Point]) -> Point:
    """The geometric mean of cost and of value: what seeds of one run say together."""
    costs, values = _logarithms(points)
    return Point(math.exp(costs.mean()), math.exp(values.mean()), points[0].label)


def reference(points: Sequence[Point]) -> Point | None:
    """What is to be equalled: the dearest run, or the mean of those that cost as much; None for no points."""
    if not points:
        return None
    cost = max(point.cost for point in points)
    return middle([point for point in points if cost <= point.cost * ALIKE])


def parity(
    ours: Sequence[Point],
    rivals: Sequence[Point],
    better: Better,
    target: Literal["observed", "fitted"] = "observed",
    best: Point | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Parity:
    """How much of the rival's largest cost is needed for the rival's result there.

    target   observed: as it scored, as the paper's numbers are found, taken as exact; fitted: as the rival's own line
             has it, which is resampled as well
    best     the rival's point that is to be equalled; None: its dearest
    """
    best = best or reference(rivals)
    if best is None:
        return Parity(None, note="the rival has no point that counts")
    if target == "fitted":
        theirs = fit(rivals, draws=0) if different(rivals) >= LEAST else None
        if theirs is None:
            return Parity(None, note=f"too few points of the rival for a line: {_counted(rivals)}", count=len(ours))
        best = Point(best.cost, theirs.at(best.cost), best.label)
    known = {"target": best.value, "cost": best.cost, "count": len(ours)}
    if different(ours) < LEAST:
        return Parity(None, note=f"too few points: {_counted(ours)}", **known)  # type: ignore[arg-type]
    line = fit(ours, draws=0)
    assert line is not None
    sign = 1 if better == "higher" else -1
    if line.slope * sign <= 0:
        return Parity(None, note="slope of the wrong sign: more compute does not help", **known)  # type: ignore[arg-type]
    needed = line.cost_of(best.value)
    if not line.cheapest / REACH <= needed <= line.dearest * REACH:
        note = f"would lie more than {REACH:g} times beyond the points"
        return Parity(None, note=note, extrapolated=True, **known)  # type: ignore[arg-type]
    extrapolated = not line.cheapest <= needed <= line.dearest
    low, high, unsure = _interval(ours, rivals if target == "fitted" else [], best, sign, draws, seed)
    notes = []
    if extrapolated:
        side = "cheaper" if needed < line.cheapest else "dearer"
        notes.append(f"extrapolated: {side} than any point ({line.cheapest:.3g} to {line.dearest:.3g})")
    if unsure:
        notes.append(unsure)
    return Parity(
        needed / best.cost,
        low,
        high,
        extrapolated,
        "; ".join(notes),
        needed=needed,
        cheapest=line.cheapest,
        dearest=line.dearest,
        **known,  # type: ignore[arg-type]
    )


def _counted(points: Sequence[Point]) -> str:
    return f"expected {LEAST} of different cost, found {different(points)}"


def _logarithms(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    return np.log([point.cost for point in points]), np.log([point.value for point in points])


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return slope, float(y.mean() - slope * x.mean())


def _resampled(
    x: np.ndarray, y: np.ndarray, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts `[draw]` of lines through points drawn with replacement, of two different costs at least.

    Float64 `[draw]`; a resample that is one point, or its seeds, again and again has no line, and is drawn anew.
    """
    chosen = generator.integers(0, len(x), (draws, len(x)))
    while len(alike := np.flatnonzero(np.ptp(x[chosen], axis=1) < math.log(ALIKE))):
        chosen[alike] = generator.integers(0, len(x), (len(alike), len(x)))
    a, b = x[chosen], y[chosen]
    from_mean = a - a.mean(1, keepdims=True)
    slopes = (from_mean * (b - b.mean(1, keepdims=True))).sum(1) / (from_mean**2).sum(1)
    return slopes, b.mean(1) - slopes * a.mean(1)


def _interval(
    ours: Sequence[Point], rivals: Sequence[Point], best: Point, sign: int, draws: int, seed: int
) -> tuple[float | None, float | None, str]:
    """95 % of the ratio over resamples of our points, and of the rival's where its line sets the target; or why not."""
    generator = np.random.default_rng(seed)
    slopes, intercepts = _resampled(*_logarithms(ours), draws, generator)
    target = np.full(draws, math.log(best.value))
    if rivals:
        theirs, at_zero = _resampled(*_logarithms(rivals), draws, generator)
        target = at_zero + theirs * math.log(best.cost)
    right = slopes * sign > 0
    if 1 - right.mean() > UNSURE:
        share = 100 * (1 - right.mean())
        return None, None, f"no interval: in {share:.0f} % of resamples the slope has the wrong sign"
    logs = (target[right] - intercepts[right]) / slopes[right] - math.log(best.cost)
    low, high = np.exp(np.clip(np.percentile(logs, [2.5, 97.5]), -700, 700))
    return float(low), float(high), ""
