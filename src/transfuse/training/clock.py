"""What a run's time goes to, without making the host wait for the device once more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums seconds by part. On CUDA it marks the stream, and reads marks only once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """What runs in this context. on_host: count the time until the host has done its part."""
        self._look()
        began = time.monotonic()
        if self.on_device and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._marks.append((name, start, end))
        else:
            yield
            self._add(name, time.monotonic() - began)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last time, but for what the device has not passed yet."""
        self._look()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _look(self) -> None:
        while self._marks and self._marks[0][2].query():
            name, start, end = self._marks.popleft()
            self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
