"""How sure a measured number is: bootstrap intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

AT_ONCE = 1 << 22
"""items that are drawn at once: a bound on memory"""
CORRECTED = ", corrected"
"""ends the names of numbers from which the judge's own errors have been taken out"""


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` items with its 95 % interval, `low` to `high`."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(
    totals: Sequence[float] | np.ndarray,
    counts: Sequence[float] | np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """`sum(totals) / sum(counts)` over items (counts: all 1 unless given), and the percentile interval over resamples.

    Raises ValueError for no items, or lengths that differ.
    """
    sums = np.asarray(totals, dtype=np.float64)
    weights = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    if sums.ndim != 1 or not len(sums) or weights.shape != sums.shape:
        raise ValueError(f"bootstrap: expected items and as many counts, found {sums.shape} and {weights.shape}")
    means = resampled(np.stack([sums, weights], axis=1), lambda found: found[:, 0] / found[:, 1], draws, seed)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(sums.sum() / weights.sum()), float(low), float(high), len(sums))


def resampled(
    items: np.ndarray, measure: Callable[[np.ndarray], np.ndarray], draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """A measure of sums, `[draw, column] -> [draw]`, over resamples of items float64 `[item, column]`: `[draw]`."""
    generator = np.random.default_rng(seed)
    found = []
    at_once = max(1, AT_ONCE // len(items))
    for start in range(0, draws, at_once):
        chosen = generator.integers(0, len(items), (min(at_once, draws - start), len(items)))
        found.append(measure(np.stack([column[chosen].sum(1) for column in items.T], axis=1)))
    return np.concatenate(found)


def share(hits: Sequence[bool] | np.ndarray) -> Estimate:
    """The share of hits in [0, 1] with its interval.

    Where all items agree a bootstrap would claim certainty; the "rule of three" says how far the truth may still be.
    """
    found = bootstrap(np.asarray(hits, dtype=np.float64))
    margin = min(1.0, 3 / found.count)
    if found.value == 0:
        return Estimate(0.0, 0.0, margin, found.count)
    if found.value == 1:
        return Estimate(1.0, 1 - margin, 1.0, found.count)
    return found


def corrected(*tasks: tuple[np.ndarray, np.ndarray, np.ndarray], draws: int = 2000, seed: int = 0) -> Estimate:
    """The share right if the judge made no errors, the mean over tasks.

    Each task gives the judge's verdicts bool `[picture]` on what is judged, on pictures that are right, and on pictures
    that are wrong (none: it is taken to know a wrong one). The interval is over resamples of all three.
    """
    tasks = tuple((found, right, wrong if len(wrong) else np.zeros(1, bool)) for found, right, wrong in tasks)
    generator = np.random.default_rng(seed)

    def estimate(found: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        return np.clip((found - wrong) / np.maximum(right - wrong, 1e-9), 0, 1)

    value = float(np.mean([estimate(*(column.mean() for column in task)) for task in tasks]))
    # Resampling says nothing of a share that is 0 or 1: half an item more on each side, as Agresti & Coull have it.
    means = [
        estimate(*(generator.binomial(len(c), (c.sum() + 0.5) / (len(c) + 1), draws) / len(c) for c in task))
        for task in tasks
    ]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return Estimate(value, min(value, float(low)), max(value, float(high)), sum(len(found) for found, _, _ in tasks))


def agreement_by_chance(wanted: Sequence[Hashable]) -> float:
    """How often an answer to another, random item would be right: what good answers to no question score."""
    return sum((count / len(wanted)) ** 2 for count in Counter(wanted).values())
