"""`metrics.jsonl`: one line per logged step, always written, the source of every plot and table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .ranks import Ranks


class MetricsLog:
    """Appends lines to a file. Opened at a step, it drops the lines a killed run wrote after its last checkpoint.

    writes: whether this is the rank that does.
    """

    def __init__(self, path: Path, step: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: not written ({error.strerror or error}); checkpoints are intact") from None


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

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def merged(self, ranks: Ranks) -> Average:
        """Of all data ranks; all must call it."""
        merged = Average()
        own = {name: float(total) for name, total in self.sums.items()}
        for sums, counts in ranks.gather((own, self.counts)):
            for name, total in sums.items():
                merged.add(name, total, counts[name])
        return merged

    def means(self) -> dict[str, float]:
        """Names without a single target are left out."""
        return {name: float(self.sums[name]) / count for name, count in self.counts.items() if count}
