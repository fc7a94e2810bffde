"""Ctrl-C and SIGTERM ask the loop to stop at the next step boundary, save, and exit with a code that says so."""

from __future__ import annotations

import signal
from types import FrameType

RESUMABLE = 75
"""exit code of a run that was stopped and saved: run the same command again to go on (EX_TEMPFAIL)"""


class StopRequest:
    """A context manager; `requested` turns true at the first signal. A second Ctrl-C interrupts at once."""

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
