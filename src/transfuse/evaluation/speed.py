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
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from ..diffusion import Sampler
from ..errors import UserError
from ..inference import Request
from ..model.flops import count_parameters, forward_flops
from ..sequence import layout_document
from .confidence import Estimate
from .context import EvalContext, Metric, MetricResult, Result

WRITING = ("tokens a second, many at once", "tokens a second, alone", "MBU, writing alone")
DRAWING = ("pictures a second, many at once", "pictures a second, alone")
DENOISING, MEMORY = "MFU, drawing many", "memory at most, in GB"
RUNS = 3
TOKENS = 32
PROMPT = "a photograph"
"""The prompt where the data set brings none."""
MATRIX = {"cpu": 1024, "cuda": 8192}
"""Side of the matrices that are multiplied."""
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes that are copied."""


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


def _rate(amount: float, seconds: list[float]) -> Estimate:
    return Estimate(amount / median(seconds), amount / max(seconds), amount / min(seconds), len(seconds))


def _machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the operations and bytes per second of the best runs."""
    side = MATRIX[device.type]
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = min(timed(lambda: a @ b, device))
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy_s = min(timed(lambda: target.copy_(source), device))
    return 2 * side**3 / product_s, 2 * COPIED[device.type] / copy_s  # bytes are read and written


def _drawing_flops(context: EvalContext, requests: list[Request]) -> float:
    """Return the operations of all denoising steps; each branch sees its prompt and its own patches."""
    config, engine, process = context.pipe.exported.model.config, context.pipe.engine, context.pipe.exported.process
    side = context.pipe.exported.image_size // context.pipe.exported.autoencoder.factor
    patches = engine.runner.patches(side, side)
    total = 0
    for request in requests:
        levels = [t / process.config.timesteps for t in Sampler(process, request.sampler).timesteps]
        guided = sum(map(request.guided_at, levels)) if request.guidance_scale != 1 else 0
        prompt = len(layout_document(request.document, engine.grammar)) + 1
        for prefix, steps in ((prompt, len(levels)), (len(engine.runner.null_tokens), guided)):
            total += steps * forward_flops(config, patches, patches * (prefix + patches), 0, [(side, side)])
    return float(total)


@dataclass
class _Timing:
    """The rates of one model. `implementation` describes the device and dtype."""

    context: EvalContext
    prompts: list[str]
    arithmetic: float
    memory: float
    implementation: str
    results: list[Result] = field(default_factory=list)

    def add(self, name: str, value: Estimate, data: str, ceiling: float | None = None) -> None:
        self.results.append(Result.of(name, value, "higher", self.implementation, data, ceiling=ceiling))

    def share(self, rate: Estimate, cost: float, name: str, data: str) -> None:
        """Add a rate times its cost, both per second of the machine, as a share of its capacity."""
        self.add(name, Estimate(rate.value * cost, rate.low * cost, rate.high * cost, rate.count), data, 1.0)

    def write(self) -> None:
        """Time texts written together and one alone."""
        context, rates = self.context, []
        for count in (len(self.prompts), 1):
            starts = [f"{prompt.split()[-1]}:" for prompt in self.prompts[:count]]
            requests = [replace(context.pipe.request([s]), draw="never", max_tokens=TOKENS) for s in starts]
            written: list[int] = []

            def work(requests: list[Request] = requests, written: list[int] = written) -> None:
                written.append(sum(reply.done.text_tokens for reply in context.pipe.replies(requests)))

            seconds = timed(work, context.device)
            rates.append(_rate(written[-1], seconds))
        self.add(WRITING[0], rates[0], f"{len(self.prompts)} texts of up to {TOKENS} tokens")
        self.add(WRITING[1], rates[1], f"one text of up to {TOKENS} tokens")
        # Counted from the config: packed for inference, the weights are not the model's own parameters.
        config, weight = context.pipe.exported.model.config, next(context.pipe.exported.model.parameters())
        embedding = config.vocab_size * config.d_model  # a token reads one row of it
        read = weight.element_size() * (count_parameters(config).transformer - embedding)
        data = f"{read / 1e6:.0f} MB of weights a token; memory {self.memory / 1e9:.1f} GB/s"
        self.share(rates[1], read / self.memory, WRITING[2], data)

    def draw(self) -> None:
        """Time images drawn together and one alone."""
        context, candidates = self.context, self.context.drawing.candidates
        requests = [replace(context.request([prompt]), draw="force", max_tokens=0) for prompt in self.prompts]
        many = _rate(len(requests), timed(lambda: context.pipe.replies(requests, candidates), context.device))
        alone = _rate(1, timed(lambda: context.pipe.replies(requests[:1], candidates), context.device))
        best_of = "" if candidates == 1 else f", each the best of {candidates}"
        self.add(DRAWING[0], many, f"{len(requests)} pictures{best_of}")
        self.add(DRAWING[1], alone, f"one picture{best_of}")
        if context.pipe.exported.model.config.images == "latents":
            flops = candidates * _drawing_flops(context, requests) / len(requests)
            data = f"{flops:.3g} operations a picture; machine {self.arithmetic:.3g} a second"
            self.share(many, flops / self.arithmetic, DENOISING, data)


def _numbers(context: EvalContext) -> list[str]:
    images = context.pipe.exported.model.config.images
    drawing = [] if images == "none" else [*DRAWING, *([DENOISING] if images == "latents" else [])]
    return [*WRITING, *drawing, MEMORY]


def _score(context: EvalContext) -> MetricResult:
    exported, device = context.pipe.exported, context.device
    dtype = next(exported.model.parameters()).dtype
    prompts = [PROMPT] * context.batch
    if context.scorer is not None:
        prompts = list(context.scorer.pairs(context.batch, exported.image_size, "train").prompts)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    implementation = f"{context.version}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    implementation += str(dtype).removeprefix("torch.")
    timing = _Timing(context, prompts, *_machine(device, dtype), implementation)
    timing.write()
    if exported.model.config.images != "none":
        timing.draw()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_memory()
    timing.results.append(Result(MEMORY, peak / 1e9, None, None, 1, "lower", implementation, "this process so far"))
    return MetricResult(timing.results)


def _peak_memory() -> int:
    """Return the largest resident size of this process in bytes. Raises UserError on Windows."""
    try:
        import resource
    except ImportError:
        raise UserError("speed: expected a system with the module resource (Linux, macOS), found none") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


SPEED = Metric(
    "speed",
    "pace of drawing and writing, memory, and the share of the machine",
    lambda context: _peak_memory(),
    _score,
    _numbers,
    True,
    "Reference: all the arithmetic, or memory traffic, that this machine was measured at.",
)
