"""Metrics: `metrics.jsonl`, one line per logged step, always written; averages, timings, and trackers.

    RUN/tensorboard/    TensorBoard's files; lines of a killed run after its last checkpoint are hidden there
    RUN/tracker-id      the run's name at Weights & Biases and Trackio, by which it is resumed there

Tracker failures are logged once and never stop a run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError, install_command
from ..images import read_image
from ..io import append_jsonl, atomic_write
from ..log import logger
from .distributed import Distributed
from .hardware import peak_flops

TrackerName = Literal["tensorboard", "wandb", "trackio"]

MODULES: dict[TrackerName, str] = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines; one cut short by a kill is skipped."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError if a tracker's package is missing, before training starts."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            problem = "none" if error.name == name else f"a package that does not import ({error})"
            raise UserError(f"loop.trackers: expected {name}, found {problem}; {install_command(name)}") from None


class MetricsLog:
    """Appends lines to `metrics.jsonl` and sends them to the trackers, which are open until the end of the context.

    Rank 0 writes, but every rank must call the methods.
    """

    def __init__(self, folder: Path, trackers: Sequence[TrackerName] = (), ranks: Distributed | None = None) -> None:
        self.folder, self.path, self.ranks = folder, folder / "metrics.jsonl", ranks or Distributed()
        self.trackers = trackers if self.ranks.first else ()
        self._open: dict[TrackerName, TensorBoard | Remote] = {}
        self._failed: set[TrackerName] = set()

    def open(self, step: int) -> None:
        """Begin or resume after a step: drop later lines of a killed run, and open the trackers again."""

        def rewrite(partial: Path) -> None:
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

        self.ranks.on_rank0(lambda: atomic_write(self.path, rewrite))
        self.close()
        path = self.folder / "config.json"
        for name in self.trackers:
            with self._failing_once(name):
                config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
                if name == "tensorboard":
                    self._open[name] = TensorBoard(self.folder, step, config)
                else:
                    self._open[name] = Remote(name, self.folder, config)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises UserError if it cannot be written."""
        self.ranks.on_rank0(lambda: append_jsonl(self.path, [line]))
        numbers = {name: value for name, value in line.items() if name != "step" and math.isfinite(value)}
        for name, tracker in self._open.items():
            with self._failing_once(name):
                tracker.log(line["step"], numbers)

    def image(self, step: int, path: Path) -> None:
        """Send a sample grid, if the file exists, to the trackers, with the prompts from its .txt file."""
        text = path.with_suffix(".txt")
        prompts = text.read_text(encoding="utf-8") if text.exists() else ""
        for name, tracker in self._open.items() if path.exists() else ():
            with self._failing_once(name):
                tracker.image(step, path, prompts)

    def close(self, failed: bool = False) -> None:
        """Close all trackers; `failed` marks the run as failed where the service knows that."""
        while self._open:
            name, tracker = self._open.popitem()
            with self._failing_once(name):
                tracker.close(failed)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    @contextmanager
    def _failing_once(self, name: TrackerName) -> Iterator[None]:
        """Log the first failure of a tracker, whose own code or server may raise anything, and ignore the others."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                reason = " ".join(str(error).split())[:300]
                logger.info(f"loop.trackers: {name}: {type(error).__name__}: {reason}; metrics.jsonl has everything")
            self._failed.add(name)


class TensorBoard:
    """Writes to RUN/tensorboard."""

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._text("config", json.dumps(config, indent=2), step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def image(self, step: int, path: Path, prompts: str) -> None:
        self.writer.add_image("samples", read_image(path), step, dataformats="HWC")
        self._text("prompts", prompts, step)

    def close(self, failed: bool) -> None:
        self.writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """Write text as a Markdown code block."""
        if text:
            self.writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)
        self.writer.flush()


class Remote:
    """Weights & Biases (project $WANDB_PROJECT, or "transfuse") or Trackio (project "transfuse" on this machine)."""

    def __init__(self, name: Literal["wandb", "trackio"], folder: Path, config: dict[str, Any]) -> None:
        self.module: Any = importlib.import_module(name)
        self.wandb = name == "wandb"
        path = folder / "tracker-id"
        if not path.exists():
            new = re.sub(r"[^\w-]+", "-", folder.resolve().name) + f"-{secrets.token_hex(4)}\n"
            atomic_write(path, lambda partial: partial.write_text(new, encoding="utf-8"))
        run, common = path.read_text(encoding="utf-8").strip(), {"config": config, "resume": "allow"}
        if self.wandb:
            project = os.environ.get("WANDB_PROJECT", "transfuse")
            self.run = self.module.init(project=project, id=run, name=run, dir=str(folder), **common)
            # Its step count cannot go back as a resumed run does, so steps are an ordinary metric.
            self.run.define_metric("*", step_metric="step")
        else:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
                self.run = self.module.init("transfuse", name=run, embed=False, **common)

    def log(self, step: int, numbers: dict[str, Any]) -> None:
        if self.wandb:
            self.run.log({"step": step, **numbers})
        else:
            self.run.log(numbers, step=step)

    def image(self, step: int, path: Path, prompts: str) -> None:
        self.log(step, {"samples": self.module.Image(str(path), caption=prompts)})

    def close(self, failed: bool) -> None:
        if self.wandb:
            self.run.finish(exit_code=int(failed))
        else:
            with contextlib.redirect_stdout(sys.stderr):
                self.module.finish()


@dataclass
class Average:
    """Sums and counts by name, for means over targets rather than over steps."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum over `count` targets."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def include(self, other: Average) -> None:
        """Add all sums and counts of another average."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])

    def merged(self, ranks: Distributed) -> Average:
        """Return the average over all data ranks, each of which must call this."""
        merged = Average()
        for average in ranks.gather(Average({name: float(total) for name, total in self.sums.items()}, self.counts)):
            merged.include(average)
        return merged

    def means(self) -> dict[str, float]:
        """Return the mean of each name with at least one target."""
        return {name: float(self.sums[name]) / count for name, count in self.counts.items() if count}


class Meter:
    """Seconds spent in named parts of the code, and what the device has: memory in use and peak operations.

    On CUDA it records events in the stream and reads them once the device has passed them, so it never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_device = device, device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Time the code in this context; with `on_host` on the host's clock, even on CUDA."""
        self._collect()
        began = time.monotonic()
        if self.on_device and not on_host:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._marks.append((name, start, end))
        else:
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def read(self) -> dict[str, float]:
        """Return seconds by part since the last call, without events that the device has not passed yet."""
        self._collect()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _collect(self) -> None:
        while self._marks and self._marks[0][2].query():
            name, start, end = self._marks.popleft()
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1000

    def memory(self) -> int | None:
        """Return the peak memory of tensors since the start, in bytes; None for a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_device else None

    def peak_flops(self) -> float | None:
        """Return the peak operations per second; None for a CPU or an unknown card."""
        return peak_flops(torch.cuda.get_device_name(self.device)) if self.on_device else None
