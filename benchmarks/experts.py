"""What experts cost: a network with an image tower next to the dense one, at equal operations per position.

    python benchmarks/experts.py [--rounds 9] [--quick] [--experts all] [--profile] [--out FILE]

**Step**: forward, backward and update of `engine.py`'s rows (1,024 positions, half of them captioned scenes, half
definitions) and of the demo's own batches; batches are made beforehand. **Token**: one greedy token behind a prompt.
**Denoising**: one guided step of an image. One side, then the other, in turn; a ratio is taken within a round.

The aims are 1.10 for a step and 1.02 for a token, on a quiet machine. `--profile` prints where a step's time goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from engine import bare, compare, rows, trainer_of
from torch.profiler import ProfilerActivity, profile

from transfuse.autoencoders import Pixels
from transfuse.devices import keep_freed_memory
from transfuse.diffusion import Process, SamplerConfig
from transfuse.export import Exported
from transfuse.inference import Engine, Request
from transfuse.inference.optimize import pack
from transfuse.recipes import Recipe, preset
from transfuse.sequence import Document, Text, Tokenizer
from transfuse.training import Trainer

AIMS = {"step": 1.10, "token": 1.02}


def with_experts(recipe: Recipe, experts: Literal["shared", "ffn", "all"]) -> Recipe:
    return replace(recipe, model=replace(recipe.model, experts=experts))


def requests_of(trainer: Trainer, recipe: Recipe, steps: int) -> dict[str, Callable[[], None]]:
    """Return how to write `steps` tokens, and how to take `steps` denoising steps, with a trainer's network."""
    tokenizer = Tokenizer.train([], 260)
    model: Any = trainer.model.eval().requires_grad_(False)
    model.lm_head.weight[tokenizer.eos] = 0  # never the largest of hundreds of logits: all texts are equally long
    made = Exported(model, Process(recipe.diffusion), Pixels(), tokenizer, 32, recipe.generation)
    pack(model)
    engine = Engine(made)
    prompt = Document([Text(tuple(range(10, 42)))], closed=False)
    write = Request(prompt, draw="never", max_tokens=steps)
    draw = Request(prompt, draw="force", max_tokens=0, size=(32, 32), sampler=SamplerConfig("ddim", steps))
    return {"token": lambda: list(engine.run([write])), "denoising": lambda: list(engine.run([draw]))}  # type: ignore[dict-item]


def profiled(step: Callable[[], None], name: str) -> None:
    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    print(f"{name}: {seconds:.3f} s\n{found.key_averages().table(sort_by='self_cpu_time_total', row_limit=20)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", choices=["ffn", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few rounds of small networks: does it run?")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    count, steps = (2, 2) if arguments.quick else (arguments.rounds, 8)
    found: dict[str, object] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in {"rows": rows(0.5, arguments.quick), "demo": preset("demo")}.items():
            sides = [with_experts(recipe, experts) for experts in (arguments.experts, "shared")]
            trainers = [trainer_of(side, scratch, made=4) for side in sides]
            pair = [bare(trainer) for trainer in trainers]
            if arguments.profile:
                for side, step in zip(sides, pair, strict=True):
                    profiled(step, f"{name}, experts {side.model.experts}")
                continue
            found[f"step, {name}"] = compare(pair[0], pair[1], count, steps)
            if name == "demo":
                works = [requests_of(trainer, side, 16 * steps) for trainer, side in zip(trainers, sides, strict=True)]
                for kind in works[0]:
                    found[kind] = compare(works[0][kind], works[1][kind], count, 1)
    for name, value in found.items():
        aim = AIMS.get(name.split(",")[0])
        print(name, value, "" if aim is None else f"aim {aim:.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
