"""Measure decoding, denoising, training and attention next to a GPU's limits, in one call of ten minutes.

    python benchmarks/gpu.py [--only decode-7b attention] [--seconds 570] [--out FILE]
    python benchmarks/gpu.py --dry-run                     # tiny shapes on the CPU: does every row run?

Each row runs in its own process and within its own seconds, the most important first: one that fails or takes too
long loses nothing of the others, and a row for which no time is left says so. Every reading is a line of JSON as soon
as it is made, and FILE holds all lines so far.

**machine**: what a copy and a matrix product reach here. **decode-0.37b, decode-7b**: greedy decoding of 1, 8 and 32
rows with CUDA graphs, with compiled blocks as well, and without either; the share of the bandwidth is that of reading
the weights, but for the embedding, and the keys and values once; a profile of a token. **denoise**: a guided step of
8 images of 256 patches, plain, recorded, compiled, and both; its operations are those executed. **train-...**: forward
and backward pass, clipping, fused AdamW and weight averaging over 4 rows of 4,096 positions, half captioned images of
256 patches and half text, bfloat16, blocks compiled: linear layers, a Llama on text alone, the U-Net, and float8. Peak
memory is compared with `transfuse plan`. **attention**: FlexAttention over a packed row, as the library uses it, tuned
and with BACKEND="FLASH", next to the dense oracle and to torch's causal kernel. **summary**: ratios between rows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.autoencoders import Pixels
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.errors import UserError
from transfuse.export import Exported, GenerationConfig
from transfuse.inference import Engine, Request
from transfuse.inference.model_runner import ModelRunner
from transfuse.inference.optimize import compile_blocks
from transfuse.model import ModelConfig, Transfusion, dense, flexible
from transfuse.model.attention import block_mask
from transfuse.model.costs import Load, count_parameters, forward_flops, train_flops
from transfuse.plan import memory
from transfuse.recipes.paper import paper
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, Tokenizer, collate
from transfuse.training import (
    EMA,
    Distributed,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TransfusionObjective,
    build_optimizer,
)
from transfuse.training.loss import TokenObjective
from transfuse.training.metrics import Meter
from transfuse.training.parallel import parallelize

Line = dict[str, Any]
GRAMMAR = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)
SIDE = 32  # latent elements along a side of an image of 256 patches
CAPTION = 20
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}  # bytes a second, from the data sheets


class Skipped(Exception):
    """A measurement that this machine cannot make, with the reason."""


@dataclass(frozen=True)
class Settings:
    """The shapes and the device of a call; `dry`: tiny shapes on the CPU, nothing compiled, the same code otherwise."""

    dry: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def config(self, size: str, arm: str = "linear", channels: int = 8) -> ModelConfig:
        """Return a network of the paper's; `arm` is linear, unet, or llama for text alone."""
        config = paper(size, "unet" if arm == "unet" else "linear").model
        config = replace(config, latent_channels=channels, images="none" if arm == "llama" else "latents")
        if self.dry:
            config = replace(config, d_model=64, n_layers=2, n_heads=2, d_ff=128, text_vocab_size=512, max_seq_len=512)
            config = replace(config, unet_channels=(16, 32) if arm == "unet" else None)
        return config

    def seconds(self, work: Callable[[], object], warm: int = 4, timed: int = 8) -> float:
        """Return the median seconds of a call, the device waited for."""
        warm, timed = (1, 1) if self.dry else (warm, timed)
        readings = []
        for number in range(warm + timed):
            began = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= warm:
                readings.append(time.perf_counter() - began)
        return statistics.median(readings)

    def copy_rate(self) -> float:
        """Return the bytes a second that a copy reads and writes here."""
        source = torch.empty(1 << (20 if self.dry else 30), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))


