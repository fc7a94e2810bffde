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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import UserError
from ..images import read_image
from ..io import append_jsonl, atomic_write
from ..log import logger
from .distributed import Distributed


class MetricsLog:
    """Appends lines to `metrics.jsonl`. Opening it at a step drops later lines of a killed run.

    Rank 0 writes, but every rank must call the methods.
    """

    def __init__(self, path: Path, step: int, ranks: Distributed | None = None) -> None:
        self.path, self.ranks = path, ranks or Distributed()

        def rewrite(partial: Path) -> None:
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))

        self.ranks.on_rank0(lambda: atomic_write(path, rewrite))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        """Append one line."""
        self.ranks.on_rank0(lambda: append_jsonl(self.path, [line]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines; one cut short by a kill is skipped."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


class Average:
    """Sums and counts by name, for means over targets rather than over steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, float] = {}

    @classmethod
    def of(cls, saved: Mapping[str, Mapping[str, float]]) -> Average:
        """Return an average with the sums and counts of a checkpoint."""
        average = cls()
        average.sums.update(saved.get("sums", {}))
        average.counts.update(saved.get("counts", {}))
        return average

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum over `count` targets."""
        """Add a sum over `count` targets."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def include(self, other: Average) -> None:
        """Add the sums and counts of another average."""
        """Add all sums and counts of another average."""
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])

    def merged(self, ranks: Distributed) -> Average:
        """Return the average over all data ranks, each of which must call this."""
        merged, own = Average(), Average()
        own.sums, own.counts = {name: float(total) for name, total in self.sums.items()}, self.counts
        for average in ranks.gather(own):
            merged.include(average)
        return merged

    def means(self) -> dict[str, float]:
        """Return the mean of each name with at least one target."""
        return {name: float(self.sums[name]) / count for name, count in self.counts.items() if count}


class Clock:
    """Seconds spent in named parts of the code.

    On CUDA it records events in the stream and reads them once the device has passed them, so it never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._marks: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def part(self, name: str, on_host: bool = False) -> Iterator[None]:
        """Time the code in this context; with `on_host` on the host's clock, even on CUDA."""
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
        """Return seconds by part since the last call, without events that the device has not passed yet."""
        self._look()
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _look(self) -> None:
        while self._marks and self._marks[0][2].query():
            name, start, end = self._marks.popleft()
            self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


TrackerName = Literal["tensorboard", "wandb", "trackio"]

MODULES: dict[TrackerName, str] = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """A service that receives metrics and sample grids."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def picture(self, step: int, path: Path, prompts: str) -> None: ...

    def close(self, failed: bool) -> None: ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise UserError if a tracker's package is missing, before training starts."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            problem = "none" if error.name == name else f"a package that does not import ({error})"
            raise UserError(
                f"loop.trackers: expected {name}, found {problem}; pip install 'transfuse[{name}]'"
            ) from None


class Trackers:
    """The trackers of a run, open from `open` to the end of the context; ranks other than 0 have none."""

    def __init__(self, names: Sequence[TrackerName], folder: Path) -> None:
        self.names, self.folder = names, folder
        self._open: dict[TrackerName, Tracker] = {}
        self._failed: set[TrackerName] = set()

    def open(self, step: int) -> None:
        """Open all trackers to resume after a step; open ones are closed first."""
        self.close(failed=False)
        for name in self.names:
            self._try(name, self._start, name, step)

    def log(self, line: dict[str, Any]) -> None:
        """Send the numbers of a line of metrics.jsonl."""
        numbers = {name: value for name, value in line.items() if name != "step" and _is_number(value)}
        for name, tracker in self._open.items():
            self._try(name, tracker.log, line["step"], numbers)

    def picture(self, step: int, path: Path) -> None:
        """Send a sample grid, if the file exists, with the prompts from its .txt file."""
        if not path.exists():
            return
        text = path.with_suffix(".txt")
        prompts = text.read_text() if text.exists() else ""
        for name, tracker in self._open.items():
            self._try(name, tracker.picture, step, path, prompts)

    def close(self, failed: bool) -> None:
        """Close all trackers; `failed` marks the run as failed where the service knows that."""
        while self._open:
            name, tracker = self._open.popitem()
            self._try(name, tracker.close, failed)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _start(self, name: TrackerName, step: int) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        if name == "tensorboard":
            self._open[name] = TensorBoard(self.folder, step, config)
        else:
            self._open[name] = (WeightsAndBiases if name == "wandb" else Trackio)(self.folder, config)

    def _try(self, name: TrackerName, act: Callable[..., None], *given: Any) -> None:
        try:
            act(*given)
        except Exception as error:  # a tracker's own code or server may raise anything
            if name not in self._failed:
                reason = " ".join(str(error).split())[:300]
                logger.info(f"loop.trackers: {name}: {type(error).__name__}: {reason}; metrics.jsonl has everything")
            self._failed.add(name)


class TensorBoard:
    """Writes to RUN/tensorboard."""

    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", _indented(json.dumps(config, indent=2)), step)
        self.writer.flush()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def picture(self, step: int, path: Path, prompts: str) -> None:
        self.writer.add_image("samples", read_image(path), step, dataformats="HWC")
        if prompts:
            self.writer.add_text("prompts", _indented(prompts), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Remote:
    """A tracker with the interface that Weights & Biases and Trackio share."""

    def __init__(self, module: Any, run: Any) -> None:
        self.module, self.run = module, run

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def picture(self, step: int, path: Path, prompts: str) -> None:
        self.log(step, {"samples": self.module.Image(str(path), caption=prompts)})

    def close(self, failed: bool) -> None:
        self.run.finish()


class WeightsAndBiases(Remote):
    """Writes to the project $WANDB_PROJECT, or "transfuse"."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "transfuse")
        name = _id(folder)
        run = wandb.init(project=project, id=name, name=name, dir=str(folder), config=config, resume="allow")
        # Its step count cannot go back as a resumed run does, so steps are an ordinary metric.
        run.define_metric("*", step_metric="step")
        super().__init__(wandb, run)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio(Remote):
    """Writes to the project "transfuse" on this machine."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
            run = trackio.init("transfuse", name=_id(folder), config=config, resume="allow", embed=False)
        super().__init__(trackio, run)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.module.finish()


def _id(folder: Path) -> str:
    """Return the run's name at a service: its folder's name and a random suffix, stored in RUN/tracker-id."""
    path = folder / "tracker-id"
    if not path.exists():
        name = re.sub(r"[^\w-]+", "-", folder.resolve().name)
        atomic_write(path, lambda partial: partial.write_text(f"{name}-{secrets.token_hex(4)}\n"))
    return path.read_text().strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _indented(text: str) -> str:
    """Return text as a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
