"""The numbers of runs, read from their folders, which a notebook shows as charts.

transfuse.curves("runs/tiny")                         # its losses, and measures taken while it trained
transfuse.curves("runs/tiny", "runs/slower")          # a chart of each number, a curve for each run
transfuse.curves("runs/tiny").lines["runs/tiny"][-1]  # the last line of its metrics.jsonl
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..charts import ACCENT, SOFT, VIOLET, WARM, has_charts, line_chart, standing_alone
from ..errors import UserError, install_command
from ..training import read_metrics

LOSSES = ("text", "image")
COLOURS = (ACCENT, WARM, VIOLET, SOFT)
SHOWN = (*LOSSES, "gradient_norm", "positions", "images", "seconds")
"""columns of the table: the last numbers of each run"""


@dataclass
class Curves:
    """Logged numbers by run folder; `_repr_html_` draws them. lines: those of `metrics.jsonl`, by the folder's name."""

    lines: dict[str, list[dict[str, Any]]]

    @property
    def names(self) -> list[str]:
        """The numbers that are drawn: losses, and measures taken while training (METRIC/NUMBER)."""
        logged = {name for lines in self.lines.values() for line in lines for name in line}
        return [
            *(name for name in LOSSES if name in logged),
            *sorted(name for name in logged if "/" in name and not name.startswith("image_by_timestep/")),
        ]

    def points(self, run: str, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of one number of a run."""
        return [(line["step"], line[name]) for line in self.lines[run] if line.get(name) is not None]

    def _repr_html_(self) -> str:
        """Return a chart of each number, with a curve for each run, and a table of the last numbers, for notebooks."""
        missing = "" if has_charts() else f"<p>charts need matplotlib: {install_command('report')}</p>"
        return "".join(self._charts()) + missing + self._table()

    def _charts(self) -> Iterator[str]:
        short = [Path(run).name for run in self.lines]
        labels = short if len({*short}) == len(short) else [*self.lines]
        for name in self.names:
            curves = [
                (label, self.points(run, name), COLOURS[number % len(COLOURS)])
                for number, (label, run) in enumerate(zip(labels, self.lines, strict=True))
            ]
            if chart := standing_alone(line_chart(curves, "step")):
                yield (
                    f'<figure style="display:inline-block; margin:0 1em 0 0">'
                    f"<figcaption>{html.escape(name)}</figcaption>{chart}</figure>"
                )

    def _table(self) -> str:
        logged = {name for lines in self.lines.values() for line in lines for name in line}
        columns = ["step", *(name for name in SHOWN if name in logged)]
        rows = [["run", *columns]]
        for run, lines in self.lines.items():
            last = {name: value for line in lines for name, value in line.items()}
            rows.append([run, *(f"{last[name]:,.4g}" if name in last else "" for name in columns)])
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def read_curves(*runs: Path | str) -> Curves:
    """Read the logged numbers of run folders: `transfuse.curves`. Raises UserError for a folder without any."""
    lines = {}
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        lines[str(run)] = read_metrics(path)
        if not lines[str(run)]:
            raise UserError(f"{path}: expected the logged steps of a run, found none")
    return Curves(lines)
