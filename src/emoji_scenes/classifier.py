"""A classifier of scenes with one thing, and what the judges share: identity, files, image preparation.

    recogniser = train_recogniser(world_config)           # about a minute on two cores
    recogniser(images)                                    # ["crab", "balloon", ...]
    recogniser.accuracy                                   # {"train": 0.99, "heldout": 0.99}, on scenes it never saw

It is trained apart from the models it judges, on rendered scenes of every combination, held-out ones included: a judge
must not be worse where generalisation is measured. Blur, noise and faint colour shifts in training let it judge drawn
images by what they show, not by how cleanly they are drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

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

from .scenes import World, WorldConfig
from .sprites import SPRITE_FILE

SIDE = 32
"""Pixels per side that the network sees; images of other sizes are resized."""
SCENES = 16_000
RECOGNISER_STEPS, BATCH = 600, 64
HELD_OUT_EVERY = 10
"""One scene in this many is held out: about its natural share, so that a background never gives a noun away."""
SEED_OFFSET = 7_000_001
"""Keeps the judges' scenes apart from those that models are trained and measured on."""

# --- what judges share ------------------------------------------------------------------------------------------------


class Judge(Protocol):
    """A network that judges images. `identity` names everything it depends on."""

    @property
    def identity(self) -> str: ...

    def save(self, path: Path) -> None: ...


J = TypeVar("J", bound=Judge)


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


def save_network(path: Path, state: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write weights and facts into one safetensors file, whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    atomic_write(path, lambda aside: save_file(state, aside, metadata=facts))


def load_network(path: Path, what: str, read: Callable[[dict[str, str], dict[str, Tensor]], J]) -> J:
    """Read a file of `save_network` by `read(facts, state)`. Raises UserError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return read(file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected {what}, found something else ({reason})") from None


def resized(x: Tensor, side: int = SIDE) -> Tensor:
    """Resize images `[image, 3, row, column]` to `side` pixels per side, antialiased."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift the colours of and add noise to each image `[image, 3, row, column]`, by a random amount."""

    def amount(*shape: int) -> Tensor:
        return torch.rand((len(x), *shape), generator=generator)

    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, amount(1, 1, 1))
    x = x * (0.85 + 0.3 * amount(1, 1, 1)) + 0.2 * (amount(3, 1, 1) - 0.5)
    return x + 0.12 * amount(1, 1, 1) * torch.randn(x.shape, generator=generator)


class PooledNetwork(nn.Module):
    """3 x 3 convolutions, mean and maximum over space, and a linear head."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *channels), channels, strides, strict=False):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
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


# --- the classifier ---------------------------------------------------------------------------------------------------


def _network(nouns: int) -> PooledNetwork:
    """Return a network of about 0.2M parameters."""
    return PooledNetwork((24, 48, 96, 128), (1, 2, 2, 2), nouns)


@dataclass(eq=False)
class Recogniser:
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
    name = "recogniser"

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights."""
        return weights_digest(self.network.state_dict())

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch: int = 256) -> list[str]:
        """Return the most probable noun of each image, uint8 `[image, row, column, 3]`."""
        self.network.eval()
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return [self.nouns[n] for part in parts for n in self.network(resized(pixels(part))).argmax(1).tolist()]

    @torch.inference_mode()
    def features(self, images: np.ndarray, batch: int = 256) -> np.ndarray:
        """Return float32 `[image, 256]`, for Fréchet distances between sets of scenes."""
        self.network.eval()
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return np.concatenate([self.network.pooled(resized(pixels(part))).numpy() for part in parts])

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all. Raises UserError where it cannot."""
        facts = {
            "identity": self.identity,
            "nouns": json.dumps(self.nouns),
            "measured": json.dumps([self.accuracy, self.seconds]),
        }
        save_network(path, self.network.state_dict(), facts)

    @classmethod
    def load(cls, path: Path) -> Recogniser:
        """Read a file of `save`. Raises UserError for any other file."""

        def read(facts: dict[str, str], state: dict[str, Tensor]) -> Recogniser:
            accuracy, seconds = json.loads(facts["measured"])
            nouns = tuple(json.loads(facts["nouns"]))
            network = _network(len(nouns))
            network.load_state_dict(state)
            return cls(nouns, network.eval(), accuracy, facts["identity"], seconds)

        return load_network(path, "a saved recogniser", read)


def keep_recogniser(path: Path, config: WorldConfig, steps: int | None = None, seed: int = 0) -> Recogniser:
    """Return the classifier saved in a file if it is of these scenes; otherwise train one and save it there."""
    steps = steps or RECOGNISER_STEPS
    identity = recogniser_identity(config, steps, seed)
    return keep_judge(path, identity, Recogniser.load, lambda: train_recogniser(config, steps, seed))


def recogniser_identity(config: WorldConfig, steps: int, seed: int) -> str:
    """Return what a classifier depends on."""
    world = replace(config, split="train", kinds=None, max_objects=1, max_count=1)
    return judge_identity(world, steps=steps, seed=seed, scenes=SCENES)


def train_recogniser(
    config: WorldConfig, steps: int = RECOGNISER_STEPS, seed: int = 0, batch: int = BATCH, test_scenes: int = 1000
) -> Recogniser:
    """Train a classifier of the nouns of `config`: a function of its arguments, whatever the split of `config`."""
    began = time.monotonic()
    images, labels = _scenes(config, min(SCENES, steps * batch), seed + SEED_OFFSET, HELD_OUT_EVERY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(config.noun_names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    epochs = range(steps * batch // len(labels) + 1)
    order = torch.cat([torch.randperm(len(labels), generator=generator_for(seed, "order", n)) for n in epochs])
    network.train()
    with progress("recogniser", steps) as bar:
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            generator, x = generator_for(seed, "augment", step), pixels(images[chosen.numpy()])
            mirrored = torch.where(torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5, x.flip(3), x)
            logits = network(resized(disturbed(mirrored, generator)))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    recogniser = Recogniser(config.noun_names, network.eval(), {}, recogniser_identity(config, steps, seed))
    recogniser.seconds = round(time.monotonic() - began, 1)
    for split, every in (("train", 0), ("heldout", 1)):
        fresh, truth = _scenes(config, test_scenes, seed + SEED_OFFSET + 1, every)
        named = recogniser(fresh)
        right = [name == config.noun_names[number] for name, number in zip(named, truth.tolist(), strict=True)]
        recogniser.accuracy[split] = sum(right) / len(right)
    return recogniser


def _scenes(config: WorldConfig, count: int, seed: int, held_out_every: int) -> tuple[np.ndarray, Tensor]:
    """Return images with one thing and their noun numbers; every k-th is a held-out combination (0: none)."""
    base = replace(config, kinds=None, max_objects=1, max_count=1, seed=seed)
    seen, unseen = World(replace(base, split="train")), World(replace(base, split="heldout"))
    images = np.empty((count, config.size, config.size, 3), dtype=np.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for index in range(count):
        world = unseen if held_out_every and index % held_out_every == 0 else seen
        scene = world.scene(index)
        images[index] = world.render(scene)
        labels[index] = config.noun_names.index(scene.things[0].noun)
    return images, labels
