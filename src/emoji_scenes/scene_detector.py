"""A detector of scenes with several things: a small network that finds each, names it and measures its size.

    detector = train_scene_detector(world_config)    # some minutes on two cores
    detector(images)[0]                              # [Seen("crab", 0.31, 0.52, 0.40), Seen("balloon", ...)]
    detector.accuracy                                # {"found": 0.97, "named": 0.96, "invented": 0.01}, on fresh scenes

For each cell of a coarse grid it predicts whether the centre of a thing is there, its noun, and its side (Zhou et al.
2019, "Objects as points"). It is trained apart from the models it judges, on rendered scenes, held-out combinations
included, at every size and number, disturbed as the classifier's are.

The second judge (`second=True`) does the same with another architecture, seed and training scenes, so that a model that
was tuned to one judge is found out by the other.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.evaluation.image_quality import pixels
from transfuse.rng import generator_for

from .scene_classifier import (
    HELD_OUT_EVERY,
    SEED_OFFSET,
    Judge,
    batches,
    convolution,
    disturbed,
    judge_identity,
    keep_judge,
    load_network,
    render_scenes,
    resized,
    save_network,
    train_judge,
)
from .scenes import Scene, WorldConfig

CELL = 4  # pixels per side of a grid cell, at the resolution the network sees
STEPS, BATCH = 600, 32
SCENES, TEST_SCENES = 12_000, 600
APART = 0.35  # two centres closer than this share of the sum of their sides belong to one thing: things never overlap
NEAR = 0.5  # a thing counts as found when a detection is within this share of its side, or 1.5 cells
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
"""Maps uint8 images `[image, row, column, 3]` to the detections in each, most confident first; a `SceneDetector`."""


class DetectorNetwork(nn.Module):
    """Three resolutions, joined at the finest; about 0.7M parameters."""

    def __init__(self, nouns: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, 32, 5, 2), convolution(32, 64, 3, 2), convolution(64, 96))
        self.middle = nn.Sequential(convolution(96, 128, 3, 2), convolution(128, 128))
        self.coarse = nn.Sequential(convolution(128, 128, 3, 2), convolution(128, 128))
        self.join = convolution(96 + 128 + 128, 160, 1)
        self.head = nn.Conv2d(160, 2 + nouns, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # most cells are empty
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[image, 3, side, side]` in [-1, 1] to cells `[image, 2 + noun, row, column]`: centre, side, nouns."""
        fine = self.stem(x)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up = [F.interpolate(part, fine.shape[-2:], mode="nearest") for part in (middle, coarse)]
        return self.head(self.join(torch.cat([fine, *up], dim=1)))


