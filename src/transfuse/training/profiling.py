"""Traces of a few steps, to see where time goes: open them in a browser at ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..log import logger

SKIPPED, WARM = 5, 2
"""steps before a trace begins, in which kernels are prepared; and those in which the profiler itself warms up"""


@contextmanager
def profiled(folder: Path, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each step. `folder/rank-0.json` is a Chrome trace of `steps` steps, 0: none.

    A run that ends before has a trace of fewer steps, or of none, and says so.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]

    path, done, traced = folder / f"rank-{rank}.json", 0, 0

    def write(found: profile) -> None:
        nonlocal traced
        traced = done - SKIPPED - WARM
        if traced < 1:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(path))
            logger.info(f"{path}: {traced} steps, to be opened in a browser at ui.perfetto.dev")
        except OSError as error:
            logger.info(f"{path}: not written ({error.strerror or error})")

    def step() -> None:
        nonlocal done
        done += 1
        profiler.step()

    plan = schedule(wait=SKIPPED, warmup=WARM, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield step
    if traced < 1:
        logger.info(f"{path}: no trace, for it begins behind {SKIPPED + WARM} steps and there were only {done}")
