"""Trains the strict judge of drawings that comes with the package, on the bundled world, and measures it.

    OMP_NUM_THREADS=1 python tools/train_open_set.py --run runs/open-set            # about 15 minutes on one core
    OMP_NUM_THREADS=1 python tools/train_open_set.py --run runs/open-set --install  # and into the package

The same command resumes where it stopped; what it gives is a function of the seed. Learned: every noun in every style,
clean, slightly at fault or decoded by the bundled autoencoder; and, as "none", the kinds of spoiled drawings in
`spoil.TRAINED`, and drawings decoded from warped latents, which look much like a weak model's. The acceptance threshold
is the highest that keeps `KEPT` of clean drawings; what is accepted of `spoil.UNSEEN`, kinds that neither
training nor the threshold saw, is measured afterwards and written into the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import spoil
import torch
from spoil import Batch
from torch import Tensor
from torch.nn import functional as F

from emoji_scenes import NOUNS, PALETTE, World, WorldConfig
from emoji_scenes.scene_classifier import (
    OPEN_SET_SIDE,
    OPEN_SET_WEIGHTS,
    OpenSetClassifier,
    PooledNetwork,
    open_set_network,
    resized,
)
from transfuse.autoencoders import Autoencoder, open_autoencoder
from transfuse.rng import Draws, generator_for

STEPS, PLAIN, SPOILED, WARPED = 4500, 76, 40, 8
"""steps, and in each of them drawings that are plain, spoiled in pixels and spoiled in latents"""
CLEAN = 24
"""plain ones without any fault: else a clean background would speak for "none" """
KINDS = 4
"""kinds of spoiled drawings in a step"""
RATE = 4e-3
POOLS: tuple[tuple[int, tuple[str, ...] | None, int, float], ...] = (
    (32, ("large",), 16_000, 0.5),
    (32, ("medium", "large"), 8_000, 0.2),
    (64, None, 12_000, 0.3),
)
"""what it learns from: pixels, sizes of things, scenes, share of steps"""
DECODED = 1000
"""scenes of each pool that go through the bundled autoencoder"""
HELD_OUT_EVERY = 10
"""one scene in this many is a held-out combination, so a background never gives a noun away"""
KEPT = 0.97
CHECKED = 2000
SEED_OFFSET = 9_000_001
"""keeps its scenes apart from those that models are trained on and measured on"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--install", action="store_true", help="write the weights into the package")
    asked = parser.parse_args()
    asked.run.mkdir(parents=True, exist_ok=True)
    network = train(asked.run / "checkpoint.pt", asked.steps, asked.seed)
    network.half().float()  # measured as it will be stored
    classifier = OpenSetClassifier(tuple(NOUNS), network.eval(), 0.0, {}, {})
    calibrate(classifier, asked.seed)
    of_trained_kinds = measure(classifier, asked.seed)
    facts = classifier.threshold, classifier.accuracy, classifier.false_acceptance, of_trained_kinds
    print(json.dumps(facts, indent=1))
    path = OPEN_SET_WEIGHTS if asked.install else asked.run / OPEN_SET_WEIGHTS.name
    path.parent.mkdir(exist_ok=True)
    classifier.save(path)
    print(path, path.stat().st_size, "bytes,", OpenSetClassifier.load(path).digest)


