"""What only a GPU can show: attention against its oracle, MFU and memory of the paper's sizes, denoising and decoding.

    python benchmarks/gpu.py [--only attention,training,inference] [--sizes 0.37b 1.4b] [--arms linear] [--out FILE]
    python benchmarks/gpu.py --quick --device cpu          # tiny shapes: does it run?

**attention**: FlexAttention over a packed row of mixed documents, forward and backward, beside the dense oracle of
N x N (largest difference, relative to the oracle's largest value) and, by time, beside torch's own causal kernel of the
same shape.

**training**: one run of `--rows` x 4,096 positions, half captioned images of 256 patches, half text; random latents,
bfloat16, blocks compiled. Linear 2 x 2 and U-Net patch layers, and a Llama of the same trunk on text alone. A step is
forward, backward, clipping, fused AdamW, the average of the weights. MFU counts executed operations (`train_flops`).
Peak memory is beside what `transfuse plan` says. `--profile` prints where the time goes.

**inference**: a guided denoising step of 8 images of 256 patches, and greedy decoding of 1 and 8 rows, plain, with
compiled blocks, and as CUDA graphs, what recording (or compiling) takes apart: the first of the runs; beside the time
that reading the weights once takes at the copy rate measured here.

Each part is a line of JSON as soon as it is done: one that fails says so, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.autoencoders import Pixels
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.export import Exported, GenerationConfig
from transfuse.inference import Engine, Request
from transfuse.inference.model_runner import ModelRunner
from transfuse.inference.optimize import compile_blocks
from transfuse.model import ModelConfig, Transfusion, dense, flexible
from transfuse.model.costs import Load, count_parameters, train_flops
from transfuse.plan import memory
from transfuse.recipes.paper import paper
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, Tokenizer, collate
from transfuse.training import EMA, ObjectiveConfig, OptimizerConfig, TransfusionObjective, build_optimizer
from transfuse.training.loss import TokenObjective
from transfuse.training.metrics import Meter
from transfuse.training.parallel import compile_block

GRAMMAR = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)
SIDE = 32
"""latent elements along a side of an image of 256 patches"""
SAID = 20
WARM, TIMED = 4, 8


def row(positions: int, channels: int, pictures: bool) -> Batch:
    """One packed row: captioned images and text, about half of the positions each, or text alone."""
    generator = torch.Generator().manual_seed(positions)
    documents, used = [], 0
    while True:
        image = Image(torch.randn(channels, SIDE, SIDE, generator=generator))
        for number, parts in enumerate(([Text((9,) * SAID), image], [Text((9,) * 256)])):
            length = 2 + SAID + 258 if number == 0 else 258
            if used + length > positions:
                return collate(documents, GRAMMAR, multiple=positions)
            if pictures or number:
                documents.append(Document(parts, sample=len(documents)))
                used += length


def seconds(work: Callable[[], object], device: torch.device, warm: int = WARM, timed: int = TIMED) -> float:
    """Of one call: the median, each waited for."""
    found = []
    for number in range(warm + timed):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warm:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


# --- attention --------------------------------------------------------------------------------------------------------


def attention(asked: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    positions = 512 if asked.quick else 4096
    heads, channels = (2, 16) if asked.quick else (16, 64)
    batch = row(positions, 8, pictures=True).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(batch.positions, heads, channels, generator=generator).to(device, dtype) for _ in range(4)]
        upstream = drawn.pop().flatten(1)

        def through(attend: Any, grad: bool = True, up: Tensor = upstream) -> list[Tensor]:
            q, k, v = (x.detach().requires_grad_(grad) for x in drawn)  # noqa: B023
            out = attend(0, q, k, v)
            if not grad:
                return [out]
            out.backward(up)
            return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

        learning = device.type == "cuda"  # FlexAttention's backward refuses the CPU
        ours, oracle = through(flexible(batch), learning), through(dense(batch), learning)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, oracle, strict=True)]
        names = ["output", "dq", "dk", "dv"][: len(apart)]
        found: dict[str, Any] = {
            "attention": str(dtype),
            "positions": positions,
            **dict(zip(names, apart, strict=True)),
        }
        if learning and dtype == torch.bfloat16:
            attend = flexible(batch)
            found["flex ms"] = 1e3 * seconds(lambda: through(attend), device)  # noqa: B023
            found["causal SDPA ms"] = 1e3 * seconds(lambda: through(_causal), device)
        yield found


def _causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).flatten(1)


# --- training ---------------------------------------------------------------------------------------------------------


def training(asked: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    for size in asked.sizes:
        for arm in asked.arms:
            try:
                yield _trained(asked, device, size, arm)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                yield {"training": f"{size} {arm}", "failed": str(error).splitlines()[0]}


def _config(asked: argparse.Namespace, size: str, arm: str) -> ModelConfig:
    config = paper(size, "unet" if arm == "unet" else "linear").model
    config = replace(config, latent_channels=8, images="none" if arm == "llama" else "latents")
    if asked.quick:
        config = replace(config, d_model=64, n_layers=2, n_heads=2, d_ff=128, text_vocab_size=512)
        config = replace(config, unet_channels=(16, 32) if arm == "unet" else None)
    return config


def _trained(asked: argparse.Namespace, device: torch.device, size: str, arm: str) -> dict[str, Any]:
    config, positions = _config(asked, size, arm), 512 if asked.quick else 4096
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = Transfusion.on_meta(config, torch.bfloat16).to_empty(device=device).initialise(0)
    for block in model.transformer.blocks:
        if not asked.quick:
            compile_block(block)
    optimizer, ema = build_optimizer(model, OptimizerConfig()), EMA(model, 0.999)
    objective: Any = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0)
    if arm == "llama":
        objective = TokenObjective(ObjectiveConfig(), 0)
    positions *= asked.rows
    batch = row(positions, 8, arm != "llama").to(device)
    if arm != "llama":  # as a loader does ahead
        batch = objective.sample_noise(batch).to(device)
    scale = torch.tensor(objective.weights, device=device)
    scale /= torch.tensor(objective.counts(batch), device=device).clamp(min=1)

    def step() -> None:
        (objective.loss(model, batch).losses * scale).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, 0)

    took = seconds(step, device)
    if asked.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=20))
    meter = Meter(device)
    flops, peak, used = train_flops(config, batch), meter.peak_flops(), meter.memory()
    images = {(SIDE, SIDE): len(batch.latents)} if arm != "llama" else {}
    planned = sum(memory(config, Load(positions, int(batch.loss_positions.numel()), images), "none").values())
    return {
        "training": f"{size} {arm}",
        "parameters": count_parameters(config).total,
        "positions": batch.quantities["positions"],
        "s a step": took,
        "positions/s": batch.quantities["positions"] / took,
        "executed flop/s": flops / took,
        "MFU": None if peak is None else flops / took / peak,
        "peak GB": None if used is None else used / 1e9,
        "planned GB": planned / 1e9,
        "peak : planned": None if used is None else used / planned,
    }


# --- inference --------------------------------------------------------------------------------------------------------


WAYS = ("plain", "compiled", "recorded")


def copy_rate(device: torch.device, quick: bool) -> float:
    """Bytes a second that a copy reads and writes here."""
    count = 1 << (20 if quick else 30)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / seconds(lambda: target.copy_(source), device)


def inference(asked: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    tokenizer = Tokenizer.train(["a crab on a red background", "two balloons"] * 4, 320)
    config, rate = replace(_config(asked, asked.sizes[0], "linear"), latent_channels=3), copy_rate(device, asked.quick)
    side, steps, written = (8, 4, 8) if asked.quick else (SIDE, 20, 128)
    document = Document([Text(tuple(tokenizer.encode("a crab on a red background")))], closed=False)
    for way in asked.ways:
        model = Transfusion.on_meta(config, torch.bfloat16).to_empty(device=device).initialise(0)
        with torch.no_grad():  # greedy writing must not end early
            model.lm_head.weight[[tokenizer.eos, tokenizer.boi]] = 0
        model = model.to(torch.bfloat16).eval().requires_grad_(False)
        if way == "compiled":
            compile_blocks(model, "eager" if asked.quick else "inductor")
        process = Process(DiffusionConfig(prediction="v"))
        exported = Exported(model, process, Pixels(), tokenizer, side, GenerationConfig())
        engine = Engine(ModelRunner(exported, graphs=way == "recorded"))
        read = 2 * count_parameters(config).transformer / rate
        first: list[float] = []

        def timed(count: int, draw: bool, engine: Engine = engine, first: list[float] = first) -> float:
            asked_for = Request(document, draw="force" if draw else "never", max_tokens=0 if draw else written)
            if draw:
                sampler = SamplerConfig("dpmpp", steps=steps)
                asked_for = replace(asked_for, size=(side, side), sampler=sampler, guidance_scale=3.0)
            requests = [replace(asked_for, seed=seed) for seed in range(count)]
            first.append(seconds(lambda: list(engine.run(requests)), device, warm=0, timed=1))
            return seconds(lambda: list(engine.run(requests)), device, warm=1, timed=3) / (steps if draw else written)

        drawn = timed(8, draw=True)
        flops = 2 * count_parameters(config).transformer * 2 * 8 * (side // 2) ** 2
        peak = Meter(device).peak_flops()
        yield {
            "inference": f"{asked.sizes[0]} linear, {way}",
            "guided denoising step of 8 images, ms": 1e3 * drawn,
            "share of peak": None if peak is None else flops / drawn / peak,
            **{f"token of {rows} rows, ms": 1e3 * timed(rows, draw=False) for rows in (1, 8)},
            "weights read once, ms": 1e3 * read,
            "first runs (8 drawings; 1 and 8 rows of text), s": first,
        }


PARTS = {"attention": attention, "training": training, "inference": inference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--sizes", nargs="+", default=["0.37b", "0.76b", "1.4b"])
    parser.add_argument("--arms", nargs="+", default=["linear", "unet", "llama"], choices=["linear", "unet", "llama"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--rows", type=int, default=4, help="of 4,096 positions, in one run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: list[dict[str, Any]] = [{"device": name, "torch": torch.__version__}]
    print(json.dumps(found[0]), flush=True)
    for part in asked.only.split(","):
        try:
            for line in PARTS[part](asked, device):
                found.append(line)
                print(json.dumps(line), flush=True)
        except Exception:
            traceback.print_exc()
            found.append({part: "failed", "why": traceback.format_exc().splitlines()[-1]})
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
