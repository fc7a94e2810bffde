"""What ends a run before its last step: Ctrl-C, SIGTERM and SIGUSR1 ask it to stop after the step it is in, to save,
and to exit with a code that says so; so does a limit on its time.
"""

from __future__ import annotations

import signal
import threading
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
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
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
