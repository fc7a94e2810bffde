"""Several sources as one stream. Weights are of *positions*: the paper's 1 : 1 is text tokens to image patches."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from ..sequence import Document, SequenceFormat
from .sources import Source, mean_length

PATTERNS = (1_000, 10_000, 100_000)
"""samples after which the order of sources repeats: the first in which each source has `PLACES`, or the last"""
PLACES = 100  # of a source in a pattern: then its share is right to 1 in 200


@dataclass(frozen=True)
class MixtureComponent:
    """A source in a mixture.

    source: None for a source whose samples are left out: `Mixture.document` returns None in its places.
    weight: share of all positions (or of samples: see `Mixture`), relative to the other components.
    epochs: passes after which it is used up, and the others take its place; None: no limit.
    anneal_weight: its weight in the last stretch of a run; None: unchanged.
    epoch: documents in a pass over a source that is left out; None: it never ends.
    """

    source: Source | None
    weight: float
    epochs: float | None = None
    anneal_weight: float | None = None
    epoch: int | None = None

    @property
    def limit(self) -> float:
        """The number of documents it has in all. Raises UserError for epochs of a source that never ends."""
        if self.epochs is None:
            return math.inf
        epoch = self.epoch if self.source is None else self.source.epoch
        if epoch is None:
            name = "pictures" if self.source is None else self.source.name
            raise UserError(f"data.sources: {name}: expected no epochs, for it never ends, found {self.epochs:g}")
        return max(1, round(self.epochs * epoch))


class Phase:
    """A stretch of the stream with constant weights.

    start: its first sample. done: documents of each source used before it, int64 `[source]`. shares: of each source,
    float `[source]`, of the samples. pattern: the source of each sample, int64 `[place]`, again and again.

    Sources take turns as evenly as whole numbers allow, so that every stretch of the stream is mixed alike. Raises
    UserError for a share too small for a pattern.
    """

    def __init__(self, start: int, done: np.ndarray, shares: np.ndarray) -> None:
        self.start, self.done = start, done
        shares = shares / shares.sum()
        least = float(shares[shares > 0].min())
        length = next((length for length in PATTERNS if least * length >= PLACES), PATTERNS[-1])
        if least * length < 1:
            raise UserError(
                f"data.sources: expected each to be at least one of {length:,} samples, found one that is {least:.2g} "
                "of them; another data.text_share, or weight, changes that"
            )
        credit = np.zeros(len(shares))
        self.pattern = np.empty(length, dtype=np.int64)
        for place in range(length):
            credit += shares
            self.pattern[place] = credit.argmax()
            credit[self.pattern[place]] -= 1
        chosen = self.pattern[:, None] == np.arange(len(shares))
        self.per_pattern = chosen.sum(0)
        self.before = chosen.cumsum(0) - chosen

    def place(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample, by number, and which of its documents it is."""
        turn, place = divmod(sample - self.start, len(self.pattern))
        number = int(self.pattern[place])
        used = int(self.done[number])
        return number, used + turn * int(self.per_pattern[number]) + int(self.before[place, number])

    def reaches(self, number: int, index: int) -> float:
        """Return the first sample that would be document `index` of a source, or infinity."""
        if not self.per_pattern[number]:
            return math.inf
        turn, rest = divmod(index - int(self.done[number]), int(self.per_pattern[number]))
        return self.start + turn * len(self.pattern) + int(np.flatnonzero(self.pattern == number)[rest])

    def done_at(self, sample: int) -> np.ndarray:
        """Return the documents of each source used before a sample."""
        turn, place = divmod(sample - self.start, len(self.pattern))
        return self.done + turn * self.per_pattern + self.before[place]


