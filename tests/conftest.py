"""Small models with random weights, and documents to run them on. No test here needs a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transfuse.autoencoders import Pixels
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.export import Exported, GenerationConfig
from transfuse.model import ModelConfig, Transfusion
from transfuse.sequence import Document, Grammar, Image, Text, Tokenizer

WORDS = ["a crab on a red background", "two balloons", "the moon is above a small boat on blue", "hello, world"] * 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two workers share two cores; more threads each would only get in each other's way."""
    torch.set_num_threads(1)


def randomised(config: ModelConfig, seed: int = 0, compute: torch.dtype = torch.float32) -> Transfusion:
    """A model in which nothing is zero: the patch decoder starts at zero, which would hide mistakes."""
    model = Transfusion(config, compute).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def tiny(**changes: object) -> ModelConfig:
    settings: dict[str, object] = {
        "vocabulary": 320,
        "width": 64,
        "depth": 2,
        "heads": 4,
        "context": 256,
        "latent_channels": 3,
        "patch_size": 2,
        "unet_channels": (16, 32),
        "patch_positions": "learned",
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(WORDS, 320)


@pytest.fixture(scope="session")
def grammar(tokenizer: Tokenizer) -> Grammar:
    return tokenizer.grammar(patch_size=2)


def exported(tokenizer: Tokenizer, **changes: object) -> Exported:
    model = randomised(tiny(**changes)).eval().requires_grad_(False)
    process = Process(DiffusionConfig(prediction="x0", weighting="v", clip_x0=1.0))
    return Exported(model, process, Pixels(), tokenizer, 8, GenerationConfig())


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Files with a content each, and the folders they lie in."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def latent(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mixed() -> list[Document]:
    """Documents of every shape: image sizes differ, images adjacent, first, last; text only; nothing but markers."""
    return [
        Document([Text((10, 11, 12)), Image(latent(4, 4, 1))], sample=1),
        Document([Text((13,))], sample=2),
        Document([Image(latent(8, 4, 2), max_timestep=500), Text((14, 15, 16, 17, 18, 19))], sample=3),
        Document([Text((20, 21)), Image(latent(2, 2, 3)), Image(latent(4, 6, 4)), Text((22,))], sample=4),
        Document([], sample=5),
        Document([Image(latent(4, 4, 5))], sample=6, predict=False),
        Document([Text((23,) * 40)], sample=7),
    ]
