"""Several sources as one stream, mixed in *tokens*: the paper's 1 : 1 is text tokens against image patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..sequence import Document, Grammar, lay_out
from .sources import Source

PATTERN = 1000
"""samples after which the order of sources repeats"""
MEASURED = 200
"""documents per source whose lengths are measured to turn token shares into sample shares"""


class Mixture:
    """Sample i of the stream, a function of i alone: which source it comes from, and which of its documents.

    shares  of all positions, one per source. Shares of samples follow from each source's mean length; sources then
            take turns as evenly as whole numbers allow, so that every stretch of the stream is mixed alike.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[float], grammar: Grammar) -> None:
        if len(sources) != len(shares) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"shares: expected one non-negative number per source, found {list(shares)}")
        self.sources = list(sources)
        lengths = [np.mean([len(lay_out(s.document(i, i), grammar)) for i in range(MEASURED)]) for s in sources]
        samples = np.array([share / length for share, length in zip(shares, lengths, strict=True)])
        self.sample_shares = samples / samples.sum()
        credit = np.zeros(len(sources))
        pattern = np.empty(PATTERN, dtype=np.int64)
        for place in range(PATTERN):
            credit += self.sample_shares
            pattern[place] = credit.argmax()
            credit[pattern[place]] -= 1
        self.pattern = pattern
        chosen = pattern[:, None] == np.arange(len(sources))
        self.per_pattern = chosen.sum(0)
        self.before = chosen.cumsum(0) - chosen  # how many of each source come before this place in the pattern

    def document(self, sample: int) -> Document:
        turn, place = divmod(sample, PATTERN)
        source = self.pattern[place]
        index = turn * int(self.per_pattern[source]) + int(self.before[place, source])
        return self.sources[source].document(index, sample)
