"""Messages and progress on standard error; standard output is for results.

`logger` is Python's `logging.getLogger("transfuse")`, at level INFO, so that a program that imports Transfuse controls
it as any other. Progress is a bar on a terminal, and a line every 15 seconds elsewhere; below level INFO it is hidden.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds between lines of progress where standard error is not a terminal

console = Console(stderr=True, highlight=False, soft_wrap=True)
logger = logging.getLogger("transfuse")


class _ConsoleHandler(logging.Handler):
    """Prints through the console of the progress bar, which would otherwise be torn apart."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False)


_handler = _ConsoleHandler()
logger.addHandler(_handler)
logger.setLevel(logging.INFO)
logger.propagate = False


def set_level(level: int) -> None:
    """Show messages from this level of `logging` on; DEBUG also shows the time of each."""
    logger.setLevel(level)
    _handler.setFormatter(logging.Formatter("%(asctime)s %(message)s") if level <= logging.DEBUG else None)


class _JsonFormatter(logging.Formatter):
    """One line of JSON a message: time, level, message, and what the message has as `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        fields = getattr(record, "fields", {"message": record.getMessage()})
        return json.dumps({"time": when, "level": record.levelname.lower(), **fields})


def set_format(form: str) -> None:
    """Write messages as "text" with time and level, or as "json", one object a line: for a process that lives long."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    _handler.setFormatter(_JsonFormatter() if form == "json" else text)


@contextmanager
def quiet(hide: bool = True) -> Iterator[None]:
    """Hide progress and all messages below an error in this block: one process of a run speaks."""
    level = logger.level
    if hide:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class ProgressTask:
    """A count of steps; `note` is a short state, such as a loss, shown next to it."""

    def __init__(self, title: str, total: int, start: int, unit: str, bar: Progress | None) -> None:
        self.title, self.total, self.done, self.start, self.unit = title, total, start, start, unit
        self.bar, self.note = bar, ""
        self.task = bar.add_task(title, total=total, completed=start, note="") if bar else None
        self.began = self.last = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add `count` finished steps."""
        self.done += count
        self.note = self.note if note is None else note
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, note=self.note)
        elif time.monotonic() - self.last > LINE_EVERY:
            self.last = time.monotonic()
            left = (self.last - self.began) / max(1, self.done - self.start) * (self.total - self.done)
            logger.info(f"{self.title}: {self.done}/{self.total} {self.unit}  {self.note}  about {left:.0f} s left")


@contextmanager
def progress(title: str, total: int, start: int = 0, unit: str = "steps") -> Iterator[ProgressTask]:
    """Show progress over `total` steps, of which `start` are already done."""
    if not sys.stderr.isatty():
        logger.info(f"{title}: {total - start} {unit} to do")
        yield ProgressTask(title, total, start, unit, None)
        return
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    hidden = not logger.isEnabledFor(logging.INFO)
    with Progress(*bar, *times, console=console, transient=True, disable=hidden) as shown:
        yield ProgressTask(title, total, start, unit, shown)
