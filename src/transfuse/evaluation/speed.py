"""How fast it draws and writes on this machine, and what share of the machine that is.

A pace is the median of some runs after one that warms up; its interval is from the slowest to the fastest. The machine
is measured beside the model: a large product of matrices gives its arithmetic, a copy its memory, in the model's dtype.
So a share is of what can be had here, on any device, rather than of a figure from a data sheet. Drawing is bound by
arithmetic, writing one text by reading the weights for each token.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from emoji_scenes import World, caption

from ..diffusion import Sampler
from ..inference.events import Request
from ..model.flops import count_parameters, forward_flops
from ..sequence import layout_document
from .bench import EvalContext, Metric
from .confidence import Estimate
from .result import MetricResult, Result

WRITING = ("tokens a second, many at once", "tokens a second, alone", "MBU, writing alone")
DRAWING = ("pictures a second, many at once", "pictures a second, alone")
DENOISING, MEMORY = "MFU, drawing many", "memory at most, in GB"
RUNS = 3
TOKENS = 32
MATRIX = {"cpu": 1024, "cuda": 8192}
"""side of the matrices that are multiplied"""
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}
"""bytes that are copied"""


def timed(work: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of `RUNS` runs, after one that is not counted."""
    found = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return found[1:]


def _pace(amount: float, seconds: list[float]) -> Estimate:
    return Estimate(amount / median(seconds), amount / max(seconds), amount / min(seconds), len(seconds))


def _times(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.value * factor, found.low * factor, found.high * factor, found.count)


def _of_this_machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes a second that can be had: the best of the runs."""
    side = MATRIX[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    multiplied = min(timed(lambda: a @ b, device))
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copied = min(timed(lambda: target.copy_(source), device))
    return 2 * side**3 / multiplied, 2 * COPIED[device.type] / copied  # read and written


def _drawing_flops(bench: EvalContext, requests: list[Request]) -> float:
    """Operations of all denoising steps: every branch that is computed sees its prompt and its own patches."""
    config, engine, process = bench.pipe.exported.model.config, bench.pipe.engine, bench.pipe.exported.process
    side = bench.pipe.exported.image_size // bench.pipe.exported.autoencoder.factor
    patches = engine.runner.patches(side, side)
    total = 0
    for request in requests:
        levels = [t / process.config.timesteps for t in Sampler(process, request.sampler).timesteps]
        guided = sum(map(request.guided_at, levels)) if request.guidance_scale != 1 else 0
        prompt = len(layout_document(request.document, engine.grammar)) + 1
        for prefix, steps in ((prompt, len(levels)), (len(engine.runner.null_tokens), guided)):
            total += steps * forward_flops(config, patches, patches * (prefix + patches), 0, [(side, side)])
    return float(total)


def _numbers(bench: EvalContext) -> list[str]:
    images = bench.pipe.exported.model.config.images
    drawing = [] if images == "none" else [*DRAWING, *([DENOISING] if images == "latents" else [])]
    return [*WRITING, *drawing, MEMORY]


def _score(bench: EvalContext) -> MetricResult:
    exported = bench.pipe.exported
    model = exported.model
    weight, device = next(model.parameters()), bench.device
    world = World(replace(bench.world, size=exported.image_size))
    prompts = [caption(world.scene(n), n) for n in range(bench.batch)]
    said = f"{bench.version}, {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, "
    said += f"{torch.get_num_threads()} threads, torch {torch.__version__}, {str(weight.dtype).removeprefix('torch.')}"
    arithmetic, memory = _of_this_machine(device, weight.dtype)
    results: list[Result] = []

    def add(name: str, found: Estimate, data: str, ceiling: float | None = None) -> None:
        results.append(Result.of(name, found, "higher", said, data, ceiling=ceiling))

    def write(count: int) -> Estimate:
        words = [world.nouns[n % len(world.nouns)] for n in range(count)]
        ahead = [replace(bench.pipe.request([f"{w}:"]), draw="never", max_tokens=TOKENS) for w in words]
        written: list[int] = []
        seconds = timed(lambda: written.append(sum(r.done.text_tokens for r in bench.pipe.replies(ahead))), device)
        return _pace(written[-1], seconds)

    many, one = write(len(prompts)), write(1)
    add(WRITING[0], many, f"{len(prompts)} texts of up to {TOKENS} tokens")
    add(WRITING[1], one, f"one text of up to {TOKENS} tokens")
    config = model.config  # not the model's own parameters: packed for inference, they are elsewhere
    read = weight.element_size() * (
        count_parameters(config).transformer - config.vocab_size * config.d_model
    )  # an embedding is a row
    data = f"{read / 1e6:.0f} MB of weights a token; memory {memory / 1e9:.1f} GB/s"
    add(WRITING[2], _times(one, read / memory), data, 1.0)
    if model.config.images != "none":
        _draw(bench, prompts, device, arithmetic, add)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident()
    results.append(Result(MEMORY, peak / 1e9, None, None, 1, "lower", said, "this process so far"))
    return MetricResult(results)


def _draw(
    bench: EvalContext, prompts: list[str], device: torch.device, arithmetic: float, add: Callable[..., None]
) -> None:
    requests = [replace(bench.request([prompt]), draw="force", max_tokens=0) for prompt in prompts]

    candidates = bench.drawing.candidates

    def draw(some: list[Request]) -> None:
        bench.pipe.replies(some, candidates)

    seconds = timed(lambda: draw(requests), device)
    many = _pace(len(requests), seconds)
    each_of = "" if candidates == 1 else f", each the likeliest of {candidates}"
    add(DRAWING[0], many, f"{len(requests)} pictures{each_of}")
    add(DRAWING[1], _pace(1, timed(lambda: draw(requests[:1]), device)), f"one picture{each_of}")
    if bench.pipe.exported.model.config.images == "latents":
        each = candidates * _drawing_flops(bench, requests) / len(requests)
        data = f"{each:.3g} operations a picture; machine {arithmetic:.3g} a second"
        add(DENOISING, _times(many, each / arithmetic), data, 1.0)


def _resident() -> int:
    """Bytes this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ABOUT = "pace of drawing and writing, memory, and the share of the machine"
COMPARED = "Reference: all the arithmetic, or memory traffic, that this machine was measured at."
SPEED = Metric("speed", ABOUT, lambda bench: None, _score, _numbers, True, COMPARED)
