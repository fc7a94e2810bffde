"""Several sources as one stream. Mixed in *tokens*: the paper's 1 : 1 is text tokens against image patches."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from ..sequence import Document, SequenceFormat
from .sources import Measured, Source

PATTERNS = (1_000, 10_000, 100_000)
"""samples after which the order of sources repeats: the first number in which each has `PLACES`, or the last"""
PLACES = 100
"""of a source in a pattern: then its share is right to 1 in 200"""
SAMPLED = 2_000
"""documents measured of a source that never ends"""
MOST_MEASURED = 100_000
"""documents measured of a source that does not know its lengths"""


@dataclass(frozen=True)
class Ingredient:
    """A source in a mixture. None stands for one whose samples are left out: `document` gives None in its places.

    share    of all positions (or of samples: see Mixture), relative to the others'
    epochs   after so many passes it is used up, and the others take its place; None: it goes on
    final    its share in the last stretch of a run; None: as before
    epoch    documents in a pass of one that is left out: it is used up when it would be; None: it would go on
    """

    source: Source | None
    share: float
    epochs: float | None = None
    final: float | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of the stream in which the shares stay: from sample `start`, with `done` documents of each source used.

    pattern   number of the source of each of some samples, again and again
    """

    start: int
    done: np.ndarray
    pattern: np.ndarray
    per_pattern: np.ndarray
    before: np.ndarray

    def place(self, sample: int) -> tuple[int, int]:
        """Number of the source of a sample, and which of its documents it is."""
        turn, place = divmod(sample - self.start, len(self.pattern))
        number = int(self.pattern[place])
        used = int(self.done[number])
        return number, used + turn * int(self.per_pattern[number]) + int(self.before[place, number])

    def reaches(self, number: int, index: int) -> float:
        """The first sample that would be document `index` of a source, or infinity."""
        if not self.per_pattern[number]:
            return math.inf
        turn, rest = divmod(index - int(self.done[number]), int(self.per_pattern[number]))
        return self.start + turn * len(self.pattern) + int(np.flatnonzero(self.pattern == number)[rest])

    def done_at(self, sample: int) -> np.ndarray:
        """Documents of each source used before a sample."""
        turn, place = divmod(sample - self.start, len(self.pattern))
        return self.done + turn * self.per_pattern + self.before[place]


