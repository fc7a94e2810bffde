"""A detector of scenes with several things: a small network that finds each, names it and measures its size.

    detector = train_detector(world_config)          # some minutes on two cores
    detector(images)[0]                              # [Seen("crab", 0.31, 0.52, 0.40), Seen("balloon", ...)]
    detector.accuracy                                # {"found": 0.97, "named": 0.96, "invented": 0.01}, on fresh scenes

For each cell of a coarse grid it predicts whether the centre of a thing is there, its noun, and its side (Zhou et al.
2019, "Objects as points"). It is trained apart from the models it judges, on rendered scenes, held-out combinations
included, at every size and number, disturbed as the classifier's are.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.evaluation.generate import weights_digest
from transfuse.evaluation.image_quality import pixels
from transfuse.log import progress
from transfuse.rng import generator_for

from .classifier import (
    HELD_OUT_EVERY,
    SEED_OFFSET,
    disturbed,
    judge_identity,
    keep_judge,
    load_network,
    resized,
    save_network,
)
from .scenes import Scene, World, WorldConfig

CELL = 4
"""Pixels per side of a grid cell, at the resolution the network sees."""
STEPS, BATCH = 600, 32
SCENES, TEST_SCENES = 12_000, 600
APART = 0.35
"""Two centres closer than this share of the sum of their sides belong to one thing: things never overlap."""
NEAR = 0.5
"""A thing counts as found when a detection is within this share of its side, or 1.5 cells."""
THRESHOLDS = tuple(round(0.15 + 0.05 * n, 2) for n in range(14))
"""Confidence thresholds; the one that counts things best on tuning scenes is kept."""


@dataclass(frozen=True)
class Seen:
    """A detection: its noun, and its centre and side as shares of the frame."""

    noun: str
    x: float
    y: float
    side: float
    confidence: float = 1.0


Detect = Callable[[np.ndarray], list[list[Seen]]]
"""Maps uint8 images `[image, row, column, 3]` to the detections in each, most confident first; a `Detector`."""


class _Network(nn.Module):
    """Three resolutions, joined at the finest; about 0.7M parameters."""

    def __init__(self, nouns: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_layer(3, 32, 5, 2), _layer(32, 64, 3, 2), _layer(64, 96))
        self.middle = nn.Sequential(_layer(96, 128, 3, 2), _layer(128, 128))
        self.coarse = nn.Sequential(_layer(128, 128, 3, 2), _layer(128, 128))
        self.join = _layer(96 + 128 + 128, 160, 1)
        self.head = nn.Conv2d(160, 2 + nouns, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # most cells are empty

    def forward(self, x: Tensor) -> Tensor:
        """Map `[image, 3, side, side]` in [-1, 1] to cells `[image, 2 + noun, row, column]`: centre, side, nouns."""
        fine = self.stem(x)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up = [F.interpolate(part, fine.shape[-2:], mode="nearest") for part in (middle, coarse)]
        return self.head(self.join(torch.cat([fine, *up], dim=1)))


def _layer(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _network(nouns: int) -> _Network:
    return _Network(nouns).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(eq=False)
class Detector:
    """A detector for the things in scenes, with its errors on fresh scenes.

    accuracy    "found": share of things found in their place; "named": found and rightly named; "invented": detections
                of nothing, per thing
    confusion   counts by (truth, prediction); "nothing" stands for a missed or an invented thing
    """

    nouns: tuple[str, ...]
    side: int
    network: _Network
    threshold: float
    identity: str
    accuracy: dict[str, float] = field(default_factory=dict)
    confusion: dict[tuple[str, str], int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights."""
        return weights_digest(self.network.state_dict())

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch: int = 64) -> list[list[Seen]]:
        """Return the detections in each image, uint8 `[image, row, column, 3]`, most confident first."""
        return [
            [seen for seen in all_of if seen.confidence >= self.threshold]
            for start in range(0, len(images), batch)
            for all_of in self._candidates(images[start : start + batch])
        ]

    def _candidates(self, images: np.ndarray) -> list[list[Seen]]:
        self.network.eval()
        cells_of = self.network(resized(pixels(images), self.side))
        heat = cells_of[:, 0].sigmoid()
        peaks = heat == F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0]
        heat = heat * peaks
        cells = heat.shape[-1]
        seen: list[list[Seen]] = [[] for _ in images]
        for image, row, column in (heat >= THRESHOLDS[0]).nonzero().tolist():
            at = cells_of[image, :, row, column]
            noun = self.nouns[int(at[2:].argmax())]
            middle = (column + 0.5) / cells, (row + 0.5) / cells
            seen[image].append(Seen(noun, *middle, float(at[1].exp()), float(heat[image, row, column])))
        return [_distinct(detections) for detections in seen]

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        facts = {
            "identity": self.identity,
            "nouns": json.dumps(self.nouns),
            "measured": json.dumps([self.side, self.threshold, self.accuracy, self.seconds]),
            "confusion": json.dumps([[*pair, times] for pair, times in self.confusion.items()]),
        }
        save_network(path, self.network.state_dict(), facts)

    @classmethod
    def load(cls, path: Path) -> Detector:
        """Read a file of `save`. Raises UserError for any other file."""

        def read(facts: dict[str, str], state: dict[str, Tensor]) -> Detector:
            side, threshold, accuracy, seconds = json.loads(facts["measured"])
            confusion = {(a, b): times for a, b, times in json.loads(facts["confusion"])}
            nouns = tuple(json.loads(facts["nouns"]))
            network = _network(len(nouns))
            network.load_state_dict(state)
            return cls(nouns, side, network.eval(), threshold, facts["identity"], accuracy, confusion, seconds)

        return load_network(path, "a saved detector", read)


