"""Power laws and parity ratios with intervals, and paired differences with their significance: pure functions.

    line = fit(points)                      # ln value = intercept + slope * ln cost
    parity(ours, baseline, "lower").ratio   # 0.5: half the cost for the same result

The paper's procedure (Transfusion, section 4.2 and Figure 5): cost is 6 N D, each family has one line, and the ratio is
the cost at which Transfusion's line equals the score of the largest Chameleon, over that Chameleon's cost. `fit` on the
paper's own points gives its ratios (`paper_results.py`, a test).

The paper gives no interval. Here it is that of a relative potency: runs scatter equally around the line of either
family, and Fieller's theorem gives the costs at which the two could be equal (Finney, Statistical Method in Biological
Assay). Resampling three to seven points instead would be far too sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

Better = Literal["higher", "lower"]
Significance = Literal["reproduced", "not reproduced", "undecided", "no direction"]

LEAST = 3
"""points of different cost below which no ratio is given: a line always fits two"""
ALIKE = 1.05
"""factor within which costs count as one: seeds of a run, whose documents differ a little in length"""
REACH = 100.0
"""factor by which a line is extrapolated at most"""


def student(degrees: int) -> float:
    """Return the quantile 0.975 of Student's t."""
    return float(stats.t.ppf(0.975, degrees))


# --- paired differences -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A mean over seeds with its 95 % interval (None for one seed)."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def significance(self, expected: float, rounding: float = 0.0) -> Significance:
        """Compare with the paper's difference, which has no direction unless it is larger than its rounding.

        Undecided where the interval contains 0 or there is none.
        """
        if abs(expected) <= rounding + 1e-9:
            return "no direction"
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "reproduced" if self.mean * expected > 0 else "not reproduced"


def paired(differences: Sequence[float]) -> Difference:
    """Return the mean of differences paired by seed with Student's interval. Raises ValueError for none."""
    if not differences:
        raise ValueError("paired: expected differences, found none")
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count < 2:
        return Difference(mean, None, None, count)
    margin = student(count - 1) * float(np.std(differences, ddof=1)) / math.sqrt(count)
    return Difference(mean, mean - margin, mean + margin, count)