class Mixture:
    """Sample i of the stream, a function of i alone: which source it comes from, and which of its documents.

    Shares are of all positions under `grammar`: shares of samples follow from each source's mean length. Where grammar
    is None they are of samples: then sample i is the same whatever a picture is made of.
    final_from: the sample from which final shares count, if any.

    Sources take turns as evenly as whole numbers allow, so that every stretch of the stream is mixed alike.
    """

    def __init__(
        self, ingredients: Sequence[Ingredient], grammar: SequenceFormat | None, final_from: int | None = None
    ) -> None:
        shares = [part.share for part in ingredients]
        if not ingredients or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"shares: expected one non-negative number per source, found {shares}")
        if grammar is not None and any(part.source is None for part in ingredients):
            raise ValueError("sources: expected all where shares are of positions, found one left out")
        self.ingredients = list(ingredients)
        self._grammar = grammar
        self._means = np.ones(len(ingredients)) if grammar is None else self._mean_lengths(grammar)
        self.limits = [_limit(part) for part in ingredients]
        self.plan(final_from)

    def plan(self, final_from: int | None) -> None:
        """Divide the stream into phases: each lasts until a source is used up, or the final shares begin."""
        self.phases: list[Phase] = []
        self.end: float = math.inf
        """samples there are, until every source is used up"""
        self._add_phases(final_from)
        self._starts = [phase.start for phase in self.phases]

    def mean_positions(self, grammar: SequenceFormat) -> list[float]:
        """Mean positions of a sample in each phase, by the mean lengths of its sources."""
        means = self._means if grammar == self._grammar else self._mean_lengths(grammar)
        return [float(phase.per_pattern @ means) / len(phase.pattern) for phase in self.phases]

    def samples_in(self, positions: float, grammar: SequenceFormat) -> int:
        """The number of samples that take so many positions."""
        count = 0.0
        ends = [*self._starts[1:], math.inf]
        for phase, end, mean in zip(self.phases, ends, self.mean_positions(grammar), strict=True):
            count = phase.start + positions / max(mean, 1e-9)  # 0 where only samples that are left out remain
            if count <= end:
                break
            positions -= (end - phase.start) * mean
        return int(count)

    def _mean_lengths(self, grammar: SequenceFormat) -> np.ndarray:
        """Mean positions of each source's documents, 0 of one that is left out."""
        sources = [part.source for part in self.ingredients]
        return np.array([0.0 if source is None else mean_length(source, grammar) for source in sources])

    def _add_phases(self, final_from: int | None) -> None:
        start, done = 0, np.zeros(len(self.ingredients), dtype=np.int64)
        final = False
        while True:
            final = final or (final_from is not None and start >= final_from)
            shares = [
                0.0 if done[i] >= self.limits[i] else part.final if final and part.final is not None else part.share
                for i, part in enumerate(self.ingredients)
            ]
            if not sum(shares):
                self.end = start
                return
            phase = _phase(start, done, np.array(shares) / self._means)
            self.phases.append(phase)
            ends = [phase.reaches(i, int(limit)) for i, limit in enumerate(self.limits) if limit < math.inf]
            ends += [final_from] if final_from is not None and not final else []
            end = min(ends, default=math.inf)
            if end == math.inf:
                return
            start, done = int(end), phase.done_at(int(end))

    def document(self, sample: int) -> Document | None:
        number, index = self._place(sample)
        source = self.ingredients[number].source
        return None if source is None else replace(source.document(index, sample), source=source.name)

    def lengths(self, samples: Sequence[int], grammar: SequenceFormat) -> np.ndarray:
        """Positions `[n]` of samples; 0 for those that are left out."""
        numbers, indices = np.array([self._place(sample) for sample in samples]).T
        found = np.zeros(len(samples), dtype=np.int64)
        for number, part in enumerate(self.ingredients):
            chosen = numbers == number
            if part.source is not None and chosen.any():
                found[chosen] = part.source.lengths(indices[chosen], np.asarray(samples)[chosen], grammar)
        return found

    def _place(self, sample: int) -> tuple[int, int]:
        if sample >= self.end:
            raise UserError(
                f"data.sources: expected one that goes on, found all used up after {int(self.end)} samples; allow more "
                "epochs, or ask for fewer steps"
            )
        return self.phases[bisect_right(self._starts, sample) - 1].place(sample)


def _limit(part: Ingredient) -> float:
    if part.epochs is None:
        return math.inf
    epoch = part.epoch if part.source is None else part.source.epoch
    if epoch is None:
        name = "pictures" if part.source is None else part.source.name
        raise UserError(f"data.sources: {name}: expected no epochs, for it never ends, found {part.epochs:g}")
    return max(1, round(part.epochs * epoch))


def _phase(start: int, done: np.ndarray, samples: np.ndarray) -> Phase:
    shares = samples / samples.sum()
    least = float(shares[shares > 0].min())
    length = next((length for length in PATTERNS if least * length >= PLACES), PATTERNS[-1])
    if least * length < 1:
        raise UserError(
            f"data.sources: expected each to be at least one of {length:,} samples, found one that is {least:.2g} of "
            "them; another data.text_share, or weight, changes that"
        )
    credit = np.zeros(len(shares))
    pattern = np.empty(length, dtype=np.int64)
    for place in range(length):
        credit += shares
        pattern[place] = credit.argmax()
        credit[pattern[place]] -= 1
    chosen = pattern[:, None] == np.arange(len(shares))
    return Phase(start, done, pattern, chosen.sum(0), chosen.cumsum(0) - chosen)


def mean_length(source: Source, grammar: SequenceFormat) -> float:
    """Mean positions of a document: over one pass, or over the first `SAMPLED` of a source that never ends."""
    if isinstance(source, Measured):
        return source.mean_length(grammar)
    count = SAMPLED if source.epoch is None else min(MOST_MEASURED, source.epoch)
    return float(source.lengths(np.arange(count), np.arange(count), grammar).mean())
