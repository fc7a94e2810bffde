"""Classifiers of scenes with one thing, and what all judges share: training, files, image preparation.

    classifier = train_scene_classifier(world_config)     # about a minute on two cores
    classifier(images)                                    # ["crab", "balloon", ...]
    classifier.accuracy                                   # {"train": 0.99, "heldout": 0.99}, on scenes it never saw

    strict = bundled_classifier()
    strict(images)                                        # ["crab", None, ...]: None where no noun is plain enough

Judges are trained apart from the models they judge, on rendered scenes of every combination, held-out ones included: a
judge must not be worse where generalisation is measured. Blur, noise and faint colour shifts in training let it judge
drawn images by what they show, not by how cleanly they are drawn.

A `SceneClassifier` chooses among the few nouns of one configuration, so a blob of the right colour is enough for it.
The strict `OpenSetClassifier` knows all 328 nouns in every drawing style and was also trained to refuse spoiled
drawings (blurred, warped, blended, half erased, in pieces); `tools/train_open_set.py` trains it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.config import to_dict
from transfuse.errors import UserError
from transfuse.evaluation.generate import weights_digest
from transfuse.evaluation.image_quality import pixels
from transfuse.io import atomic_write, sha256
from transfuse.log import progress
from transfuse.rng import generator_for
from transfuse.version import __version__

from .nouns import SPRITE_FILE
from .scenes import Scene, World, WorldConfig

SIDE, OPEN_SET_SIDE = 32, 48
"""Pixels per side that a `SceneClassifier` and an `OpenSetClassifier` see; images of other sizes are resized."""
SCENES = 16_000
CLASSIFIER_STEPS, BATCH = 600, 64
HELD_OUT_EVERY = 10
"""One scene in this many is held out: about its natural share, so that a background never gives a noun away."""
SEED_OFFSET = 7_000_001  # keeps the judges' scenes apart from those that models are trained and measured on
OPEN_SET_WEIGHTS = Path(__file__).with_name("weights") / "open-set.safetensors"

# --- what judges share ------------------------------------------------------------------------------------------------


class Judge:
    """A network that judges images. `identity` names everything it depends on."""

    network: nn.Module
    identity: str

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights."""
        return weights_digest(self.network.state_dict())

    def save(self, path: Path) -> None:
        raise NotImplementedError


J = TypeVar("J", bound=Judge)
N = TypeVar("N", bound=nn.Module)


def judge_identity(world: WorldConfig, **facts: Any) -> str:
    """Return as JSON what a judge depends on: scenes, settings, the sprites, the version of the package."""
    package = {"version": __version__, "sprites": sha256(SPRITE_FILE)[:16]}
    return json.dumps({"world": to_dict(world), **facts, **package}, sort_keys=True)


def keep_judge(path: Path, identity: str, load: Callable[[Path], J], train: Callable[[], J]) -> J:
    """Return the judge saved in a file if it has this identity; otherwise train one and save it there."""
    if path.is_file():
        saved = load(path)
        if saved.identity == identity:
            return saved
    judge = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    judge.save(path)
    return judge


def save_network(path: Path, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write weights, and facts as JSON (texts as they are), into one safetensors file, whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}
    atomic_write(path, lambda aside: save_file(state, aside, metadata=metadata))


