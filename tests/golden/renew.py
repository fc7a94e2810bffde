"""Write the golden losses again: python tests/golden/renew.py

They are what runs have learned so far, step by step, from first weights to the optimizer's moments. A change that moves
them changes what every run learns: say in CHANGELOG.md which one and why, in docs/LOG.md by how much, and only then
renew. Never renew to make a test pass.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from transfuse.recipes import Recipe, preset
from transfuse.runs import open_run
from transfuse.train import build_trainer
from transfuse.training.metrics import Average

PATH = Path(__file__).parent / "losses-50.json"
STEPS = {"transfusion": 50, "chameleon": 20}


def recipe(name: str) -> Recipe:
    """The preset "tiny" in float32: texts and pictures; the Chameleon's are codes."""
    made = preset("tiny")
    loop, optimizer = replace(made.loop, steps=STEPS[name]), replace(made.optimizer, warmup=100)
    made = replace(made, device="cpu", precision="float32", loop=loop, optimizer=optimizer)
    if name == "transfusion":
        return made
    model = replace(
        made.model, images="codes", codebook_size=1024, patch_size=1, image_attention="causal", patch_positions="none"
    )
    return replace(made, model=model, data=replace(made.data, autoencoder="vq-f4-small"))


def losses(made: Recipe, steps: int) -> dict[str, list[float]]:
    """Raw losses and the gradient's norm, by step, on one thread."""
    by_name: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(open_run(made, Path(folder)), Path(folder))
        for _ in range(steps):
            average = Average()
            trainer.train_step(average)
            means = average.means()
            for name in (*trainer.objective.names, "gradient_norm"):
                by_name.setdefault(name, []).append(means[name])
    return by_name


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = {name: losses(recipe(name), steps) for name, steps in STEPS.items()}
    PATH.write_text(json.dumps(golden, indent=1) + "\n")
