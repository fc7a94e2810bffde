"""Shared by tests of evaluation: a tiny model, and stand-ins for networks that take long to train or load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import exported, write
from torch.nn import functional as F

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.evaluation import Drawing, EvalConfig, EvalContext
from transfuse.evaluation.image_quality import Inception
from transfuse.inference import TransfusionPipeline
from transfuse.sequence import Tokenizer

WORLD = WorldConfig(size=16, nouns=4, max_objects=1, max_count=1)


class RandomFilters:
    """A feature network that needs no training: the mean and the contrast of random filters' answers."""

    name, digest = "recogniser", "drawn"

    def __init__(self) -> None:
        self.filters = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def features(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        answers = F.conv2d(x, self.filters, padding=2)
        return torch.cat([answers.mean((2, 3)), answers.std((2, 3))], 1).double().numpy()


class QuickScorer(SceneScorer):
    """The scorer of emoji scenes, with few texts and an untrained classifier."""

    def classifier(self, folder: Path, steps: int | None = None) -> Any:
        return RandomFilters()

    def texts(self) -> list[str]:
        return ["a crab: an animal", "two: 1 and 1"] * 3


def tiny_context(tokenizer: Tokenizer, folder: Path, **changes: Any) -> EvalContext:
    """Return a model with random weights, six images of 16 pixels and two sampling steps."""
    loaded = exported(tokenizer)
    loaded.image_size = 16
    settings: dict[str, Any] = {
        "options": EvalConfig(count=6, judge_steps=2),
        "drawing": Drawing(sampler="ddim", steps=2),
        "batch": 4,
        **changes,
    }
    return EvalContext(TransfusionPipeline(loaded), "a model", folder, QuickScorer(WORLD), **settings)


def coco_file(folder: Path, ids: Sequence[int], captions: Sequence[Sequence[str]], suffix: str = "png") -> None:
    """Write captions.json in COCO's layout: the captions of each image, whose file is its id."""
    records = [
        {"id": 10 * n + k, "image_id": n, "caption": text}
        for n, of_image in zip(ids, captions, strict=True)
        for k, text in enumerate(of_image)
    ]
    images = [{"id": n, "file_name": f"{n}.{suffix}"} for n in ids]
    write(folder, {"captions.json": json.dumps({"images": images, "annotations": records})})


# --- FID --------------------------------------------------------------------------------------------------------------


def random_inception() -> Inception:
    """FID's network with drawn weights: the same on every machine."""
    network = Inception().eval()
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        elif "num_batches" not in name:
            state[name] = torch.randn(value.shape, generator=generator) * 0.1
    network.load_state_dict(state)
    return network


def images_of(seed: int, count: int = 8) -> np.ndarray:
    """Return images uint8 `[count, 48, 32, 3]`: coarse squares, with noise for an even seed."""
    drawn = np.random.default_rng(seed)
    coarse = drawn.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8).repeat(12, 1).repeat(8, 2)
    return coarse if seed % 2 else coarse // 2 + drawn.integers(0, 64, (count, 48, 32, 3), dtype=np.uint8)


def features_of_two_sets() -> tuple[np.ndarray, np.ndarray]:
    """Return features `[300, 16]` of two Gaussians, exact in float32."""
    drawn = np.random.default_rng(5)
    first = drawn.normal(0, 1, (300, 16)) @ np.diag(np.linspace(0.5, 2, 16))
    return first.astype(np.float32).astype(float), drawn.normal(0.2, 1.2, (300, 16)).astype(np.float32).astype(float)
