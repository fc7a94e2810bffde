"""What the engine costs: the trainer's step beside a bare loop, and mixed rows beside rows of text.

    python benchmarks/engine.py [--rounds 9] [--quick] [--out FILE]

**Bare loop**: the same network, objective, batches, AdamW and average of the weights, and nothing else: no counts of
ranks, no guard, no metrics, no clock. A step of one, a step of the other, in turn, each with a network of its own, from
the same documents, which both lay out. The trainer's round ends with the line it logs.

**Mixed rows**: rows of 1,024 positions, half of them captioned scenes of 64 patches (x0 and both losses), half
definitions; beside rows of definitions alone, through the same network (of which the patch layers then lie idle).
Batches are made beforehand. The ratio is that of time per position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transfuse.devices import keep_freed_memory
from transfuse.recipes import Recipe, preset
from transfuse.runs import resolve
from transfuse.train import build_trainer
from transfuse.training import Trainer
from transfuse.training.metrics import Average, MetricsLog

LOGGED_EVERY = 10


def bare(trainer: Trainer) -> Callable[[], None]:
    """A loop as one would write it in a notebook, over a trainer's parts."""
    model, objective, optimizer, ema = trainer.model, trainer.objective, trainer.optimizer, trainer.ema
    weights = torch.tensor(objective.weights)
    done = 0

    def step() -> None:
        nonlocal done
        batches = trainer.load(done)
        counts = torch.tensor([objective.counts(batch) for batch in batches]).sum(0)
        for batch in batches:
            (objective.loss(model, batch).losses * weights / counts.clamp(min=1)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), trainer.optimizer_config.clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, done)
        done += 1

    return step


def engine(trainer: Trainer) -> Callable[[], None]:
    log, average = MetricsLog(trainer.folder), Average()
    log.open(0)

    def step() -> None:
        nonlocal average
        trainer.train_step(average)
        if trainer.step % LOGGED_EVERY == 0:
            trainer.merge()
            log.write({"step": trainer.step, **average.merged(trainer.ranks).means(), **trainer.totals})
            average = Average()

    return step


class Made:
    """Batches made beforehand, one after another."""

    def __init__(self, batches: list[list[Any]]) -> None:
        self.batches = batches

    def __call__(self, step: int) -> list[Any]:
        return self.batches[step % len(self.batches)]

    def position(self) -> dict[str, int]:
        return {}

    def start_from(self, position: dict[str, int]) -> None: ...


def trainer_of(recipe: Recipe, scratch: str, made: int = 0) -> Trainer:
    trainer = build_trainer(resolve(recipe), Path(tempfile.mkdtemp(dir=scratch)))
    if made:
        trainer.load = Made([list(trainer.load(step)) for step in range(made)])
    return trainer


def rows(share: float, quick: bool) -> Recipe:
    """Rows of the demo's world and words, `share` of the positions text alone."""
    base = preset("pixels-32")
    width: dict[str, Any] = (
        {"d_model": 128, "n_layers": 2, "n_heads": 2}
        if quick
        else {"d_model": 384, "n_layers": 8, "n_heads": 6, "d_ff": 1024}
    )
    model = replace(base.model, patch_size=4, max_seq_len=1024, **width)
    sources = ("world", "glosses") if share < 1 else ("glosses",)
    data = replace(base.data, sources=sources, text_share=share, row_length=1024, batch_size=2, accumulate=1)
    return replace(base, model=model, data=data)


def timed(step: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count


def compare(ours: Callable[[], None], theirs: Callable[[], None], rounds: int, steps: int) -> dict[str, float]:
    """Seconds a step of both, medians over rounds; the ratio is taken within a round."""
    for step in (ours, theirs):
        timed(step, 3)
    readings = []
    for number in range(rounds):
        pair = (ours, theirs) if number % 2 else (theirs, ours)
        found = {step: timed(step, steps) for step in pair}
        readings.append((found[ours], found[theirs]))
    ratios = [a / b for a, b in readings]
    return {
        "seconds": statistics.median(a for a, _ in readings),
        "beside": statistics.median(b for _, b in readings),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few rounds of small networks: does it run?")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    rounds, steps = (2, 2) if arguments.quick else (arguments.rounds, LOGGED_EVERY)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        demo = preset("pixels-32")
        pair = engine(trainer_of(demo, scratch)), bare(trainer_of(demo, scratch))
        found["engine beside a bare loop"] = compare(*pair, rounds, steps)
        mixed, text = (trainer_of(rows(share, arguments.quick), scratch, made=4) for share in (0.5, 1.0))
        found["mixed rows beside rows of text"] = compare(bare(mixed), bare(text), rounds, max(2, steps // 4))
    for name, value in found.items():
        print(name, value)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
