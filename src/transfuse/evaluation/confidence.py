"""Estimates with 95 % intervals: the bootstrap, shares, and shares corrected for the errors of a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

CORRECTED = ", corrected"  # the suffix of numbers from which the judge's errors are taken out
DRAWS = 2000  # resamples of an interval


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` items with its 95 % interval, `low` to `high`."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(
    totals: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray | None = None, at_once: int = 1 << 22
) -> Estimate:
    """Return `sum(totals) / sum(counts)` over items (counts default to 1), with the percentile interval of resamples.

    at_once   items resampled at once; bounds memory and changes no number

    Raises ValueError for no items, or lengths that differ.
    """
    sums = np.asarray(totals, dtype=np.float64)
    weights = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    if sums.ndim != 1 or not len(sums) or weights.shape != sums.shape:
        raise ValueError(f"bootstrap: expected items and as many counts, found {sums.shape} and {weights.shape}")
    items = np.stack([sums, weights], axis=1)
    means = resampled(items, lambda sums: sums[:, 0] / sums[:, 1], at_once)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(sums.sum() / weights.sum()), float(low), float(high), len(sums))


def resampled(items: np.ndarray, measure: Callable[[np.ndarray], np.ndarray], at_once: int = 1 << 22) -> np.ndarray:
    """Return `measure` of the sums of resampled items: items `[item, column]`, result `[draw]`."""
    generator, values = np.random.default_rng(0), []
    step = max(1, at_once // len(items))
    for start in range(0, DRAWS, step):
        chosen = generator.integers(0, len(items), (min(step, DRAWS - start), len(items)))
        values.append(measure(np.stack([column[chosen].sum(1) for column in items.T], axis=1)))
    return np.concatenate(values)


def share(hits: Sequence[bool] | np.ndarray) -> Estimate:
    """Return the share of hits in [0, 1] with its interval.

    Where all items agree, a bootstrap would claim certainty: the "rule of three" bounds the share instead.
    """
    estimate = bootstrap(np.asarray(hits, dtype=np.float64))
    margin = min(1.0, 3 / estimate.count)
    if estimate.value == 0:
        return Estimate(0.0, 0.0, margin, estimate.count)
    if estimate.value == 1:
        return Estimate(1.0, 1 - margin, 1.0, estimate.count)
    return estimate


def corrected(*tasks: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Estimate:
    """Return the share that would be right if the judge made no errors, as a mean over tasks.

    Each task gives the judge's verdicts bool `[image]` on the images under test, on right ones and on wrong ones
    (none: the judge is assumed to refuse all wrong ones). The interval is over resamples of all three.
    """
    tasks = tuple((judged, right, wrong if len(wrong) else np.zeros(1, bool)) for judged, right, wrong in tasks)
    generator = np.random.default_rng(0)

    def estimate(judged: np.ndarray, right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
        return np.clip((judged - wrong) / np.maximum(right - wrong, 1e-9), 0, 1)

    value = float(np.mean([estimate(*(column.mean() for column in task)) for task in tasks]))
    # Resampling cannot vary a share of 0 or 1: add half an item on each side (Agresti & Coull).
    means = [
        estimate(*(generator.binomial(len(c), (c.sum() + 0.5) / (len(c) + 1), DRAWS) / len(c) for c in task))
        for task in tasks
    ]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return Estimate(value, min(value, float(low)), max(value, float(high)), sum(len(judged) for judged, _, _ in tasks))


def agreement_by_chance(wanted: Sequence[Hashable]) -> float:
    """Return the chance that the answer to a random item is right for another one."""
    return sum((count / len(wanted)) ** 2 for count in Counter(wanted).values())