def weighted_sums(weights: Mapping[str, float], values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """Return weighted sums of rows for each seed that all have: `{"a": -1, "b": 1}` gives b - a.

    values   of each row, by seed
    """
    if not all(row in values for row in weights):
        return []
    seeds = set.intersection(*(set(values[row]) for row in weights))
    return [sum(weight * values[row][seed] for row, weight in weights.items()) for seed in sorted(seeds)]


# --- power laws -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A run: its cost in any unit, its score, its name."""

    cost: float
    value: float
    label: str = ""


@dataclass(frozen=True)
class Line:
    """The line ln value = intercept + slope * ln cost through `count` points.

    low, high            95 % interval of the slope, Student's; None for fewer than `LEAST` costs
    scatter              root mean square distance of the points, in natural logarithms
    smallest, largest    the range of the points' costs
    """

    slope: float
    intercept: float
    low: float | None
    high: float | None
    count: int
    scatter: float
    smallest: float
    largest: float

    def at(self, cost: float) -> float:
        return math.exp(self.intercept + self.slope * math.log(cost))

    def cost_of(self, value: float) -> float:
        """Return the cost of a value; infinity or 0 beyond a float's range. Raises ZeroDivisionError for slope 0."""
        exponent = (math.log(value) - self.intercept) / self.slope
        return math.exp(exponent) if abs(exponent) < 700 else math.inf if exponent > 0 else 0.0


@dataclass(frozen=True)
class Bounds:
    """The range in which a value says something of a law: better than guessing, below the best possible."""

    least: float = 0.0
    most: float = math.inf

    def split(self, points: Sequence[Point]) -> tuple[list[Point], list[tuple[Point, str]]]:
        """Return the points that count, and the others each with the reason; only positive numbers have logarithms."""
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


@dataclass(frozen=True)
class _Fit:
    """Least squares through points in logarithms: mean point, slope, sums of squares of x and of the residuals."""

    count: int
    x: float
    y: float
    spread: float
    slope: float
    squares: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> _Fit:
        x, y = _logarithms(points)
        spread, slope = float(((x - x.mean()) ** 2).sum()), float(stats.linregress(x, y).slope)
        squares = float(((y - y.mean() - slope * (x - x.mean())) ** 2).sum())
        return cls(len(points), float(x.mean()), float(y.mean()), spread, slope, squares)

    def at(self, x: float) -> float:
        return self.y + self.slope * (x - self.x)

    def variance(self, x: float) -> float:
        """Return the variance of the line at x, in variances of a point."""
        return 1 / self.count + (x - self.x) ** 2 / self.spread


def fit(points: Sequence[Point]) -> Line | None:
    """Return the line of least squares in logarithms; None where fewer than two costs differ."""
    if different(points) < 2:
        return None
    least_squares = _Fit.of(points)
    slope, low, high = least_squares.slope, None, None
    if different(points) >= LEAST:
        variance = least_squares.squares / (len(points) - 2) / least_squares.spread
        margin = student(different(points) - 2) * math.sqrt(variance)
        low, high = slope - margin, slope + margin
    costs = [point.cost for point in points]
    scatter = math.sqrt(least_squares.squares / len(points))
    return Line(slope, least_squares.at(0.0), low, high, len(points), scatter, min(costs), max(costs))


def different(points: Sequence[Point]) -> int:
    """Return the number of different costs; costs within a factor of `ALIKE` count once."""
    count, last = 0, 0.0
    for cost in sorted(point.cost for point in points):
        if cost > last * ALIKE:
            count, last = count + 1, cost
    return count


def geometric_mean(points: Sequence[Point]) -> Point:
    """Return the geometric mean of cost and value: the joint result of the seeds of a run."""
    costs, values = _logarithms(points)
    return Point(math.exp(costs.mean()), math.exp(values.mean()), points[0].label)


def largest(points: Sequence[Point]) -> list[Point]:
    """Return the run of the largest cost, or its seeds."""
    cost = max((point.cost for point in points), default=0.0)
    return [point for point in points if cost <= point.cost * ALIKE]


def _logarithms(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
    return np.log([point.cost for point in points]), np.log([point.value for point in points])


# --- parity -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """The cost at which our line equals the baseline's result, over the baseline's cost.

    ratio               None where there is none; `note` says why
    low, high           95 % interval, Fieller's; None where there is none; `note` says why
    extrapolated        the cost is outside those of our points
    target, cost        the baseline's result and its cost
    needed              the cost of the same result on our line
    smallest, largest   the range of our points' costs, and their `count`
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    extrapolated: bool = False
    note: str = ""
    target: float = 0.0
    cost: float = 0.0
    needed: float = 0.0
    smallest: float = 0.0
    largest: float = 0.0
    count: int = 0

    def is_cheaper(self) -> Significance:
        """Return whether less is needed than by the baseline, as in all measures of the paper's Table 3.

        Decided only if the interval is on one side of 1 and the points confirm it: between them, the baseline's result
        is reached at less than its cost, or not reached at more.
        """
        if self.ratio is None or self.low is None or self.high is None:
            return "undecided"
        if self.high < 1 and self.needed <= self.largest and self.smallest < self.cost:
            return "reproduced"
        if self.low > 1 and self.needed >= self.smallest and self.largest > self.cost:
            return "not reproduced"
        return "undecided"


def parity(
    ours: Sequence[Point],
    baseline: Sequence[Point],
    better: Better,
    target: Literal["observed", "fitted"] = "observed",
    best: Sequence[Point] | None = None,
) -> Parity:
    """Return the part of the baseline's largest cost that we need for its result there.

    target   observed: its score, as in the paper; fitted: the score of its line. The interval contains either's error
    best     the baseline's points to equal, seeds of one run; None: its largest run
    """
    seeds = largest(baseline) if best is None else best
    if not seeds:
        return Parity(None, note="the baseline has no point that counts")
    goal, variance = geometric_mean(seeds), 1 / len(seeds)
    if target == "fitted":
        if different(baseline) < LEAST:
            note = f"too few points of the baseline for a line: {_too_few(baseline)}"
            return Parity(None, note=note, count=len(ours))
        their_fit, at = _Fit.of(baseline), math.log(goal.cost)
        goal, variance = Point(goal.cost, math.exp(their_fit.at(at)), goal.label), their_fit.variance(at)
    partial = Parity(None, target=goal.value, cost=goal.cost, count=len(ours))
    line = fit(ours)
    if line is None or different(ours) < LEAST:
        return replace(partial, note=f"too few points: {_too_few(ours)}")
    if line.slope * (1 if better == "higher" else -1) <= 0:
        return replace(partial, note="slope of the wrong sign: more compute does not help")
    needed = line.cost_of(goal.value)
    if not line.smallest / REACH <= needed <= line.largest * REACH:
        return replace(partial, note=f"would be more than {REACH:g} times beyond the points", extrapolated=True)
    extrapolated, notes = not line.smallest <= needed <= line.largest, []
    if extrapolated:
        side = "cheaper" if needed < line.smallest else "more expensive"
        notes.append(f"extrapolated: {side} than any point ({line.smallest:.3g} to {line.largest:.3g})")
    low, high = _fieller(ours, baseline, goal, variance)
    if low is None:
        notes.append(f"no interval: the slope ({line.slope:.2g}) cannot be distinguished from 0")
    return replace(
        partial,
        ratio=needed / goal.cost,
        low=low,
        high=high,
        extrapolated=extrapolated,
        note="; ".join(notes),
        needed=needed,
        smallest=line.smallest,
        largest=line.largest,
    )


def _too_few(points: Sequence[Point]) -> str:
    return f"expected {LEAST} of different cost, found {different(points)}"


def _fieller(
    ours: Sequence[Point], baseline: Sequence[Point], goal: Point, variance: float
) -> tuple[float | None, float | None]:
    """Return Fieller's 95 % interval of the ratio; None where our slope cannot be distinguished from 0.

    A cost is inside if the difference between our line and the goal is within Student's margin of its error. The
    variance of a point is pooled over both lines; each cost counts once as a degree of freedom, however many seeds it
    has, because seeds share what a law misses. variance: that of the goal, in variances of a point.
    """
    our_fit, squares, degrees, free = _Fit.of(ours), 0.0, 0, 0
    for points in (ours, baseline):
        if different(points) >= LEAST:
            squares += _Fit.of(points).squares
            degrees += len(points) - 2
            free += different(points) - 2
    margin = student(free) ** 2 * squares / degrees
    away = math.log(goal.value) - our_fit.y
    # (away - slope u)^2 <= margin (variance + 1 / count + u^2 / spread), with u = ln cost - mean of ln cost
    a = our_fit.slope**2 - margin / our_fit.spread
    b, c = our_fit.slope * away, away**2 - margin * (variance + 1 / our_fit.count)
    if a <= 0:
        return None, None
    root = math.sqrt(max(0.0, b * b - a * c))
    low, high = (our_fit.x + (b + side * root) / a - math.log(goal.cost) for side in (-1, 1))
    return math.exp(max(low, -700.0)), math.exp(min(high, 700.0))
