"""`metrics.jsonl`: one line per logged step, always written, the source of every plot and table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..io import append_jsonl, atomic_write
from .ranks import Ranks


class MetricsLog:
    """Appends lines to a file. Opened at a step, it drops the lines a killed run wrote after its last checkpoint.

    The first rank writes; all must call.
    """

    def __init__(self, path: Path, step: int, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = path, ranks or Ranks()

        def rewrite(partial: Path) -> None:
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

        self.ranks.once(lambda: atomic_write(path, rewrite))

    def write(self, line: dict[str, Any]) -> None:
        self.ranks.once(lambda: append_jsonl(self.path, [line]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut short by a kill is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


class Average:
    """Sums and counts by name, so that means are over targets, not over steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, float] = {}

    @classmethod
    def of(cls, saved: Mapping[str, Mapping[str, float]]) -> Average:
        """One from its sums and counts."""
        average = cls()
        average.sums.update(saved.get("sums", {}))
        average.counts.update(saved.get("counts", {}))
        return average

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def include(self, other: Average) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])

    def merged(self, ranks: Ranks) -> Average:
        """Of all data ranks; all must call it."""
        merged, own = Average(), Average()
        own.sums, own.counts = {name: float(total) for name, total in self.sums.items()}, self.counts
        for one in ranks.gather(own):
            merged.include(one)
        return merged

    def means(self) -> dict[str, float]:
        """Names without a single target are left out."""
        return {name: float(self.sums[name]) / count for name, count in self.counts.items() if count}