class SecondNetwork(nn.Module):
    """The second judge's: one resolution, residual and dilated, group norms; about 0.3M parameters."""

    def __init__(self, nouns: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, CELL, CELL), nn.GroupNorm(8, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.GroupNorm(8, width),
            )
            for dilation in (1, 2, 4, 1)
        )
        self.head = nn.Conv2d(width, 2 + nouns, 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # type: ignore[index]  # as above

    def forward(self, x: Tensor) -> Tensor:
        """Map images to cells, as `DetectorNetwork` does."""
        x = self.stem(x)
        for block in self.blocks:
            x = F.silu(x + block(x))
        return self.head(x)


NETWORKS: dict[bool, Callable[[int], DetectorNetwork | SecondNetwork]] = {False: DetectorNetwork, True: SecondNetwork}
"""of the first judge, and of the second"""


@dataclass(eq=False)
class SceneDetector(Judge):
    """A detector for the things in scenes, with its errors on fresh scenes.

    accuracy    "found": share of things found in their place; "named": found and rightly named; "invented": detections
                of nothing, per thing
    confusion   counts by (truth, prediction); "nothing" stands for a missed or an invented thing
    """

    nouns: tuple[str, ...]
    side: int
    network: DetectorNetwork | SecondNetwork
    threshold: float
    identity: str
    accuracy: dict[str, float] = field(default_factory=dict)
    confusion: dict[tuple[str, str], int] = field(default_factory=dict)
    seconds: float = 0.0

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> list[list[Seen]]:
        """Return the detections in each image, uint8 `[image, row, column, 3]`, most confident first."""
        detections: list[list[Seen]] = []
        for x in batches(images, 64, self.side):
            output = self.network(x)
            heat = output[:, 0].sigmoid()
            heat = heat * (heat == F.max_pool2d(heat[:, None], 3, stride=1, padding=1)[:, 0])  # peaks alone
            candidates: list[list[Seen]] = [[] for _ in output]
            for image, row, column in (heat >= THRESHOLDS[0]).nonzero().tolist():
                cell = output[image, :, row, column]
                across, down = (column + 0.5) / heat.shape[-1], (row + 0.5) / heat.shape[-1]
                noun, confidence = self.nouns[int(cell[2:].argmax())], float(heat[image, row, column])
                candidates[image].append(Seen(noun, across, down, float(cell[1].exp()), confidence))
            for seen in candidates:
                kept: list[Seen] = []  # without those at the place of a more confident one
                for thing in sorted(seen, key=lambda thing: -thing.confidence):
                    if all(max(abs(thing.x - o.x), abs(thing.y - o.y)) > APART * (thing.side + o.side) for o in kept):
                        kept.append(thing)
                detections.append([thing for thing in kept if thing.confidence >= self.threshold])
        return detections

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        facts = {
            "identity": self.identity,
            "nouns": self.nouns,
            "measured": [self.side, self.threshold, self.accuracy, self.seconds],
            "confusion": [[*pair, times] for pair, times in self.confusion.items()],
        }
        save_network(path, self.network.state_dict(), facts)

    @classmethod
    def load(cls, path: Path, second: bool = False) -> SceneDetector:
        """Read a file of `save`. Raises UserError for any other file."""
        names = ("identity", "nouns", "measured", "confusion")
        network, facts = load_network(path, "a saved detector", NETWORKS[second], *names)
        identity, nouns, (side, threshold, accuracy, seconds), counts = facts
        confusion = {(truth, named): times for truth, named, times in counts}
        return cls(tuple(nouns), side, network, threshold, identity, accuracy, confusion, seconds)


def keep_scene_detector(
    path: Path, config: WorldConfig, steps: int | None = None, second: bool = False
) -> SceneDetector:
    """Return the detector saved in a file if it is of these scenes; otherwise train one and save it there."""
    steps = steps or STEPS
    train = partial(train_scene_detector, config, steps, second=second)
    return keep_judge(path, _identity(config, steps, second), partial(SceneDetector.load, second=second), train)


def _identity(config: WorldConfig, steps: int, second: bool) -> str:
    world = replace(_every_kind(config, seed=0), split="train")
    architecture = {"architecture": SecondNetwork.__name__} if second else {}
    return judge_identity(world, steps=steps, seed=int(second), scenes=SCENES, **architecture)


def _every_kind(config: WorldConfig, seed: int) -> WorldConfig:
    """Return a world of every kind and size with the nouns, styles and backgrounds of `config`."""
    return replace(config, kinds=None, max_objects=3, max_count=4, sizes=None, seed=seed)


def train_scene_detector(
    config: WorldConfig, steps: int = STEPS, test_scenes: int | None = None, second: bool = False
) -> SceneDetector:
    """Train a detector of the nouns of `config` in scenes of any number of things: a function of its arguments."""
    began, nouns, side = time.monotonic(), config.noun_names, 32 if config.size <= 32 else 64
    seed = int(second)

    def fresh(count: int, offset: int) -> tuple[np.ndarray, list[Scene]]:
        return render_scenes(_every_kind(config, SEED_OFFSET + 3 * seed + offset), count, HELD_OUT_EVERY)

    images, scenes = fresh(min(SCENES, steps * BATCH), 0)
    targets = [_target(scene, nouns, side // CELL) for scene in scenes]

    def loss_of(network: nn.Module, chosen: Tensor, step: int) -> Tensor:
        x = disturbed(pixels(images[chosen.numpy()]), generator_for(seed, "disturb", step))
        wanted = [torch.stack(part) for part in zip(*(targets[n] for n in chosen.tolist()), strict=True)]
        return _loss(network(resized(x, side)), wanted)

    make = partial(NETWORKS[second], len(nouns))
    settings = {"samples": len(scenes), "steps": steps, "batch": BATCH, "seed": seed}
    network = train_judge(
        "second judge" if second else "detector", make, loss_of, learning_rate=3e-3, max_norm=10.0, **settings
    )
    detector = SceneDetector(nouns, side, network, THRESHOLDS[0], _identity(config, steps, second))
    tuning_images, tuning_scenes = fresh(test_scenes or TEST_SCENES, 1)
    # The threshold is the one with which the number of things is right most often.
    counts = np.array([sum(thing.count for thing in scene.things) for scene in tuning_scenes])
    confidences = [[seen.confidence for seen in detections] for detections in detector(tuning_images)]
    right = [np.mean([sum(c >= t for c in image) for image in confidences] == counts) for t in THRESHOLDS]
    detector.threshold = THRESHOLDS[int(np.argmax(right))]
    _measure_errors(detector, *fresh(test_scenes or TEST_SCENES, 2))
    detector.seconds = round(time.monotonic() - began, 1)
    return detector


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


def _measure_errors(detector: SceneDetector, images: np.ndarray, scenes: Sequence[Scene]) -> None:
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
