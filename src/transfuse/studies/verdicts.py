"""Does a difference point where the paper's does? Paired over seeds, with an interval: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "undecided", "no direction"]

T_97_5 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""quantile 0.975 of Student's t for 1, 2, 3 ... degrees of freedom; beyond the last it is taken, which is wider"""


def student(degrees: int) -> float:
    """The quantile 0.975. degrees: of freedom, 1 at least."""
    return T_97_5[min(degrees, len(T_97_5)) - 1]


@dataclass(frozen=True)
class Difference:
    """mean over seeds, its 95 % interval (None for one seed), and how many seeds."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def verdict(self, expected: float, rounding: float = 0.0) -> Verdict:
        """expected: the paper's difference, which has no direction unless it is larger than rounding may make it.

        Undecided where the interval holds 0, or there is none.
        """
        if abs(expected) <= rounding + 1e-9:
            return "no direction"
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "reproduced" if self.mean * expected > 0 else "not reproduced"


def paired(differences: Sequence[float]) -> Difference:
    """Differences of the same seeds, the Student t interval of their mean. Raises ValueError for none."""
    if not differences:
        raise ValueError("paired: expected differences, found none")
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return Difference(mean, None, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (count - 1))
    margin = student(count - 1) * deviation / math.sqrt(count)
    return Difference(mean, mean - margin, mean + margin, count)


def combined(weights: Mapping[str, float], values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """Weighted sums of rows, for each seed that all of them have: `{"a": -1, "b": 1}` is b - a.

    values   of each row, by seed
    """
    if not all(row in values for row in weights):
        return []
    seeds = set.intersection(*(set(values[row]) for row in weights))
    return [sum(weight * values[row][seed] for row, weight in weights.items()) for seed in sorted(seeds)]