class Mixture:
    """The stream: which source sample i comes from, and which of its documents it is, as a function of i alone.

    form: weights are shares of positions under it, found from each source's mean length; None: shares of samples, so
    that sample i is the same whatever an image is made of. anneal_from: the sample from which anneal weights count.
    end: the number of samples until every source is used up.

    Raises UserError for epochs of a source that never ends, or a share too small to keep.
    """

    def __init__(
        self, components: Sequence[MixtureComponent], form: SequenceFormat | None, anneal_from: int | None = None
    ) -> None:
        weights = [part.weight for part in components]
        if not components or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights: expected one non-negative number per source, found {weights}")
        if form is not None and any(part.source is None for part in components):
            raise ValueError("sources: expected all where weights are shares of positions, found one left out")
        self.components = list(components)
        self._form = form
        self._means = np.ones(len(components)) if form is None else self._mean_lengths(form)
        self.limits = [part.limit for part in components]
        self.plan(anneal_from)

    def plan(self, anneal_from: int | None) -> None:
        """Divide the stream into phases: each lasts until a source is used up, or the anneal weights begin."""
        self.phases: list[Phase] = []
        self.end: float = math.inf
        start, done, annealed = 0, np.zeros(len(self.components), dtype=np.int64), False
        while True:
            annealed = annealed or (anneal_from is not None and start >= anneal_from)
            weights = [
                part.anneal_weight if annealed and part.anneal_weight is not None else part.weight
                for part in self.components
            ]
            weights = [weight if done[i] < self.limits[i] else 0.0 for i, weight in enumerate(weights)]
            if not sum(weights):
                self.end = start
                break
            phase = Phase(start, done, np.array(weights) / self._means)
            self.phases.append(phase)
            ends = [phase.reaches(i, int(limit)) for i, limit in enumerate(self.limits) if limit < math.inf]
            ends += [anneal_from] if anneal_from is not None and not annealed else []
            end = min(ends, default=math.inf)
            if end == math.inf:
                break
            start, done = int(end), phase.done_at(int(end))
        self._starts = [phase.start for phase in self.phases]

    def mean_positions(self, form: SequenceFormat) -> list[float]:
        """Return the mean positions of a sample in each phase, by the mean lengths of its sources."""
        means = self._means if form == self._form else self._mean_lengths(form)
        return [float(phase.per_pattern @ means) / len(phase.pattern) for phase in self.phases]

    def samples_in(self, positions: float, form: SequenceFormat) -> int:
        """Return the number of samples that take this many positions, by the mean lengths of their sources."""
        count = 0.0
        ends = [*self._starts[1:], math.inf]
        for phase, end, mean in zip(self.phases, ends, self.mean_positions(form), strict=True):
            count = phase.start + positions / max(mean, 1e-9)  # 0 where only samples that are left out remain
            if count <= end:
                break
            positions -= (end - phase.start) * mean
        return int(count)

    def document(self, sample: int) -> Document | None:
        """Return a sample of the stream; None for one that is left out. Raises UserError past the end."""
        number, index = self._place(sample)
        source = self.components[number].source
        return None if source is None else replace(source.document(index, sample), source=source.name)

    def lengths(self, samples: Sequence[int], form: SequenceFormat) -> np.ndarray:
        """Return the positions of samples, int64 `[n]`; 0 for those that are left out."""
        numbers, indices = np.array([self._place(sample) for sample in samples]).T
        lengths = np.zeros(len(samples), dtype=np.int64)
        for number, part in enumerate(self.components):
            chosen = numbers == number
            if part.source is not None and chosen.any():
                lengths[chosen] = part.source.lengths(indices[chosen], np.asarray(samples)[chosen], form)
        return lengths

    def _mean_lengths(self, form: SequenceFormat) -> np.ndarray:
        sources = [part.source for part in self.components]
        return np.array([0.0 if source is None else mean_length(source, form) for source in sources])

    def _place(self, sample: int) -> tuple[int, int]:
        if sample >= self.end:
            raise UserError(
                f"data.sources: expected one that does not end, found all used up after {int(self.end)} samples; allow "
                "more epochs, or ask for fewer steps"
            )
        return self.phases[bisect_right(self._starts, sample) - 1].place(sample)