def load_network(path: Path, what: str, make_network: Callable[[int], N], *names: str) -> tuple[N, list[Any]]:
    """Return the network of a file of `save_network`, made for its nouns, and its facts of these names.

    Raises UserError for any other file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = [metadata[name] if name == "identity" else json.loads(metadata[name]) for name in names]
        network = make_network(len(json.loads(metadata["nouns"])))
        network.load_state_dict(state)
        return network.eval(), facts
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected {what}, found something else ({reason})") from None


def render_scenes(config: WorldConfig, count: int, held_out_every: int) -> tuple[np.ndarray, list[Scene]]:
    """Return images uint8 `[image, row, column, 3]` and their scenes; every k-th is held out (k = 0: none)."""
    seen, unseen = World(replace(config, split="train")), World(replace(config, split="heldout"))
    images = np.empty((count, config.size, config.size, 3), dtype=np.uint8)
    scenes = []
    for index in range(count):
        world = unseen if held_out_every and index % held_out_every == 0 else seen
        scenes.append(world.scene(index))
        images[index] = world.render(scenes[-1])
    return images, scenes


def train_judge(
    name: str,
    make_network: Callable[[], N],
    loss_of: Callable[[N, Tensor, int], Tensor],
    *,
    samples: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    max_norm: float = math.inf,
) -> N:
    """Train a network with AdamW on one cycle of the learning rate; a function of its arguments.

    loss_of    loss of the network on samples, int64 `[batch]` of 0..samples - 1, at a step
    max_norm   largest norm of the gradient; above it the gradient is scaled down
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.15)
    epochs = range(steps * batch // samples + 1)
    order = torch.cat([torch.randperm(samples, generator=generator_for(seed, "order", n)) for n in epochs])
    network.train()
    with progress(name, steps) as bar:
        for step in range(steps):
            loss = loss_of(network, order[step * batch : (step + 1) * batch], step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    return network.eval()


def resized(x: Tensor, side: int = SIDE) -> Tensor:
    """Resize images `[image, 3, row, column]` to `side` pixels per side, antialiased."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


def batches(images: np.ndarray, count: int, side: int = SIDE) -> Iterator[Tensor]:
    """Yield images, uint8 `[image, row, column, 3]`, as a network sees them, `count` at a time."""
    for start in range(0, len(images), count):
        yield resized(pixels(images[start : start + count]), side)


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift the colours of and add noise to each image `[image, 3, row, column]`, by a random amount."""

    def amount(*shape: int) -> Tensor:
        return torch.rand((len(x), *shape), generator=generator)

    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, amount(1, 1, 1))
    x = x * (0.85 + 0.3 * amount(1, 1, 1)) + 0.2 * (amount(3, 1, 1) - 0.5)
    return x + 0.12 * amount(1, 1, 1) * torch.randn(x.shape, generator=generator)


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch normalisation and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class PooledNetwork(nn.Module):
    """3 x 3 convolutions, mean and maximum over space, and a linear head."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *channels), channels, strides, strict=False):
            layers += convolution(before, after, stride=stride)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels[-1], outputs)
        # CPUs convolve faster in this memory order.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[image, output]` of images `[image, 3, side, side]` in [-1, 1]."""
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """Return the features `[image, 2 * channel]` that the head reads."""
        x = self.body(x)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


# --- the classifier of few nouns --------------------------------------------------------------------------------------


def closed_set_network(nouns: int) -> PooledNetwork:
    """Return a network of about 0.2M parameters."""
    return PooledNetwork((24, 48, 96, 128), (1, 2, 2, 2), nouns)


@dataclass(eq=False)
class SceneClassifier(Judge):
    """A classifier of images with one thing, and a feature network (`transfuse.evaluation.ImageFeatures`).

    accuracy   share right on fresh scenes, by split
    identity   world, steps and seed, as JSON
    seconds    duration of its training
    """

    nouns: tuple[str, ...]
    network: PooledNetwork
    accuracy: dict[str, float]
    identity: str
    seconds: float = 0.0
    name = "recogniser"  # part of the names of results

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> list[str]:
        """Return the most probable noun of each image, uint8 `[image, row, column, 3]`."""
        return [self.nouns[n] for x in batches(images, 256) for n in self.network(x).argmax(1).tolist()]

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Return float32 `[image, 256]`, for Fréchet distances between sets of scenes."""
        return np.concatenate([self.network.pooled(x).numpy() for x in batches(images, 256)])

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all. Raises UserError where it cannot."""
        facts = {"identity": self.identity, "nouns": self.nouns, "measured": [self.accuracy, self.seconds]}
        save_network(path, self.network.state_dict(), facts)

    @classmethod
    def load(cls, path: Path) -> SceneClassifier:
        """Read a file of `save`. Raises UserError for any other file."""
        names = ("identity", "nouns", "measured")
        network, facts = load_network(path, "a saved recogniser", closed_set_network, *names)
        identity, nouns, (accuracy, seconds) = facts
        return cls(tuple(nouns), network, accuracy, identity, seconds)


def keep_scene_classifier(path: Path, config: WorldConfig, steps: int | None = None, seed: int = 0) -> SceneClassifier:
    """Return the classifier saved in a file if it is of these scenes; otherwise train one and save it there."""
    steps = steps or CLASSIFIER_STEPS
    train = partial(train_scene_classifier, config, steps, seed)
    return keep_judge(path, classifier_identity(config, steps, seed), SceneClassifier.load, train)


def classifier_identity(config: WorldConfig, steps: int, seed: int) -> str:
    """Return what a classifier depends on."""
    world = replace(config, split="train", kinds=None, max_objects=1, max_count=1)
    return judge_identity(world, steps=steps, seed=seed, scenes=SCENES)


def train_scene_classifier(
    config: WorldConfig, steps: int = CLASSIFIER_STEPS, seed: int = 0, batch: int = BATCH, test_scenes: int = 1000
) -> SceneClassifier:
    """Train a classifier of the nouns of `config`: a function of its arguments, whatever the split of `config`."""
    began, nouns = time.monotonic(), config.noun_names
    single = replace(config, kinds=None, max_objects=1, max_count=1, seed=seed + SEED_OFFSET)
    images, scenes = render_scenes(single, min(SCENES, steps * batch), HELD_OUT_EVERY)
    labels = torch.tensor([nouns.index(scene.things[0].noun) for scene in scenes])

    def loss_of(network: PooledNetwork, chosen: Tensor, step: int) -> Tensor:
        generator, x = generator_for(seed, "augment", step), pixels(images[chosen.numpy()])
        mirrored = torch.where(torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5, x.flip(3), x)
        return F.cross_entropy(network(resized(disturbed(mirrored, generator))), labels[chosen], label_smoothing=0.05)

    make = partial(closed_set_network, len(nouns))
    settings = {"samples": len(labels), "steps": steps, "batch": batch, "seed": seed}
    network = train_judge("recogniser", make, loss_of, learning_rate=4e-3, **settings)
    classifier = SceneClassifier(nouns, network, {}, classifier_identity(config, steps, seed))
    classifier.seconds = round(time.monotonic() - began, 1)
    for split, every in (("train", 0), ("heldout", 1)):
        fresh, scenes = render_scenes(replace(single, seed=seed + SEED_OFFSET + 1), test_scenes, every)
        right = [name == scene.things[0].noun for name, scene in zip(classifier(fresh), scenes, strict=True)]
        classifier.accuracy[split] = sum(right) / len(right)
    return classifier


# --- the strict classifier of all nouns -------------------------------------------------------------------------------


def open_set_network(nouns: int) -> PooledNetwork:
    """Return a network of 0.6M parameters for 328 nouns; its last output is "none"."""
    return PooledNetwork((32, 64, 64, 128, 128, 192), (2, 2, 1, 2, 1, 2), nouns + 1)


@dataclass(eq=False)
class OpenSetClassifier:
    """A classifier of images with one thing that may refuse.

    nouns      every noun, in the order of the logits
    threshold  least probability of the first choice; below it the answer is None
    accuracy          share named rightly of clean drawings that it never saw, by size
    false_acceptance  share named at all of spoiled drawings of kinds it never saw, by kind, and their "mean"
    """

    nouns: tuple[str, ...]
    network: PooledNetwork
    threshold: float
    accuracy: dict[str, float]
    false_acceptance: dict[str, float]

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights and the threshold: reports with the same ones compare."""
        return weights_digest({**self.network.state_dict(), "threshold": torch.tensor(self.threshold)})

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> Tensor:
        """Return `[image, noun + 1]` for uint8 images `[image, row, column, 3]`; the last column is "none"."""
        return torch.cat([self.network(x).softmax(1) for x in batches(images, 128, OPEN_SET_SIDE)])

    def __call__(self, images: np.ndarray) -> list[str | None]:
        """Return the noun in each image, or None where none is plain."""
        best, chosen = self.probabilities(images)[:, :-1].max(1)
        accepted = (best >= self.threshold).tolist()
        return [self.nouns[n] if plain else None for n, plain in zip(chosen.tolist(), accepted, strict=True)]

    def save(self, path: Path) -> None:
        """Write one safetensors file in half precision, whole or not at all."""
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.network.state_dict().items()
        }
        facts = {"nouns": self.nouns, "threshold": self.threshold, "measured": [self.accuracy, self.false_acceptance]}
        save_network(path, state, facts)

    @classmethod
    def load(cls, path: Path) -> OpenSetClassifier:
        """Read a file of `save`. Raises UserError for any other file."""
        names = ("nouns", "threshold", "measured")
        network, facts = load_network(path, "a saved open-set classifier", open_set_network, *names)
        nouns, threshold, (accuracy, false_acceptance) = facts
        return cls(tuple(nouns), network, threshold, accuracy, false_acceptance)


@cache
def bundled_classifier() -> OpenSetClassifier:
    """Return the strict classifier that comes with the package, the same for all reports."""
    return OpenSetClassifier.load(OPEN_SET_WEIGHTS)