def attempt(line: Line, work: Callable[[], Line]) -> Line:
    """Return `line` with what `work` measures, or with the reason why it measured nothing."""
    gc.collect()  # engines of the measurement before, with their caches
    try:
        return line | work()
    except Skipped as reason:
        return line | {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return line | {"failed": f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"}


def packed_row(positions: int, images: bool, channels: int = 8) -> Batch:
    """One packed row: captioned images and text, about half of the positions each, or text alone."""
    generator = torch.Generator().manual_seed(positions)
    documents: list[Document] = []
    used, captioned = 0, images
    while True:
        parts: list[Text | Image] = [Text((9,) * 256)]
        if captioned:
            parts = [Text((9,) * CAPTION), Image(torch.randn(channels, SIDE, SIDE, generator=generator))]
        length = 2 + CAPTION + 258 if captioned else 258
        if used + length > positions:
            return collate(documents, GRAMMAR, multiple=positions)
        documents.append(Document(parts, sample=len(documents)))
        used += length
        captioned = images and not captioned


def machine(settings: Settings) -> Iterator[Line]:
    count = 256 if settings.dry else 8192
    a, b = (torch.randn(count, count, device=settings.device).bfloat16() for _ in range(2))
    product = 2 * count**3 / settings.seconds(lambda: a @ b)
    cuda = settings.device.type == "cuda"
    yield {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "copy, bytes/s": settings.copy_rate(),
        "matrix product in bfloat16, flop/s": product,
        "peak flop/s": Meter(settings.device).peak_flops(),
    }


# --- inference --------------------------------------------------------------------------------------------------------


def loaded(settings: Settings, size: str) -> tuple[Exported, Document]:
    """Return a network of random weights that never ends a text by itself, and a prompt."""
    tokenizer = Tokenizer.train(["a crab on a red background", "two balloons"] * 4, 320)
    config = settings.config(size, channels=3)
    model = Transfusion.on_meta(config, torch.bfloat16).to(torch.bfloat16).to_empty(device=settings.device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02) if weight.dim() > 1 else weight.fill_(1)
        model.lm_head.weight[[tokenizer.eos, tokenizer.boi]] = 0
    model = model.eval().requires_grad_(False)
    process, side = Process(DiffusionConfig(prediction="v")), 8 if settings.dry else SIDE
    document = Document([Text(tuple(tokenizer.encode("a crab on a red background")))], closed=False)
    return Exported(model, process, Pixels(), tokenizer, side, GenerationConfig()), document


def decode(settings: Settings, size: str) -> Iterator[Line]:
    exported, document = loaded(settings, size)
    config, written = exported.model.config, 8 if settings.dry else 128
    copied, name = settings.copy_rate(), torch.cuda.get_device_name() if settings.device.type == "cuda" else "CPU"

    def engine(rows: int, graphs: bool) -> tuple[Callable[[int], object], list[Request]]:
        made = Engine(ModelRunner(exported, graphs=graphs), slots=rows)
        requests = [Request(document, draw="never", max_tokens=written, seed=seed) for seed in range(rows)]
        return lambda tokens: list(made.run([replace(request, max_tokens=tokens) for request in requests])), requests

    def timed(rows: int, graphs: bool) -> Line:
        run, requests = engine(rows, graphs)
        began = time.perf_counter()
        run(written)
        first = time.perf_counter() - began
        token = settings.seconds(lambda: run(written), warm=1, timed=3) / written
        weights = count_parameters(config).transformer - config.vocab_size * config.d_model
        context = len(exported.tokenizer.encode("a crab on a red background")) + written / 2
        keys = 2 * config.n_layers * config.kv_heads * (config.heads_dim // config.n_heads) * context * len(requests)
        read = 2 * (weights + keys)
        sheet = BANDWIDTH.get(name)
        return {
            "token, ms": 1e3 * token,
            "tokens/s": rows / token,
            "bytes read": read,
            "share of the copy's rate": read / token / copied,
            "share of the bandwidth": None if sheet is None else read / token / sheet,
            "first run, s": first,
        }

    def profiled() -> Line:
        run, _ = engine(1, True)
        run(written)
        with torch.profiler.profile() as profile:
            run(8)
        device = "self_device_time_total" if settings.device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, device))[:16]
        return {"profile of 8 tokens": [[e.key[:80], e.count, getattr(e, device) / 1e3] for e in events]}

    for rows in (1, 8, 32):
        yield attempt({"decode": size, "rows": rows, "way": "recorded"}, partial(timed, rows, True))
    yield attempt({"decode": size, "rows": 1, "way": "recorded"}, profiled)
    yield attempt({"decode": size, "rows": 1, "way": "plain"}, partial(timed, 1, False))
    compile_blocks(exported.model)
    for rows in (1, 8):
        way = {"decode": size, "rows": rows, "way": "compiled and recorded"}
        yield attempt(way, partial(timed, rows, True))


def denoise(settings: Settings) -> Iterator[Line]:
    exported, document = loaded(settings, "0.37b")
    config, images, steps = exported.model.config, 2 if settings.dry else 8, 4 if settings.dry else 20
    side = exported.image_size
    patches = (side // config.patch_size) ** 2
    prompt = len(document.parts[0].ids) + 2 if isinstance(document.parts[0], Text) else 0
    evaluated = 2 * images  # with and without the prompt
    pairs = images * patches * (2 * patches + prompt + 2)
    flops = forward_flops(config, evaluated * patches, pairs, 0, [(side, side)] * evaluated)

    def timed(graphs: bool) -> Line:
        engine = Engine(ModelRunner(exported, graphs=graphs), slots=images)
        sampler = SamplerConfig("dpmpp", steps=steps)
        request = Request(document, draw="force", max_tokens=0, size=(side, side), sampler=sampler, guidance_scale=3.0)
        requests = [replace(request, seed=seed) for seed in range(images)]
        began = time.perf_counter()
        list(engine.run(requests))
        first = time.perf_counter() - began
        step = settings.seconds(lambda: list(engine.run(requests)), warm=1, timed=3) / steps
        peak = Meter(settings.device).peak_flops()
        return {
            "guided step, ms": 1e3 * step,
            "images/s": images / step / steps,
            "executed flop/s": flops / step,
            "share of the peak": None if peak is None else flops / step / peak,
            "first run, s": first,
        }

    for compiled in (False, True):
        if compiled:
            compile_blocks(exported.model)
        for graphs in (True, False):
            way = " and ".join(["compiled"] * compiled + ["recorded"] * graphs) or "plain"
            line = {"denoise": "0.37b", "images": images, "patches": patches, "way": way}
            yield attempt(line, partial(timed, graphs))


# --- training ---------------------------------------------------------------------------------------------------------


def train(settings: Settings, size: str, arm: str = "linear", float8: bool = False) -> Iterator[Line]:
    line = {"train": size, "arm": arm, "float8": float8}
    yield attempt(line, partial(_trained, settings, size, arm, float8))


def _trained(settings: Settings, size: str, arm: str, float8: bool) -> Line:
    config, device, positions = settings.config(size, arm), settings.device, 1024 if settings.dry else 4 * 4096
    model = Transfusion.on_meta(config, torch.bfloat16)
    try:
        model = parallelize(model, Distributed(device=device), ParallelConfig(compile=not settings.dry, float8=float8))
    except UserError as error:
        raise Skipped(str(error)) from None
    model = model.to_empty(device=device).initialise(0)
    optimizer, ema = build_optimizer(model, OptimizerConfig()), EMA(model, 0.999)
    objective: Any = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0)
    if arm == "llama":
        objective = TokenObjective(ObjectiveConfig(), 0)
    batch = packed_row(positions, arm != "llama").to(device)
    if arm != "llama":  # as a loader does in advance
        batch = objective.sample_noise(batch).to(device)
    scale = torch.tensor(objective.weights, device=device)
    scale /= torch.tensor(objective.counts(batch), device=device).clamp(min=1)

    def step() -> None:
        (objective.loss(model, batch).losses * scale).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, 0)

    took = settings.seconds(step)
    meter, flops = Meter(device), train_flops(config, batch)
    peak, used = meter.peak_flops(), meter.memory()
    images = {(SIDE, SIDE): len(batch.latents)} if arm != "llama" else {}
    planned = sum(memory(config, Load(positions, int(batch.loss_positions.numel()), images), "none").values())
    return {
        "parameters": count_parameters(config).total,
        "positions": batch.quantities["positions"],
        "s a step": took,
        "positions/s": batch.quantities["positions"] / took,
        "executed flop/s": flops / took,
        "share of the peak": None if peak is None else flops / took / peak,
        "peak GB": None if used is None else used / 1e9,
        "planned GB": planned / 1e9,
        "peak : planned": None if used is None else used / planned,
    }


