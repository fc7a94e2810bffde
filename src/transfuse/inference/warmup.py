"""Before the first request: take every path once, and find out how guided drawings are fastest on this machine.

    packed       the branches of all drawing rows in one pass: fewer calls, each reads the weights once for all
    sequential   one pass a branch: smaller ones, which a cache may hold better

Rows and branches do not depend on who is computed beside them (docs/inference.md), so the choice changes no result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from .engine import Engine
from .model_runner import GUIDANCE, Guidance
from .sequence_state import Request

STEPS = 4
"""denoising steps of a drawing that is timed"""
ROUNDS = 3
"""drawings of each way, in turn; their median counts"""


def warm_up(engine: Engine, request: Request, rows: int = 1, guidance: Guidance | None = None) -> dict[str, float]:
    """Draw `rows` pictures of a request in a cache of their own, and keep the faster way of guidance, or the one given.

    Gives the median seconds of each way; none where nothing was timed: one was given, the model does not denoise, or
    the request is not guided. The engine's own cache and requests are not touched.
    """
    runner, images = engine.runner, engine.config.images
    draw = replace(request, draw="never" if images == "none" else "force", max_tokens=2, guidance_interval=None)
    if images == "latents":
        draw = replace(draw, sampler=replace(draw.sampler, steps=min(STEPS, draw.sampler.steps)))
    requests = [replace(draw, seed=seed) for seed in range(rows)]
    _seconds(engine, requests)
    medians: dict[Guidance, float] = {}
    if guidance is not None:
        runner.guidance = guidance
    elif images == "latents" and request.guidance_scale != 1:
        found: dict[Guidance, list[float]] = {way: [] for way in GUIDANCE}
        for _ in range(ROUNDS):
            for way in GUIDANCE:
                runner.guidance = way
                found[way].append(_seconds(engine, requests))
        medians = {way: statistics.median(times) for way, times in found.items()}
        runner.guidance = min(GUIDANCE, key=lambda way: medians[way])
    engine.forget()
    return {str(way): seconds for way, seconds in medians.items()}


def _seconds(engine: Engine, requests: Sequence[Request]) -> float:
    began = time.perf_counter()
    for _ in engine.run(requests):
        pass
    return time.perf_counter() - began
