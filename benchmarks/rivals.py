"""Training steps of the arms on equal tokens: Chameleon, and text alone with and without its stability set.

    python benchmarks/rivals.py [--rounds 7] [--out FILE]

Every arm gets documents of the same lengths, the same joint number of ids, the same trunk; only what the tokens stand
for differs: Chameleon's images should cost what text costs. A B C A B C ...; ratios are taken within a round, and the
median is reported with its range. Transfusion is beside them on the same documents, its images 64 patches instead of 64
codes: fewer logits, but the patch layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from transfuse.devices import keep_freed_memory
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.model import ModelConfig, Transfusion
from transfuse.sequence import Document, Image, SequenceFormat, Text, collate
from transfuse.training import ObjectiveConfig, OptimizerConfig, TokenObjective, TransfusionObjective, build_optimizer

SAMPLES, WORDS, SIDE = 32, 16, 8
VOCABULARY, CODES = 2048, 1024
STABLE = {"qk_norm": True, "norm_order": "swin"}
STEPS = 4
"""a reading"""


def step(arm: str, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """A training step of an arm, and the positions it takes."""
    shared = {"d_model": 256, "n_layers": 6, "n_heads": 4, "d_ff": 768}
    z = ObjectiveConfig(z_weight=1e-5)
    first_code, patch = None, 1
    if arm == "chameleon":
        config = ModelConfig(
            images="codes",
            text_vocab_size=VOCABULARY,
            codebook_size=CODES,
            patch_size=1,
            image_attention="causal",
            **STABLE,  # type: ignore[arg-type]
            **shared,  # type: ignore[arg-type]
        )
        first_code, objective = VOCABULARY, TokenObjective(z, 0)
    elif arm == "transfusion":
        config = ModelConfig(text_vocab_size=VOCABULARY + CODES, patch_size=1, **shared)  # type: ignore[arg-type]
        objective = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), 0)
    else:
        stable = STABLE if arm == "text, stability set" else {}
        config = ModelConfig(images="none", text_vocab_size=VOCABULARY + CODES, **stable, **shared)  # type: ignore[arg-type]
        objective = TokenObjective(z if stable else ObjectiveConfig(), 0)
    batch = collate([document(arm, sample) for sample in range(SAMPLES)], SequenceFormat(0, 1, 2, 3, patch, first_code))
    model = Transfusion(config, dtype).initialise(0)
    optimizer = build_optimizer(model, OptimizerConfig())

    def work() -> None:
        sums = objective.loss(model, batch)
        (sums.losses / torch.tensor(objective.counts(batch))).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work, batch.positions


def document(arm: str, sample: int) -> Document:
    """Words and a picture; for text alone as many words as they take together."""
    generator = torch.Generator().manual_seed(sample)
    count = WORDS if arm in ("chameleon", "transfusion") else WORDS + SIDE * SIDE + 2
    words = Text(tuple(torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()))
    if arm == "chameleon":
        return Document([words, Image(torch.randint(0, CODES, (SIDE, SIDE), generator=generator))], sample=sample)
    if arm == "transfusion":
        return Document([words, Image(torch.randn(8, SIDE, SIDE, generator=generator))], sample=sample)
    return Document([words], sample=sample)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arms = ("text", "text, stability set", "chameleon", "transfusion")
    report: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        works = {arm: step(arm, dtype) for arm in arms}
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(arguments.rounds + 1):
            for arm, (work, _) in works.items():
                began = time.perf_counter()
                for _ in range(STEPS):
                    work()
                if number:
                    seconds[arm].append((time.perf_counter() - began) / STEPS)
        for arm in arms:
            rate = works[arm][1] / statistics.median(seconds[arm])
            line = f"{name:<9} {arm:<20} {rate:8,.0f} positions/s"
            found: dict[str, object] = {"positions_per_second": rate}
            for other in arms[:2]:
                ratios = [b / a for a, b in zip(seconds[arm], seconds[other], strict=True)]
                found[f"of {other}"] = ratios
                line += f"   {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of {other}"
            report[f"{name} {arm}"] = found
            print(line)
    if arguments.out:
        arguments.out.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
