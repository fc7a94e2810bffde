"""Several sources as one stream. Mixed in *tokens*: the paper's 1 : 1 is text tokens against image patches."""

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

    sources  None stands for one whose samples are left out: `document` gives None in its places.
    shares   of all positions under `grammar`, one per source: shares of samples follow from each source's mean length.
             Of samples where grammar is None: then sample i is the same whatever a picture is made of.

    Sources take turns as evenly as whole numbers allow, so that every stretch of the stream is mixed alike.
    """

    def __init__(self, sources: Sequence[Source | None], shares: Sequence[float], grammar: Grammar | None) -> None:
        if len(sources) != len(shares) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"shares: expected one non-negative number per source, found {list(shares)}")
        self.sources = list(sources)
        samples = np.array(shares, dtype=np.float64)
        if grammar is not None:
            samples /= [_mean_length(source, grammar) for source in sources]
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

    def document(self, sample: int) -> Document | None:
        turn, place = divmod(sample, PATTERN)
        number = self.pattern[place]
        index = turn * int(self.per_pattern[number]) + int(self.before[place, number])
        source = self.sources[number]
        return None if source is None else source.document(index, sample)


def _mean_length(source: Source | None, grammar: Grammar) -> float:
    if source is None:
        raise ValueError("sources: expected all where shares are of positions, found one left out")
    return float(np.mean([len(lay_out(source.document(i, i), grammar)) for i in range(MEASURED)]))