# --- attention --------------------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(settings: Settings) -> Iterator[Line]:
    positions, heads = (512, 2) if settings.dry else (4096, 16)
    batch = packed_row(positions, images=True).to(settings.device)
    learning = not settings.dry  # FlexAttention's backward pass refuses the CPU
    for channels in (64, 128):
        line: Line = {"attention": f"{positions} positions, {heads} heads of {channels}"}
        for dtype in (torch.float32, torch.bfloat16):
            named = line | {"dtype": str(dtype).removeprefix("torch.")}
            yield attempt(named, partial(_apart, batch, heads, channels, dtype, learning))
        timed = partial(_timed, settings, (1, heads, positions, channels))
        causal = attempt(line | {"kernel": "causal SDPA"}, partial(timed, lambda: _causal))
        yield causal
        for name, build in _kernels(batch):
            reading = attempt(line | {"kernel": name}, partial(timed, build))
            for part in ("forward, ms", "forward and backward, ms"):
                if part in reading and part in causal:
                    reading |= {f"of causal SDPA, {part.removesuffix(', ms')}": causal[part] / reading[part]}
            yield reading


def _kernels(batch: Batch) -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """Yield ways to run FlexAttention, each built when it is called; one that torch lacks raises Skipped."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(batch.kv_start, batch.kv_end, batch.gaps)

    def tuned() -> Kernel:
        compiled = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def flash() -> Kernel:
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            raise Skipped(f"BACKEND FLASH: torch {torch.__version__} needs flash_attn.cute, which is not installed")
        compiled: Any = torch.compile(flex_attention)
        options = {"BACKEND": "FLASH"}
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=options)

    def ours() -> Kernel:
        attend = flexible(batch)
        return lambda q, k, v: attend(0, *(x[0].transpose(0, 1) for x in (q, k, v)))

    yield "FlexAttention, as the library uses it", ours
    yield "FlexAttention, BACKEND FLASH", flash
    yield "FlexAttention, tuned", tuned


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _timed(settings: Settings, shape: tuple[int, ...], build: Callable[[], Kernel]) -> Line:
    generator, kernel, learning = torch.Generator().manual_seed(0), build(), not settings.dry
    drawn = [torch.randn(shape, generator=generator).to(settings.device, torch.bfloat16) for _ in range(4)]
    q, k, v = (x.requires_grad_(learning) for x in drawn[:3])
    line = {"forward, ms": 1e3 * settings.seconds(lambda: kernel(q, k, v))}
    if learning:
        out = kernel(q, k, v)
        upstream = drawn[3].view_as(out)
        line["forward and backward, ms"] = 1e3 * settings.seconds(lambda: kernel(q, k, v).backward(upstream))
    return line


def _apart(batch: Batch, heads: int, channels: int, dtype: torch.dtype, learning: bool) -> Line:
    """Return the largest differences from the dense oracle, relative to its largest value."""
    generator = torch.Generator().manual_seed(0)
    shape, device = (batch.positions, heads, channels), batch.input_ids.device
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]

    def through(attend: Any) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_(learning) for x in drawn[:3])
        out = attend(0, q, k, v)
        if learning:
            out.backward(drawn[3].flatten(1))
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    pairs = zip(through(flexible(batch)), through(dense(batch)), strict=True)
    return {
        name: float((a - b).abs().max() / b.abs().max())
        for name, (a, b) in zip(("output", "dq", "dk", "dv"), pairs, strict=False)
    }


# --- rows, each in its own process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    seconds: float
    """after which its process is ended"""
    measure: Callable[[Settings], Iterator[Line]]


ROWS = {
    "machine": Row(30, machine),
    "decode-0.37b": Row(90, lambda settings: decode(settings, "0.37b")),
    "denoise": Row(90, denoise),
    "train-0.37b": Row(60, lambda settings: train(settings, "0.37b")),
    "train-1.4b": Row(75, lambda settings: train(settings, "1.4b")),
    "decode-7b": Row(90, lambda settings: decode(settings, "7b")),
    "attention": Row(120, attention),
    "train-text": Row(60, lambda settings: train(settings, "0.37b", "llama")),
    "train-unet": Row(75, lambda settings: train(settings, "0.37b", "unet")),
    "train-float8": Row(75, lambda settings: train(settings, "1.4b", float8=True)),
}


def measure(name: str, settings: Settings) -> Iterator[Line]:
    """Yield the readings of a row; an error ends it with a line that names it."""
    try:
        with torch.compiler.set_stance("force_eager" if settings.dry else "default"):
            for line in ROWS[name].measure(settings):
                yield {"row": name, **line}
    except Exception as error:
        traceback.print_exc()
        yield {"row": name, "failed": f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"}


def run_rows(
    budgets: dict[str, float], command: Callable[[str], list[str]], seconds: float, write: Callable[[Line], None]
) -> None:
    """Run the command of each row in turn, within its budget and `seconds` in all; `write` gets its lines of JSON."""
    deadline = time.monotonic() + seconds
    for name, budget in budgets.items():
        left = min(budget, deadline - time.monotonic())
        if left <= 0:
            write({"row": name, "skipped": f"the {seconds:g} seconds of the call were over"})
            continue
        process = subprocess.Popen(command(name), stdout=subprocess.PIPE, text=True, start_new_session=True)
        expired = threading.Event()

        def end(process: subprocess.Popen[str] = process, expired: threading.Event = expired) -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that compile for it

        timer = threading.Timer(left, end)
        timer.start()
        assert process.stdout is not None
        try:
            for text in process.stdout:
                try:
                    line = json.loads(text) if text.startswith("{") else None
                except ValueError:  # a line that was cut
                    line = None
                if line is None:
                    print(text, end="", file=sys.stderr)
                else:
                    write(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # this process was interrupted
                end()
        if expired.is_set():
            write({"row": name, "failed": f"ended after {left:.0f} seconds"})
        elif code:
            write({"row": name, "failed": f"exit code {code}"})


def summary(lines: list[Line]) -> Line:
    """Return the ratios between rows, of those that were measured."""
    trained = {line["row"]: line for line in lines if "positions/s" in line}
    ratios: Line = {"row": "summary"}
    for name, first, second, field in (
        ("mixed : text, time a position", "train-text", "train-0.37b", "positions/s"),
        ("U-Net : linear, operations a second", "train-unet", "train-0.37b", "executed flop/s"),
        ("float8 : bfloat16, positions a second", "train-float8", "train-1.4b", "positions/s"),
    ):
        if first in trained and second in trained:
            ratios[name] = trained[first][field] / trained[second][field]
    return ratios


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seconds", type=float, default=570, help="of the whole call")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: does every row run?")
    parser.add_argument("--row", choices=[*ROWS], help=argparse.SUPPRESS)  # of a process that measures one
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.row is not None:
        for line in measure(given.row, Settings(given.dry_run)):
            print(json.dumps(line), flush=True)
        return
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none; --dry-run needs none")
    lines: list[Line] = []

    def write(line: Line) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if given.out is not None:
            partial = given.out.with_name(given.out.name + ".partial")
            partial.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
            partial.replace(given.out)

    child = [sys.executable, __file__, *(["--dry-run"] if given.dry_run else []), "--row"]
    run_rows({name: ROWS[name].seconds for name in given.only}, lambda name: [*child, name], given.seconds, write)
    write(summary(lines))


if __name__ == "__main__":
    main()
