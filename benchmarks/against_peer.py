"""Side by side with transfusion-pytorch 0.20: training, memory, drawing, writing. One process, alternated.

    python benchmarks/against_peer.py [--quick] [--rounds 5] [--only training,memory,image,text,prefix] [--out FILE]
    python benchmarks/against_peer.py --profile ours-training-bf16

Every round measures the contenders one after another (A B A B ...), and a ratio is always taken within a round: a
machine that is slower for a while is slower for both. Rounds in which something else used the processor are flagged and
left out of the medians as long as clean ones remain. What is compared, and on what terms: benchmarks/README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # the peer draws a progress bar for every call; that is not its speed

import argparse
import gc
import json
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from transfuse.autoencoders import Pixels
from transfuse.devices import keep_freed_memory
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.export import Exported, GenerationConfig
from transfuse.inference import Done, Engine, ImageProgress, Request
from transfuse.inference.optimize import Quantize, check_quantize, pack, quantize_blocks
from transfuse.model import ModelConfig, Transfusion
from transfuse.model.costs import train_flops
from transfuse.sequence import Document, Image, Text, Tokenizer, collate
from transfuse.training import ObjectiveConfig, OptimizerConfig, TransfusionObjective, build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEASURES = ("training", "memory", "image", "text", "prefix")
GUIDANCE = 3.0  # the peer's default scale
IMAGE_WEIGHT = 5.0  # lambda of the paper
CROWDED_SHARE = 0.95  # of the wall clock, which the main thread must have spent running
CROWDED_SWITCHES = 60

Work = Callable[[], object]


@dataclass(frozen=True)
class Scale:
    """What is measured: the networks, a batch, and how much of everything."""

    width: int = 384
    depth: int = 8
    heads: int = 6
    vocabulary: int = 4096
    wide: Mapping[str, int] = field(
        default_factory=lambda: {"d_model": 640, "n_layers": 9, "n_heads": 10, "d_ff": 1664}
    )
    """our network with as many parameters as the peer's of the size above (checked: within 2 %)"""
    samples: int = 16
    text: int = 32
    channels: int = 4
    side: int = 16
    """rows and columns of a latent; with patches of 2 x 2 and 4 channels a patch has 16 numbers"""
    steps: int = 2
    """training steps of each contender in a round"""
    midpoints: int = 8
    """sampler steps of the peer, of two evaluations each; ours takes as many evaluations"""
    written: int = 96
    """tokens written for each prompt"""
    prefixes: tuple[int, int] = (32, 1024)
    gemm: int = 2048

    @property
    def patches(self) -> int:
        return self.side**2 // 4

    @property
    def useful_tokens(self) -> int:
        """Text tokens and patches of a batch: what a user brings. The two add different markers: not counted."""
        return self.samples * (self.text + self.patches)


QUICK = Scale(
    width=64,
    depth=2,
    heads=2,
    vocabulary=512,
    wide={"d_model": 96, "n_layers": 3, "n_heads": 3},
    samples=4,
    text=8,
    side=8,
    steps=1,
    midpoints=2,
    written=8,
    prefixes=(8, 64),
    gemm=256,
)


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Reading:
    """One timed piece of work: seconds of wall clock, of all our threads, of the main thread, and switches forced."""

    wall: float
    cpu: float
    main: float
    switches: int

    @property
    def crowded(self) -> bool:
        """Whether something else used the processor: the main thread has a part in all work, so it never waits."""
        return self.main < CROWDED_SHARE * self.wall or self.switches > max(3.0, CROWDED_SWITCHES * self.wall)

    def over(self, count: int) -> Reading:
        """The mean of `count` equal pieces of it."""
        return Reading(self.wall / count, self.cpu / count, self.main / count, round(self.switches / count))


