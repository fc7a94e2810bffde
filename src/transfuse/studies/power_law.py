"""Straight lines through logarithms, and how much less one arm needs than another: pure functions of numbers.

    line = fit(points)                      # ln value = intercept + slope * ln cost
    parity(ours, rivals, "lower").ratio     # 0.5: half the cost for the same result

The paper's procedure (Transfusion, section 4.2 and Figure 5): cost is 6 N D, one line for each family, and the ratio is
the cost at which Transfusion's line equals what the largest Chameleon scored, over that Chameleon's cost. `fit` on the
paper's own points gives its ratios (`published.py`, a test).

The paper gives no interval. Here it is that of a relative potency: runs scatter about their arm's line alike in all
arms, and Fieller's theorem gives the costs at which the two could be equal (Finney, Statistical Method in Biological
Assay). Resampling three to seven points instead would be far too sure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .verdicts import student

Better = Literal["higher", "lower"]

LEAST = 3
"""points of different cost, without which no ratio is given: through two a line always fits"""
ALIKE = 1.05
"""costs that are apart by less than this factor are one: seeds of a run, whose documents differ a little in length"""
REACH = 100.0
"""times beyond its points that a line is followed at most"""


@dataclass(frozen=True)
class Point:
    """A run: what it cost, in any unit, and what it scored; label: its name."""

    cost: float
    value: float
    label: str = ""


@dataclass(frozen=True)
class Line:
    """ln value = intercept + slope * ln cost.

    low, high           95 % interval of the slope, Student's; None for fewer costs than `LEAST`
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

    low, high      95 % interval, Fieller's; None where there is none, and why in note
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


def fit(points: Sequence[Point]) -> Line | None:
    """Least squares on the logarithms; None where all points cost about the same, or there are none."""
    if different(points) < 2:
        return None
    cloud = _Cloud.of(points)
    low = high = None
    if different(points) >= LEAST:
        margin = student(different(points) - 2) * math.sqrt(cloud.squares / (len(points) - 2) / cloud.spread)
        low, high = cloud.slope - margin, cloud.slope + margin
    costs = [point.cost for point in points]
    scatter = math.sqrt(cloud.squares / len(points))
    return Line(cloud.slope, cloud.at(0.0), low, high, len(points), scatter, min(costs), max(costs))


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


def reference(points: Sequence[Point]) -> list[Point]:
    """What is to be equalled: the dearest run, or those that cost as much."""
    cost = max((point.cost for point in points), default=0.0)
    return [point for point in points if cost <= point.cost * ALIKE]


def parity(
    ours: Sequence[Point],
    rivals: Sequence[Point],
    better: Better,
    target: Literal["observed", "fitted"] = "observed",
    best: Sequence[Point] | None = None,
) -> Parity:
    """How much of the rival's largest cost is needed for the rival's result there.

    target   observed: as it scored, as the paper's numbers are found; fitted: as the rival's own line has it. The error
             of either is in the interval
    best     the rival's points that are to be equalled, seeds of one run; None: its dearest
    """
    seeds = reference(rivals) if best is None else best
    if not seeds:
        return Parity(None, note="the rival has no point that counts")
    goal, error = middle(seeds), 1 / len(seeds)
    if target == "fitted":
        if different(rivals) < LEAST:
            return Parity(None, note=f"too few points of the rival for a line: {_counted(rivals)}", count=len(ours))
        theirs = _Cloud.of(rivals)
        goal = Point(goal.cost, math.exp(theirs.at(math.log(goal.cost))), goal.label)
        error = theirs.error(math.log(goal.cost))
    known = {"target": goal.value, "cost": goal.cost, "count": len(ours)}
    if different(ours) < LEAST:
        return Parity(None, note=f"too few points: {_counted(ours)}", **known)  # type: ignore[arg-type]
    line = fit(ours)
    assert line is not None
    sign = 1 if better == "higher" else -1
    if line.slope * sign <= 0:
        return Parity(None, note="slope of the wrong sign: more compute does not help", **known)  # type: ignore[arg-type]
    needed = line.cost_of(goal.value)
    if not line.cheapest / REACH <= needed <= line.dearest * REACH:
        note = f"would lie more than {REACH:g} times beyond the points"
        return Parity(None, note=note, extrapolated=True, **known)  # type: ignore[arg-type]
    extrapolated = not line.cheapest <= needed <= line.dearest
    low, high, unsure = _interval(ours, rivals, goal, error)
    notes = []
    if extrapolated:
        side = "cheaper" if needed < line.cheapest else "dearer"
        notes.append(f"extrapolated: {side} than any point ({line.cheapest:.3g} to {line.dearest:.3g})")
    if unsure:
        notes.append(unsure)
    return Parity(
        needed / goal.cost,
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


@dataclass(frozen=True)
class _Cloud:
    """Points in logarithms `x`, `y`, and the line of least squares through them.

    spread    sum of squared distances of x from its mean
    squares   sum of squared distances from the line
    """

    count: int
    x: float
    y: float
    spread: float
    slope: float
    squares: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Cloud:
        x, y = _logarithms(points)
        spread = float(((x - x.mean()) ** 2).sum())
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
        squares = float(((y - y.mean() - slope * (x - x.mean())) ** 2).sum())
        return cls(len(points), float(x.mean()), float(y.mean()), spread, slope, squares)

    def at(self, x: float) -> float:
        return self.y + self.slope * (x - self.x)

    def error(self, x: float) -> float:
        """Variance of the line there, in variances of a point."""
        return 1 / self.count + (x - self.x) ** 2 / self.spread


def _interval(
    ours: Sequence[Point], rivals: Sequence[Point], goal: Point, error: float
) -> tuple[float | None, float | None, str]:
    """Fieller's 95 % of the ratio; or why there is none.

    A cost is in it where the difference between our line and the goal is within Student's margin of its own error. The
    variance of a point is that of all about their own lines; each cost counts once as a degree of freedom, however many
    seeds there are, for seeds share what a law misses. error: variance of the goal, in variances of a point.
    """
    cloud, squares, degrees, free = _Cloud.of(ours), 0.0, 0, 0
    for points in (ours, rivals):
        if different(points) >= LEAST:
            squares += _Cloud.of(points).squares
            degrees += len(points) - 2
            free += different(points) - 2
    margin = student(free) ** 2 * squares / degrees
    away = math.log(goal.value) - cloud.y
    # (away - slope u)^2 <= margin (error + 1 / count + u^2 / spread), with u = ln cost - mean of ln cost
    a = cloud.slope**2 - margin / cloud.spread
    b, c = cloud.slope * away, away**2 - margin * (error + 1 / cloud.count)
    if a <= 0:
        return None, None, f"no interval: the slope ({cloud.slope:.2g}) can not be told from none"
    root = math.sqrt(max(0.0, b * b - a * c))
    low, high = (cloud.x + (b + side * root) / a - math.log(goal.cost) for side in (-1, 1))
    return math.exp(max(low, -700.0)), math.exp(min(high, 700.0)), ""
