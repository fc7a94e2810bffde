"""A judge of drawings: a small network that names the one thing in a scene.

    recogniser = train_recogniser(world_config)           # about a minute on two cores
    recogniser(images)                                    # ["crab", "balloon", ...]
    recogniser.accuracy                                   # {"train": 0.99, "heldout": 0.99}: on scenes it never saw

It is trained apart from the model it judges, on scenes that the world renders: every combination, the held-out ones
too, for a judge must not be worse exactly where generalisation is measured. Blur, noise and faint colour shifts in its
training let it judge generated pictures by what they show, not by how cleanly they are drawn.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from emoji_scenes import World, WorldConfig

from ..errors import UserError
from ..io import atomic_write
from ..log import progress
from ..rng import generator_for
from .judge import judge_identity, keep_judge

SIDE = 32
"""pixels along a side that the network looks at; larger or smaller pictures are resized first"""
SCENES = 16_000
STEPS, BATCH = 600, 64
HELD_OUT_EVERY = 10
"""one scene in this many is a held-out one: about its natural share, so a background never gives a noun away"""
SEED_OFFSET = 7_000_001
"""keeps its scenes apart from those a model is trained on, and those it is measured on, by the world's own seed"""


class _Network(nn.Module):
    """Four convolutions, pooled; about 0.2M parameters."""

    def __init__(self, nouns: int, channels: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((3, *channels), channels, strict=False)):
            layers += [
                nn.Conv2d(before, after, 3, stride=1 if number == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels[-1], nouns)

    def forward(self, x: Tensor) -> Tensor:
        """`[image, 3, SIDE, SIDE]` in [-1, 1] -> logits `[image, noun]`."""
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        """-> what the logits are read off, `[image, 256]`."""
        x = self.body(x)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def _network(nouns: int) -> _Network:
    """The memory order is the one in which CPUs convolve faster."""
    network = _Network(nouns)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(eq=False)
class Recogniser:
    """Names the noun in pictures with one thing. `accuracy`: share right on fresh scenes, by split of the world."""

    nouns: tuple[str, ...]
    network: _Network
    accuracy: dict[str, float]
    identity: str
    """what it was trained for: world, steps and seed, as JSON"""
    seconds: float = 0.0
    """how long its training took"""

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights."""
        return weights_digest(self.network.state_dict())

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch: int = 256) -> list[str]:
        """The likeliest noun in each of the images, uint8 `[image, row, column, 3]`."""
        self.network.eval()
        named: list[str] = []
        for start in range(0, len(images), batch):
            chosen = self.network(resized(pixels(images[start : start + batch]))).argmax(1)
            named += [self.nouns[number] for number in chosen.tolist()]
        return named

    @torch.inference_mode()
    def features(self, images: np.ndarray, batch: int = 256) -> np.ndarray:
        """What it sees in each image, `[image, 256]`: for a Frechet distance between sets of pictures of this world."""
        self.network.eval()
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return np.concatenate([self.network.pooled(resized(pixels(part))).numpy() for part in parts])

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all. UserError where it can not."""
        state = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        facts = {
            "identity": self.identity,
            "nouns": json.dumps(self.nouns),
            "measured": json.dumps([self.accuracy, self.seconds]),
        }
        atomic_write(path, lambda aside: save_file(state, aside, metadata=facts))

    @classmethod
    def load(cls, path: Path) -> Recogniser:
        """Read what `save` wrote. Raises UserError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                accuracy, seconds = json.loads(facts["measured"])
                nouns = tuple(json.loads(facts["nouns"]))
                network = _network(len(nouns))
                network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: expected a saved recogniser, found something else ({reason})") from None
        return cls(nouns, network.eval(), accuracy, facts["identity"], seconds)


def keep_recogniser(path: Path, config: WorldConfig, steps: int | None = None, seed: int = 0) -> Recogniser:
    """The recogniser saved in a file where it is of this world, else a new one, which is saved there."""
    steps = steps or STEPS
    identity = recogniser_identity(config, steps, seed)
    return keep_judge(path, identity, Recogniser.load, lambda: train_recogniser(config, steps, seed))


def recogniser_identity(config: WorldConfig, steps: int, seed: int) -> str:
    """What a recogniser depends on; a saved one with another identity must not be used."""
    world = replace(config, split="train", kinds=None, max_objects=1, max_count=1)
    return judge_identity(world, steps=steps, seed=seed, scenes=SCENES)


def train_recogniser(
    config: WorldConfig, steps: int = STEPS, seed: int = 0, batch: int = BATCH, test_scenes: int = 1000
) -> Recogniser:
    """Train a recogniser for a world's nouns: a function of its arguments. The split of `config` does not matter."""
    began = time.monotonic()
    images, labels = _scenes(config, min(SCENES, steps * batch), seed + SEED_OFFSET, HELD_OUT_EVERY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(config.noun_names))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.15)
    order = torch.cat(
        [
            torch.randperm(len(labels), generator=generator_for(seed, "order", n))
            for n in range(steps * batch // len(labels) + 1)
        ]
    )
    network.train()
    with progress("recogniser", steps) as bar:
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            seen = _augment(pixels(images[chosen.numpy()]), generator_for(seed, "augment", step))
            loss = F.cross_entropy(network(resized(seen)), labels[chosen], label_smoothing=0.05)
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
    """Single-thing scenes and the number of each one's noun; every k-th is a held-out combination (0: none is)."""
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


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Eight digits of a hash of a network's weights, in their order, of any dtype and on any device."""
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


def pixels(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """uint8 `[image, row, column, 3]` -> float32 `[image, 3, row, column]` in [-1, 1]."""
    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return values.to(torch.float32).div(127.5).sub(1.0)


def resized(x: Tensor, side: int = SIDE) -> Tensor:
    """Images `[image, 3, row, column]` to `side` pixels a side, antialiased."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and disturb all."""
    return disturbed(torch.where(torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5, x.flip(3), x), generator)


def disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, shift in colour and add noise to each of the images `[image, 3, row, column]` by an amount of its own."""

    def amount(*shape: int) -> Tensor:
        return torch.rand((len(x), *shape), generator=generator)

    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, amount(1, 1, 1))
    x = x * (0.85 + 0.3 * amount(1, 1, 1)) + 0.2 * (amount(3, 1, 1) - 0.5)
    return x + 0.12 * amount(1, 1, 1) * torch.randn(x.shape, generator=generator)
