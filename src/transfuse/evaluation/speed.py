"""Speed of drawing and writing on this machine, and the share of the machine's capacity that it uses.

A rate is the median of `RUNS` runs after a warm-up; its interval runs from the slowest to the fastest. The machine is
measured alongside in the model's dtype: a large matrix product gives its arithmetic, a copy its memory bandwidth. So
MFU and MBU are shares of what this device achieves, not of a data sheet. Drawing is bound by arithmetic; writing a
single text is bound by reading the weights for each token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from ..diffusion import Sampler
from ..errors import UserError
from ..inference import Request
from ..model.costs import count_parameters, forward_flops
from ..sequence import layout_document
from .confidence import Estimate
from .context import EvalContext, Metric, MetricResult, Result

WRITING = ("tokens a second, many at once", "tokens a second, alone", "MBU, writing alone")
DRAWING = ("pictures a second, many at once", "pictures a second, alone")
DENOISING, MEMORY = "MFU, drawing many", "memory at most, in GB"
RUNS = 3
TOKENS = 32
PROMPT = "a photograph"  # the prompt where the data set brings none
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the matrices that are multiplied
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes that are copied

Timer = Callable[[Callable[[], object], torch.device], list[float]]


def timed(work: Callable[[], object], device: torch.device) -> list[float]:
    """Return the seconds of `RUNS` runs, after a warm-up."""
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def measure_speed(context: EvalContext, timer: Timer = timed) -> MetricResult:
    """Time texts and images, many together and one alone. `timer` returns the seconds of each run of some work."""
    exported, device = context.pipe.exported, context.device
    weight = next(exported.model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    code = f"{context.version}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    code += str(weight.dtype).removeprefix("torch.")
    prompts = [PROMPT] * context.batch
    if context.scorer is not None:
        prompts = list(context.scorer.pairs(context.batch, exported.image_size, "train").prompts)
    arithmetic, memory = _machine(device, weight.dtype, timer)
    results: list[Result] = []

    def add(name: str, amount: float, seconds: list[float], data: str, ceiling: float | None = None) -> None:
        rate = Estimate(amount / median(seconds), amount / max(seconds), amount / min(seconds), len(seconds))
        results.append(Result.of(name, rate, "higher", code, data, ceiling=ceiling))

    for count, name, label in ((len(prompts), WRITING[0], f"{len(prompts)} texts"), (1, WRITING[1], "one text")):
        starts = [f"{prompt.split()[-1]}:" for prompt in prompts[:count]]
        requests = [replace(context.pipe.request([start]), draw="never", max_tokens=TOKENS) for start in starts]
        written: list[int] = []

        def write(requests: list[Request] = requests, written: list[int] = written) -> None:
            written.append(sum(reply.done.text_tokens for reply in context.pipe.replies(requests)))

        seconds = timer(write, device)
        add(name, written[-1], seconds, f"{label} of up to {TOKENS} tokens")
    # Counted from the config: packed for inference, the weights are not the model's own parameters.
    config = exported.model.config
    embedding = config.vocab_size * config.d_model  # a token reads one row of it
    read = weight.element_size() * (count_parameters(config).transformer - embedding)
    data = f"{read / 1e6:.0f} MB of weights a token; memory {memory / 1e9:.1f} GB/s"
    add(WRITING[2], written[-1] * read / memory, seconds, data, 1.0)
    if config.images != "none":
        candidates = context.drawing.candidates
        best_of = "" if candidates == 1 else f", each the best of {candidates}"
        requests = [replace(context.request([prompt]), draw="force", max_tokens=0) for prompt in prompts]
        many = timer(lambda: context.pipe.replies(requests, candidates), device)
        add(DRAWING[0], len(requests), many, f"{len(requests)} pictures{best_of}")
        alone = timer(lambda: context.pipe.replies(requests[:1], candidates), device)
        add(DRAWING[1], 1, alone, f"one picture{best_of}")
        if config.images == "latents":
            flops = candidates * _drawing_flops(context, requests)
            data = f"{flops / len(requests):.3g} operations a picture; machine {arithmetic:.3g} a second"
            add(DENOISING, flops / arithmetic, many, data, 1.0)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory()
    results.append(Result(MEMORY, peak / 1e9, None, None, 1, "lower", code, "this process so far"))
    return MetricResult(results)


def _machine(device: torch.device, dtype: torch.dtype, timer: Timer) -> tuple[float, float]:
    """Return the operations and bytes per second of the best runs."""
    side = MATRIX[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = min(timer(lambda: a @ b, device))
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy_s = min(timer(lambda: target.copy_(source), device))
    return 2 * side**3 / product_s, 2 * COPIED[device.type] / copy_s  # bytes are read and written


def _drawing_flops(context: EvalContext, requests: list[Request]) -> float:
    """Return the operations of all denoising steps; each branch sees its prompt and its own patches."""
    config, engine, process = context.pipe.exported.model.config, context.pipe.engine, context.pipe.exported.process
    side = context.pipe.exported.image_size // context.pipe.exported.autoencoder.factor
    patches = side * side // config.patch_size**2
    total = 0
    for request in requests:
        levels = [t / process.config.timesteps for t in Sampler(process, request.sampler).timesteps]
        guided = sum(map(request.guided_at, levels)) if request.guidance_scale != 1 else 0
        prompt = len(layout_document(request.document, engine.grammar)) + 1
        for prefix, steps in ((prompt, len(levels)), (len(engine.runner.null_tokens), guided)):
            total += steps * forward_flops(config, patches, patches * (prefix + patches), 0, [(side, side)])
    return float(total)


def _peak_memory() -> int:
    """Return the largest resident size of this process in bytes. Raises UserError on Windows."""
    try:
        import resource
    except ImportError:
        raise UserError("speed: expected a system with the module resource (Linux, macOS), found none") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _names(context: EvalContext) -> list[str]:
    images = context.pipe.exported.model.config.images
    drawing = [] if images == "none" else [*DRAWING, *([DENOISING] if images == "latents" else [])]
    return [*WRITING, *drawing, MEMORY]


SPEED = Metric(
    "speed",
    "pace of drawing and writing, memory, and the share of the machine",
    lambda context: _peak_memory(),
    measure_speed,
    _names,
    True,
    "Reference: all the arithmetic, or memory traffic, that this machine was measured at.",
)