def _distinct(seen: list[Seen]) -> list[Seen]:
    """Return detections by confidence, without those at the place of a more confident one."""
    kept: list[Seen] = []
    for thing in sorted(seen, key=lambda thing: -thing.confidence):
        if all(max(abs(thing.x - o.x), abs(thing.y - o.y)) > APART * (thing.side + o.side) for o in kept):
            kept.append(thing)
    return kept


def keep_detector(path: Path, config: WorldConfig, steps: int | None = None, seed: int = 0) -> Detector:
    """Return the detector saved in a file if it is of these scenes; otherwise train one and save it there."""
    steps = steps or STEPS
    identity = _identity(config, steps, seed)
    return keep_judge(path, identity, Detector.load, lambda: train_detector(config, steps, seed))


def _identity(config: WorldConfig, steps: int, seed: int) -> str:
    return judge_identity(_world(config, "train", 0).config, steps=steps, seed=seed, scenes=SCENES)


def _world(config: WorldConfig, split: Any, seed: int) -> World:
    """Return scenes of every kind and size with the nouns, styles and backgrounds of `config`."""
    return World(replace(config, split=split, kinds=None, max_objects=3, max_count=4, sizes=None, seed=seed))


def train_detector(config: WorldConfig, steps: int = STEPS, seed: int = 0) -> Detector:
    """Train a detector of the nouns of `config` in scenes of any number of things: a function of its arguments."""
    began = time.monotonic()
    side = 32 if config.size <= 32 else 64
    nouns = config.noun_names
    images, scenes = _scenes(config, min(SCENES, steps * BATCH), seed + SEED_OFFSET)
    targets = [_target(scene, nouns, side // CELL) for scene in scenes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(nouns))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    passes = range(steps * BATCH // len(scenes) + 1)
    order = torch.cat([torch.randperm(len(scenes), generator=generator_for(seed, "order", n)) for n in passes])
    network.train()
    with progress("detector", steps) as bar:
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH].tolist()
            x = disturbed(pixels(images[chosen]), generator_for(seed, "disturb", step))
            wanted = [torch.stack(part) for part in zip(*(targets[n] for n in chosen), strict=True)]
            loss = _loss(network(resized(x, side)), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    detector = Detector(nouns, side, network.eval(), THRESHOLDS[0], _identity(config, steps, seed))
    _tune(detector, *_scenes(config, TEST_SCENES, seed + SEED_OFFSET + 1))
    _examine(detector, *_scenes(config, TEST_SCENES, seed + SEED_OFFSET + 2))
    detector.seconds = round(time.monotonic() - began, 1)
    return detector


def _scenes(config: WorldConfig, count: int, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Return images of scenes of every kind; one in `HELD_OUT_EVERY` is a held-out combination."""
    seen, unseen = _world(config, "train", seed), _world(config, "heldout", seed)
    scenes = [(seen if n % HELD_OUT_EVERY else unseen).scene(n) for n in range(count)]
    return np.stack([seen.render(scene) for scene in scenes]), scenes


def _target(scene: Scene, nouns: Sequence[str], cells: int) -> list[Tensor]:
    """Return heat `[row, column]` (1 in a centre's cell, less around it), noun numbers (-1: none), and log sides."""
    heat, side = torch.zeros(cells, cells), torch.zeros(cells, cells)
    noun = torch.full((cells, cells), -1, dtype=torch.int64)
    at = torch.arange(cells) + 0.5
    for thing in scene.things:
        for place in thing.places:
            x, y = (centre * cells for centre in place.centre)
            row, column = min(int(y), cells - 1), min(int(x), cells - 1)
            spread = max(0.5, place.side * cells / 6)
            distance = (at - row - 0.5).square()[:, None] + (at - column - 0.5).square()
            heat = torch.maximum(heat, torch.exp(-distance / (2 * spread**2)))
            # A thing's neighbouring cells learn its name, too: more to learn from, and peaks may be a cell off.
            near = distance <= 1.0 if place.side * cells > 2 else distance == 0
            noun[near] = nouns.index(thing.noun)
            side[near] = float(np.log(place.side))
    return [heat, noun, side]


def _loss(output: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """Return the focal loss of centres (Law & Deng 2018, equation 1) plus the losses of nouns and sides."""
    heat, noun, side = wanted
    logit = output[:, 0]
    chance = logit.sigmoid()
    at = heat == 1
    hit = -(1 - chance).square() * F.logsigmoid(logit) * at
    miss = -((1 - heat) ** 4) * chance.square() * F.logsigmoid(-logit) * ~at
    middles = (hit.sum() + miss.sum()) / at.sum().clamp_min(1)
    there = noun >= 0
    names = F.cross_entropy(output[:, 2:].permute(0, 2, 3, 1)[there], noun[there], label_smoothing=0.05)
    return middles + names + 2 * F.smooth_l1_loss(output[:, 1][there], side[there])


@torch.inference_mode()
def _tune(detector: Detector, images: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Keep the threshold with which the number of things is right most often."""
    counts = np.array([sum(thing.count for thing in scene.things) for scene in scenes])
    confidences = [[seen.confidence for seen in detections] for detections in detector(images)]
    right = [np.mean([sum(c >= t for c in image) for image in confidences] == counts) for t in THRESHOLDS]
    detector.threshold = THRESHOLDS[int(np.argmax(right))]


def _examine(detector: Detector, images: np.ndarray, scenes: Sequence[Scene]) -> None:
    """Measure accuracy and confusion on scenes it was neither trained nor tuned on."""
    confusion: Counter[tuple[str, str]] = Counter()
    for scene, detections in zip(scenes, detector(images), strict=True):
        left = list(detections)
        for noun, x, y, side in ((t.noun, *p.centre, p.side) for t in scene.things for p in t.places):
            reach = max(NEAR * side, 1.5 * CELL / detector.side)
            near = [seen for seen in left if max(abs(seen.x - x), abs(seen.y - y)) <= reach]
            best = min(near, key=lambda seen: (seen.x - x) ** 2 + (seen.y - y) ** 2, default=None)
            confusion[noun, best.noun if best else "nothing"] += 1
            if best:
                left.remove(best)
        confusion.update(("nothing", seen.noun) for seen in left)
    things = sum(times for (truth, _), times in confusion.items() if truth != "nothing")
    missed = sum(times for (_, named), times in confusion.items() if named == "nothing")
    right = sum(times for (truth, named), times in confusion.items() if truth == named)
    invented = sum(times for (truth, _), times in confusion.items() if truth == "nothing")
    detector.confusion = dict(confusion)
    detector.accuracy = {"found": 1 - missed / things, "named": right / things, "invented": invented / things}
