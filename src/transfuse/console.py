"""What a person sees while something long runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 15.0
"""seconds between lines where the output is no terminal"""

console = Console(stderr=True, highlight=False, soft_wrap=True)


def quiet(on: bool) -> None:
    """Say nothing from here on: of many processes of one run, one speaks."""
    console.quiet = on


def say(message: str) -> None:
    """One line to the person, on standard error: standard output is for results."""
    console.print(message, markup=False)


class Steps:
    """Advances a task; `note` is a short state such as a loss."""

    def __init__(self, title: str, total: int, start: int, bar: Progress | None) -> None:
        self.title, self.total, self.done, self.start = title, total, start, start
        self.bar, self.note = bar, ""
        self.task = bar.add_task(title, total=total, completed=start, note="") if bar else None
        self.began = self.last = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        self.done += count
        self.note = self.note if note is None else note
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.last > LINE_EVERY:
            self.last = time.monotonic()
            left = (self.last - self.began) / max(1, self.done - self.start) * (self.total - self.done)
            say(f"{self.title}: {self.done}/{self.total}  {self.note}  about {left:.0f} s left")


@contextmanager
def progress(title: str, total: int, start: int = 0) -> Iterator[Steps]:
    """Show progress of `total` steps, of which `start` were done before."""
    if not sys.stderr.isatty():
        say(f"{title}: {total - start} to do")
        yield Steps(title, total, start, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(title, total, start, bar)