def read(work: Work, times: int = 1) -> Reading:
    """Run `work` and return its reading, per run."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    wall, cpu, main = time.perf_counter(), time.process_time(), time.thread_time()
    for _ in range(times):
        work()
    wall, cpu, main = time.perf_counter() - wall, time.process_time() - cpu, time.thread_time() - main
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
    return Reading(wall, cpu, main, switches).over(times)


def alternate(contenders: Mapping[str, Work], rounds: int, times: int = 1) -> dict[str, list[Reading]]:
    """Warm everybody up, then measure in turn: A B A B ... Gives each contender's reading of every round."""
    for work in contenders.values():
        work()
    found: dict[str, list[Reading]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            found[name].append(read(work, times))
    return found


@dataclass
class Row:
    """A line of the table: a figure for each side, the ratio of every round, and what was hoped for."""

    name: str
    unit: str
    ours: float
    peer: float | None
    ratio: float | None = None
    ratios: list[float] = field(default_factory=list)
    clean: int = 0
    rounds: int = 0
    target: float | None = None
    at_most: bool = False
    note: str = ""
    readings: dict[str, list[Reading]] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        value = self.ours if self.ratio is None else self.ratio
        if self.target is None or (self.rounds and not self.clean):
            return None  # a round in which something else ran proves nothing, either way
        return value <= self.target if self.at_most else value >= self.target


def clean_rounds(*readings: Sequence[Reading]) -> list[int]:
    """Numbers of the rounds in which nobody was disturbed; all of them where none is."""
    together = list(zip(*readings, strict=True))
    clean = [number for number, those in enumerate(together) if not any(reading.crowded for reading in those)]
    return clean or list(range(len(together)))


def compare(
    name: str,
    unit: str,
    amount: float,
    found: Mapping[str, list[Reading]],
    sides: tuple[str, str],
    target: float | None = None,
) -> Row:
    """How many times as fast `sides[0]` is as `sides[1]`: the median over clean rounds of ratios taken in one round."""
    ours, peer = (found[side] for side in sides)
    used = clean_rounds(ours, peer)
    ratios = [b.wall / a.wall for a, b in zip(ours, peer, strict=True)]
    return Row(
        name,
        unit,
        statistics.median(amount / ours[number].wall for number in used),
        statistics.median(amount / peer[number].wall for number in used),
        statistics.median(ratios[number] for number in used),
        ratios,
        sum(not (a.crowded or b.crowded) for a, b in zip(ours, peer, strict=True)),
        len(ours),
        target,
        readings={"ours": ours, "peer": peer},
    )


def gemm_shapes(scale: Scale) -> list[tuple[int, int, int]]:
    """Products of the training step itself, of both our networks, and one large square for the machine's best."""
    rows = scale.samples * (scale.text + scale.patches + 4)
    shapes = [(scale.gemm, scale.gemm, scale.gemm)]
    for config in (our_config(scale), our_config(scale, **scale.wide)):
        width, hidden = config.d_model, config.ffn_dim
        shapes += [(rows, width, 3 * width), (rows, width, 2 * hidden), (rows, hidden, width)]
        shapes += [(scale.samples * scale.text, width, config.text_vocab_size)]
    return shapes


def gemm_rate(scale: Scale, dtype: torch.dtype) -> float:
    """The best rate, in operations a second, at which this machine multiplies matrices just now."""
    best = 0.0
    for m, k, n in gemm_shapes(scale):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        nn.functional.linear(a, b)
        for _ in range(4):
            best = max(best, 2 * m * k * n / read(partial(nn.functional.linear, a, b)).wall)
    return best


# ------------------------------------------------------------------------------------------------------------- ours


def our_config(scale: Scale, **changes: Any) -> ModelConfig:
    sizes = {"d_model": scale.width, "n_layers": scale.depth, "n_heads": scale.heads, **changes}
    return ModelConfig(text_vocab_size=scale.vocabulary, latent_channels=scale.channels, patch_size=2, **sizes)


def our_samples(scale: Scale, tokenizer: Tokenizer) -> list[Document]:
    generator = torch.Generator().manual_seed(1)
    return [
        Document(
            [
                Text(tuple(torch.randint(8, tokenizer.vocab_size, (scale.text,), generator=generator).tolist())),
                Image(torch.randn(scale.channels, scale.side, scale.side, generator=generator)),
            ],
            sample=number,
        )
        for number in range(scale.samples)
    ]


def some_tokenizer(scale: Scale) -> Tokenizer:
    """A tokenizer with a full vocabulary, from words nobody uses."""
    drawn = torch.randint(0, 26, (4 * scale.vocabulary, 7), generator=torch.Generator().manual_seed(2)).tolist()
    return Tokenizer.train(["".join(chr(97 + letter) for letter in word) for word in drawn], scale.vocabulary)


def our_training(scale: Scale, config: ModelConfig, dtype: torch.dtype) -> tuple[Work, float]:
    """A training step as `Trainer` makes it, without files and without averaged weights; and what it executes."""
    tokenizer = some_tokenizer(scale)
    grammar, samples = config.sequence_format(tokenizer), our_samples(scale, tokenizer)
    model = Transfusion(config, compute_dtype=dtype).initialise(0).train()
    settings = OptimizerConfig()
    optimizer = build_optimizer(model, settings)
    objective = TransfusionObjective(ObjectiveConfig(image_weight=IMAGE_WEIGHT), Process(DiffusionConfig()), seed=0)

    def step() -> None:
        batch = collate(samples, grammar)
        counts = objective.counts(batch)
        scales = torch.tensor([w / max(1, count) for w, count in zip(objective.weights, counts, strict=True)])
        sums = objective.loss(model, batch)
        (sums.losses.float() * scales).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, train_flops(config, collate(samples, grammar))


def our_engine(scale: Scale, dtype: torch.dtype, context: int = 4096, kind: Quantize | None = None) -> Engine:
    tokenizer = some_tokenizer(scale)
    model = Transfusion(our_config(scale, max_seq_len=context), compute_dtype=dtype).initialise(0)
    with torch.no_grad():
        # Greedy writing must not end early: all these scores are zero, and the largest of thousands never is.
        model.lm_head.weight[[tokenizer.eos, tokenizer.boi]] = 0
    model = model.to(dtype).eval().requires_grad_(False)
    process = Process(DiffusionConfig(prediction="v"))
    if kind is None:
        pack(model)  # as `transfuse.load` does
    else:
        quantize_blocks(model, kind, check_quantize(kind, torch.device("cpu")))
    return Engine(Exported(model, process, Pixels(), tokenizer, scale.side, GenerationConfig()))


def prompt(scale: Scale, engine: Engine, positions: int, number: int) -> Document:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(8, engine.runner.tokenizer.vocab_size, (positions,), generator=generator)
    return Document([Text(tuple(ids.tolist()))], closed=False)


def image_request(scale: Scale, engine: Engine, text: int, evaluations: int) -> Request:
    return Request(
        prompt(scale, engine, text, 0),
        draw="force",
        max_tokens=0,
        size=(scale.side, scale.side),
        sampler=SamplerConfig("dpmpp", steps=evaluations),
        guidance_scale=GUIDANCE,
    )


def our_image(scale: Scale, engine: Engine, evaluations: int) -> Work:
    request = image_request(scale, engine, scale.text, evaluations)

    def draw() -> None:
        made = next(event for event in engine.run([request]) if isinstance(event, Done)).network_evaluations
        assert made == evaluations, f"image: expected {evaluations} evaluations, found {made}"

    return draw


def our_text(scale: Scale, engine: Engine, rows: int) -> Work:
    requests = [
        Request(prompt(scale, engine, scale.text, row), draw="never", max_tokens=scale.written) for row in range(rows)
    ]

    def write() -> None:
        written = [event.text_tokens for event in engine.run(requests) if isinstance(event, Done)]
        assert written == [scale.written] * rows, f"text: expected {scale.written} tokens in every row, found {written}"

    return write


# ------------------------------------------------------------------------------------------------------------- peer


def build_peer(scale: Scale) -> Any:
    """The peer of the same width, depth and heads; every other setting that changes the network is its default.

    add_pos_emb is on, as in its README: its patches share one rotary position and would else be told apart by nothing.
    Its own caption drop (prob_uncond) is off, because our batch drops none either.
    """
    from loguru import logger
    from transfusion_pytorch import Transfusion as Peer

    logger.remove()
    torch.manual_seed(0)
    side = scale.side // 2
    return Peer(
        num_text_tokens=scale.vocabulary,
        dim_latent=4 * scale.channels,
        modality_default_shape=(side, side),
        modality_num_dim=2,
        add_pos_emb=True,
        flow_loss_weight=IMAGE_WEIGHT,
        prob_uncond=0.0,
        transformer={
            "dim": scale.width,
            "depth": scale.depth,
            "heads": scale.heads,
            "dim_head": scale.width // scale.heads,
        },
    )


def mixed(dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)


def peer_training(scale: Scale, dtype: torch.dtype, compile_seconds: int = 0) -> Work:
    """The same optimizer, clipping and sample sizes; its forward takes the raw samples, as our step does."""
    peer = build_peer(scale).train()
    if compile_seconds:
        from torch._inductor import config  # here, because it is heavy and memory is measured too

        config.compile_threads = 1  # workers left behind by the time limit would disturb every round
        peer.transformer.compile()
    settings = OptimizerConfig()
    optimizer = build_optimizer(peer, settings)
    generator = torch.Generator().manual_seed(1)
    side, numbers = scale.side // 2, 4 * scale.channels
    samples = [
        [
            torch.randint(0, scale.vocabulary, (scale.text,), generator=generator),
            torch.randn(side, side, numbers, generator=generator),
        ]
        for _ in range(scale.samples)
    ]

    def step() -> None:
        with mixed(dtype):
            loss = peer(samples)
        loss.backward()
        nn.utils.clip_grad_norm_(peer.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if compile_seconds:
        with limit(compile_seconds):
            step()
    return step


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"torch.compile of the peer took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peer_text(scale: Scale, rows: int, dtype: torch.dtype, cast: bool) -> Work:
    """Its cached `generate_text_only`, greedy; bfloat16 by autocast, or with the weights themselves cast."""
    peer = build_peer(scale).eval().requires_grad_(True)  # autocast keeps a cast weight only if it requires a gradient
    peer = peer.to(dtype) if cast else peer
    prompts = torch.randint(0, scale.vocabulary, (rows, scale.text), generator=torch.Generator().manual_seed(3))

    @torch.inference_mode()
    def write() -> None:
        with nullcontext() if cast else mixed(dtype):
            out = peer.generate_text_only(prompts, scale.text + scale.written, temperature=0.0, cache_kv=True)
        assert out.shape == (rows, scale.written)

    return write


def peer_image(scale: Scale, dtype: torch.dtype, method: str) -> Work:
    """One image, guided, by `sample_many` or `sample_one`; both stop behind it, for max_length is then spent."""
    peer = build_peer(scale).eval()
    ids = torch.randint(0, scale.vocabulary, (scale.text,), generator=torch.Generator().manual_seed(3))
    shape = (scale.side // 2, scale.side // 2)
    settings: dict[str, Any] = {
        "max_length": 1,
        "force_modality_at_start": (0, shape),
        "fixed_modality_shape": shape,
        "modality_steps": scale.midpoints + 1,  # it takes points in time; the steps lie between them
        "cfg_scale": GUIDANCE,
    }

    @torch.inference_mode()
    def draw() -> None:
        with mixed(dtype):
            if method == "sample_many":
                peer.sample_many([ids], **settings)
            else:
                peer.sample_one(ids, cache_kv=True, **settings)

    return draw


def fastest(candidates: Mapping[str, Work]) -> tuple[str, Work]:
    """The peer's best way: each is tried three times, and the best of the last two counts."""
    seconds = {}
    for name, work in candidates.items():
        work()
        seconds[name] = min(read(work).wall for _ in range(2))
    chosen = min(seconds, key=lambda name: seconds[name])
    say(f"  peer: {', '.join(f'{name} {1000 * s:.0f} ms' for name, s in seconds.items())}; taken: {chosen}")
    return chosen, candidates[chosen]


# --------------------------------------------------------------------------------------------------------- measures


def measure_training(scale: Scale, rounds: int, compile_seconds: int) -> Iterator[Row]:
    rows = [scale.width, scale.wide["d_model"]]
    for name, dtype in DTYPES.items():
        say(f"training {name}: width {rows[0]} and {rows[1]} against the peer")
        small, small_flops = our_training(scale, our_config(scale), dtype)
        wide, wide_flops = our_training(scale, our_config(scale, **scale.wide), dtype)
        rates: list[float] = []
        peer, mode = peer_step(scale, dtype, compile_seconds)
        compile_seconds = compile_seconds if mode == "compiled" else 0  # what failed once fails again, after as long
        contenders = {
            "peer": peer,
            "ours": small,
            "wide": wide,
            "gemm": lambda: rates.append(gemm_rate(scale, dtype)),  # noqa: B023
        }
        found = alternate(contenders, rounds, scale.steps)
        gemm = [max(rates[1 + r * scale.steps : 1 + (r + 1) * scale.steps]) for r in range(rounds)]
        tokens = scale.useful_tokens
        for what, side, least in (("width and depth", "ours", 3.3), ("parameters", "wide", 1.3)):
            row = compare(f"training {name}, same {what}", "tokens/s", tokens, found, (side, "peer"), least)
            yield replace(row, note=f"peer {mode}")
        target = 0.6 if name == "bf16" else None
        yield gemm_share(f"share of GEMM rate {name}, width {rows[0]}", small_flops, found["ours"], gemm, target)
        yield gemm_share(f"share of GEMM rate {name}, width {rows[1]}", wide_flops, found["wide"], gemm, target)
        del contenders, small, wide, peer
        gc.collect()


def peer_step(scale: Scale, dtype: torch.dtype, compile_seconds: int) -> tuple[Work, str]:
    """The peer's training step, compiled where that is asked for and can be done in time; and which it is."""
    if compile_seconds:
        try:
            return peer_training(scale, dtype, compile_seconds), "compiled"
        except Exception as error:  # whatever the compiler raises, the peer in eager mode still stands
            say(f"  peer: not compiled ({type(error).__name__}: {str(error).splitlines()[0][:100]}); eager instead")
            torch.compiler.reset()
    return peer_training(scale, dtype), "eager"


def gemm_share(name: str, flops: float, steps: list[Reading], rates: list[float], target: float | None) -> Row:
    """Operations executed a second, over the rate of plain matrix products in the same round."""
    used = clean_rounds(steps)
    shares = [flops / step.wall / rate for step, rate in zip(steps, rates, strict=True)]
    achieved = statistics.median(flops / steps[number].wall for number in used) / 1e9
    machine = statistics.median(rates[number] for number in used) / 1e9
    share = statistics.median(shares[number] for number in used)
    clean = sum(not step.crowded for step in steps)
    note = f"machine: {machine:.0f} Gop/s (best of the run {max(rates) / 1e9:.0f})"
    return Row(name, "Gop/s", achieved, None, share, shares, clean, len(steps), target, note=note)


def measure_image(scale: Scale, rounds: int) -> Iterator[Row]:
    evaluations = 2 * scale.midpoints
    for name, dtype in DTYPES.items():
        say(f"image {name}: {scale.patches} patches, guided, {evaluations} evaluations each")
        methods = {method: peer_image(scale, dtype, method) for method in ("sample_many", "sample_one")}
        chosen, draw = fastest(methods)
        work = {"peer": draw, "ours": our_image(scale, our_engine(scale, dtype), evaluations)}
        found = alternate(work, rounds)
        row = compare(f"image {name}, batch 1, guided", "evaluations/s", evaluations, found, ("ours", "peer"), 4.0)
        assert row.peer is not None
        row.note = (
            f"peer {chosen}: midpoint, 2 evaluations a step; per sampler step "
            f"{row.ours:.1f}/s against {row.peer / 2:.1f}/s: {2 * (row.ratio or 0):.1f}x"
        )
        yield row


def measure_text(scale: Scale, rounds: int) -> Iterator[Row]:
    for name, dtype in DTYPES.items():
        engine = our_engine(scale, dtype)
        for rows in (1, 8):
            say(f"text {name}: {rows} x {scale.written} tokens after {scale.text}, greedy, cached")
            ways = {"autocast" if name == "bf16" else "fp32": peer_text(scale, rows, dtype, cast=False)}
            if name == "bf16":
                ways["weights cast"] = peer_text(scale, rows, dtype, cast=True)
            chosen, write = fastest(ways)
            found = alternate({"peer": write, "ours": our_text(scale, engine, rows)}, rounds)
            target = 2.0 if name == "fp32" else 3.0
            row = compare(
                f"text {name}, batch {rows}", "tokens/s", rows * scale.written, found, ("ours", "peer"), target
            )
            yield replace(row, note=f"peer generate_text_only, {chosen}")


def measure_prefix(scale: Scale, rounds: int) -> Iterator[Row]:
    """A guided denoising step behind a long prefix against one behind a short one: the engine's own steps, timed."""
    evaluations = 2 * scale.midpoints
    for name, dtype in DTYPES.items():
        say(f"prefix {name}: {scale.prefixes[0]} and {scale.prefixes[1]} positions")
        engine = our_engine(scale, dtype)
        # Beside the text, BOS and BOI lie in the cache.
        requests = {p: image_request(scale, engine, p - 2, evaluations) for p in scale.prefixes}
        readings: dict[int, list[Reading]] = {p: [] for p in scale.prefixes}
        for number in range(rounds + 1):
            for prefix, request in requests.items():
                reading = denoise_reading(engine, request)
                if number:  # the first is the warm-up
                    readings[prefix].append(reading)
        short, long = (readings[p] for p in scale.prefixes)
        used = clean_rounds(short, long)
        ratios = [b.wall / a.wall for a, b in zip(short, long, strict=True)]
        milliseconds = [1000 * statistics.median(r.wall for r in readings[p]) for p in scale.prefixes]
        yield Row(
            f"denoising step {name}, prefix {scale.prefixes[1]} over {scale.prefixes[0]}",
            "ms",
            milliseconds[1],
            None,
            statistics.median(ratios[number] for number in used),
            ratios,
            sum(not (a.crowded or b.crowded) for a, b in zip(short, long, strict=True)),
            rounds,
            2.0,
            at_most=True,
            note=f"behind {scale.prefixes[0]}: {milliseconds[0]:.1f} ms",
            readings={"long": long, "short": short},
        )


def denoise_reading(engine: Engine, request: Request) -> Reading:
    """The mean denoising step of one image, without the prompt's pass: from the first progress event to the last."""
    events = engine.run([request])
    steps = iter(event for event in events if isinstance(event, ImageProgress))
    next(steps)
    remaining = request.sampler.steps - 1

    def finish() -> None:
        for event in steps:
            if event.step == event.total:
                return

    return read(finish).over(remaining)


def measure_memory(scale: Scale, quick: bool) -> Iterator[Row]:
    """Largest resident memory of a process that does nothing but train; each side in a process of its own."""
    for name in DTYPES:
        peak = {}
        for side in ("ours", "peer"):
            say(f"memory {name}: {side}")
            command = [sys.executable, __file__, "--measure-memory", side, "--dtype", name]
            done = subprocess.run(command + ["--quick"] * quick, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"memory of {side} in {name}: the process failed\n{done.stderr}")
            peak[side] = json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 1e9
        yield Row(
            f"peak memory of training {name}",
            "GB",
            peak["ours"],
            peak["peer"],
            target=1.2,
            at_most=True,
            note=f"{peak['peer'] / peak['ours']:.1f}x",
        )


def report_memory(scale: Scale, side: str, dtype: torch.dtype) -> None:
    """The subprocess of `measure_memory`: three steps, and the peak as a line of JSON."""
    step = our_training(scale, our_config(scale), dtype)[0] if side == "ours" else peer_training(scale, dtype)
    for _ in range(3):
        step()
    print(json.dumps({"peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """Largest resident memory of this process so far.

    On Linux getrusage hands a parent's peak down to its children, which would give both sides ours: VmHWM does not.
    """
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def profile(scale: Scale, what: str) -> None:
    """Print where our own time goes: `ours-training-bf16`, `ours-image-fp32`, `ours-text-bf16` and so on."""
    _, path, name = what.split("-")
    dtype = DTYPES[name]
    if path == "training":
        work = our_training(scale, our_config(scale), dtype)[0]
    elif path == "image":
        work = our_image(scale, our_engine(scale, dtype), 2 * scale.midpoints)
    else:
        work = our_text(scale, our_engine(scale, dtype), rows=8)
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        reading = read(work)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
    print(f"{what}: {1000 * reading.wall:.1f} ms wall, {1000 * reading.cpu:.1f} ms of all threads, under the profiler")


# ------------------------------------------------------------------------------------------------------------ report


def say(line: str) -> None:
    """Progress goes to the error stream: the last line of the output is JSON."""
    print(line, file=sys.stderr, flush=True)


def describe(scale: Scale, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was compared, in full: it is printed, and goes into the JSON."""
    peer = sum(parameter.numel() for parameter in build_peer(scale).parameters())
    count = [
        sum(p.numel() for p in Transfusion.on_meta(our_config(scale, **changes)).parameters())
        for changes in ({}, scale.wide)
    ]
    if not arguments.quick and abs(count[1] / peer - 1) > 0.02:
        raise SystemExit(f"wide network: expected {peer} parameters within 2 %, found {count[1]}")
    return {
        "versions": {name: version(name) for name in ("transfuse", "transfusion-pytorch", "torch")},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "parameters": {"ours": count[0], "ours wide": count[1], "peer": peer},
        "settings": {
            "peer": "bf16 by autocast (text: or cast weights, whichever is faster), modality_processing auto, "
            f"add_pos_emb on, prob_uncond 0, {'torch.compile in training' if arguments.compile_peer else 'eager'}",
            "ours": "fp32 master weights in training, cast weights in inference, eager",
            "both": f"fused AdamW, clip 1, lambda {IMAGE_WEIGHT:g}, guidance {GUIDANCE:g}, greedy text",
        },
        "rounds": arguments.rounds,
        "quick": arguments.quick,
        "scale": asdict(scale),
    }


def print_table(rows: Sequence[Row], judge: bool) -> None:
    """The table for people. `judge`: say which targets are met; tiny shapes have none."""
    print(f"\n{'':52} {'ours':>10} {'peer':>10} {'unit':14} {'ratio':>6} {'(range)':13} {'target':>7} {'clean':>5}")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"({min(row.ratios):.2f}-{max(row.ratios):.2f})" if row.ratios else ""
        target = "" if row.target is None or not judge else f"{'<=' if row.at_most else '>='} {row.target:g}"
        verdict = "" if row.target is None or not judge else {True: "met", False: "MISSED", None: "disturbed"}[row.met]
        clean = f"{row.clean}/{row.rounds}" if row.rounds else ""
        peer = "" if row.peer is None else f"{row.peer:.4g}"
        print(
            f"{row.name:52} {row.ours:>10.4g} {peer:>10} {row.unit:14} {ratio:>6} {spread:13} {target:>7} {clean:>5} "
            f"{verdict}"
        )
        if row.note:
            print(f"    {row.note}")
    if any(row.rounds and row.clean < row.rounds for row in rows):
        print("\nSome rounds were disturbed by other work on this machine. Where 'clean' is 0, nothing is decided.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each comparison")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, seconds: to see that it runs")
    parser.add_argument("--only", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--compile-peer", type=int, nargs="?", const=300, default=0, metavar="SECONDS")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--profile", metavar="ours-(training|image|text)-(bf16|fp32)", help="profile one path, no more")
    parser.add_argument("--measure-memory", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(MEASURES):
        parser.error(f"--only: expected some of {','.join(MEASURES)}, found {','.join(sorted(unknown))}")
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {arguments.rounds}")
    return arguments


def main() -> None:
    keep_freed_memory()  # as the command line does; the peer gains by it too
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    scale = QUICK if arguments.quick else Scale()
    if arguments.measure_memory:
        report_memory(scale, arguments.measure_memory, DTYPES[arguments.dtype])
        return
    if arguments.profile:
        profile(scale, arguments.profile)
        return
    about = describe(scale, arguments)
    print(json.dumps({key: value for key, value in about.items() if key != "scale"}, indent=2))
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "training": lambda: measure_training(scale, arguments.rounds, arguments.compile_peer),
        "memory": lambda: measure_memory(scale, arguments.quick),
        "image": lambda: measure_image(scale, arguments.rounds),
        "text": lambda: measure_text(scale, arguments.rounds),
        "prefix": lambda: measure_prefix(scale, arguments.rounds),
    }
    rows = [row for name in MEASURES if name in arguments.only.split(",") for row in measures[name]()]
    print_table(rows, judge=not arguments.quick)
    line = json.dumps(about | {"rows": [asdict(row) | {"met": None if arguments.quick else row.met} for row in rows]})
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