def train(checkpoint: Path, steps: int, seed: int) -> PooledNetwork:
    """Train, or resume from the checkpoint."""
    torch.manual_seed(seed)
    network = open_set_network(len(NOUNS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    parts: tuple[Any, ...] = network, optimizer, schedule
    begun = 0
    if checkpoint.is_file():
        begun, states = torch.load(checkpoint, weights_only=True)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
    network.train()
    for step, (x, labels) in enumerate(batches(begun, steps, seed), begun):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            aside = checkpoint.with_suffix(".partial")
            torch.save((step + 1, [part.state_dict() for part in parts]), aside)
            aside.replace(checkpoint)
    return network


def batches(begun: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of the network and their labels, step by step."""
    if begun == steps:
        return
    pools = [Scenes(size, sizes, count, SEED_OFFSET + seed) for size, sizes, count, _ in POOLS]
    shares = torch.tensor([share for *_, share in POOLS])
    for number, pool in enumerate(pools):
        pool.decode(open_autoencoder("kl-f4-small"), DECODED, generator_for(seed, "decode", number))
    for step in range(begun, steps):
        generator = generator_for(seed, "open set", step)
        pool = pools[int(torch.multinomial(shares, 1, generator=generator))]
        chosen = torch.randint(0, len(pool.nouns), (PLAIN + SPOILED,), generator=generator)
        batch = pool.take(chosen)
        warped = as_float(pool.warped[torch.randint(0, DECODED, (WARPED,), generator=generator).numpy()])
        plain = torch.cat([batch.images[:CLEAN], spoil.slightly(batch[CLEAN:PLAIN], generator)])
        x = torch.cat([plain, spoiled(batch[PLAIN:], warped, generator)])
        labels = torch.cat([pool.nouns[chosen[:PLAIN]], torch.full((SPOILED + WARPED,), len(NOUNS))])
        yield network_input(x), labels


def spoiled(batch: Batch, warped: Tensor, generator: torch.Generator) -> Tensor:
    """Equal parts of the batch in each of `KINDS` kinds, and the warped ones; half of them roughened."""
    makers, part = list(spoil.TRAINED.values()), len(batch.images) // KINDS
    kinds = torch.randperm(len(makers), generator=generator)[:KINDS].tolist()
    drawn = [makers[kind](batch[n * part : (n + 1) * part], generator) for n, kind in enumerate(kinds)]
    x = torch.cat([*drawn, warped])
    rough = torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5
    return torch.where(rough, spoil.roughened(x, generator), x)


def as_float(images: np.ndarray) -> Tensor:
    """Images uint8 `[image, row, column, 3]` to `[image, 3, row, column]` in [0, 1], at most `OPEN_SET_SIDE` a side."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return resized(x, OPEN_SET_SIDE) if x.shape[-1] > OPEN_SET_SIDE else x


def network_input(x: Tensor) -> Tensor:
    """Images in [0, 1] as the classifier prepares uint8 ones."""
    return resized(((x.clamp(0, 1) * 255).round() / 127.5 - 1), OPEN_SET_SIDE).contiguous(
        memory_format=torch.channels_last
    )


class Scenes:
    """Scenes of single things, rendered; each with another noun in its place. `held_out`: only held-out ones."""

    def __init__(self, size: int, sizes: Any, count: int, seed: int, held_out: bool = False) -> None:
        base = WorldConfig(size=size, max_objects=1, max_count=1, sizes=sizes, seed=seed)
        seen, unseen = World(base), World(replace(base, split="heldout"))
        self.images = np.empty((2, count, size, size, 3), dtype=np.uint8)
        self.backgrounds, self.places = torch.empty(count, 3), torch.empty(count, 3)
        self.nouns = torch.empty(count, dtype=torch.int64)
        known = list(NOUNS)
        for n in range(count):
            world = unseen if held_out or n % HELD_OUT_EVERY == 0 else seen
            scene = world.scene(n)
            thing = scene.things[0]
            other = _another(world, thing.noun, scene.background, Draws("other", seed, n))
            changed = replace(scene, things=(replace(thing, noun=other[0], style=other[1]),))
            self.images[0, n], self.images[1, n] = world.render(scene), world.render(changed)
            self.backgrounds[n] = torch.tensor(PALETTE[scene.background]) / 255
            self.places[n] = torch.tensor([*thing.places[0].centre, thing.places[0].side])
            self.nouns[n] = known.index(thing.noun)

    def decode(self, autoencoder: Autoencoder, count: int, generator: torch.Generator) -> None:
        """Put the first scenes through an autoencoder, their latents a little noisy, and warped."""
        self.warped = self.images[0, :count].copy()
        for start in range(0, count, 50):
            part = slice(start, start + 50)
            z = autoencoder.encode(self.images[0, part])
            latents = Batch(z, z, z[:, :, :1, :1], self.places[part])
            self.images[0, part] = autoencoder.decode(spoil.latents_noised(latents, 0.02, 0.25, generator))
            self.warped[part] = autoencoder.decode(spoil.latents_warped(latents, generator))

    def take(self, chosen: Tensor) -> Batch:
        """Return the chosen ones as a batch."""
        images, others = (as_float(kept[chosen.numpy()]) for kept in self.images)
        return Batch(images, others, self.backgrounds[chosen].view(-1, 3, 1, 1), self.places[chosen])


def _another(world: World, noun: str, background: str, draws: Draws) -> tuple[str, str]:
    """Another noun, and a style in which it can be seen on the background."""
    while True:
        other = draws.pick(world.nouns)
        styles = world.styles_on.get((other, background), ())
        if styles and other != noun:
            return other, draws.pick(styles)


# --- measuring --------------------------------------------------------------------------------------------------------


def scores(classifier: OpenSetClassifier, x: Tensor, nouns: Tensor) -> tuple[Tensor, Tensor]:
    """The best noun's probability, and whether it is the right one."""
    images = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    best, chosen = classifier.probabilities(images)[:, :-1].max(1)
    return best, chosen == nouns


def calibrate(classifier: OpenSetClassifier, seed: int) -> None:
    """Set the highest threshold that keeps and names rightly `KEPT` of clean large things at 32 pixels."""
    scenes = Scenes(32, ("large",), CHECKED, SEED_OFFSET + seed + 1)
    best, right = scores(classifier, scenes.take(torch.arange(CHECKED)).images, scenes.nouns)
    ranked = (best * right).sort(descending=True).values
    classifier.threshold = round(float(ranked[int(KEPT * CHECKED)]), 2)


def measure(classifier: OpenSetClassifier, seed: int) -> dict[str, float]:
    """Set shares on scenes of held-out combinations that neither training nor the threshold saw.

    Returns the false acceptance by kinds that it was trained to refuse, which the classifier does not keep.
    """
    trained: dict[str, list[float]] = {}
    unseen: dict[str, list[float]] = {}
    for size, extent in ((32, "large"), (32, "medium"), (64, "large"), (64, "medium"), (64, "small")):
        scenes = Scenes(size, (extent,), CHECKED, SEED_OFFSET + seed + 2, held_out=True)
        batch = scenes.take(torch.arange(CHECKED))
        name = f"{extent} at {size} pixels"
        best, right = scores(classifier, batch.images, scenes.nouns)
        classifier.accuracy[name] = share((best >= classifier.threshold) & right)
        if extent != "large":
            continue
        best, right = scores(classifier, spoil.slightly(batch, generator_for(seed, "measure")), scenes.nouns)
        classifier.accuracy[f"{name}, slightly at fault"] = share((best >= classifier.threshold) & right)
        for found, kinds in ((unseen, spoil.UNSEEN), (trained, spoil.TRAINED)):
            for kind, maker in kinds.items():
                best, _ = scores(classifier, maker(batch, generator_for(seed, "measure", kind)), scenes.nouns)
                found.setdefault(kind, []).append(share(best >= classifier.threshold))
    classifier.false_acceptance = means(unseen)
    return means(trained)


def means(found: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each kind over sizes, and over kinds."""
    by_kind = {kind: float(np.mean(shares)) for kind, shares in found.items()}
    return {
        kind: round(value, 4) for kind, value in {**by_kind, "mean": float(np.mean(list(by_kind.values())))}.items()
    }


def share(hits: Tensor) -> float:
    return round(float(hits.float().mean()), 4)


if __name__ == "__main__":
    main()
