"""Grids of pictures: what a run draws while it trains, and contact sheets of reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch import Tensor

from ..diffusion import Process
from ..export import Exported
from ..inference import TransfusionPipeline
from ..presets.recipe import Recipe, averaged_model
from ..presets.sources import held_out_prompts, image_size
from ..sequence import Tokenizer

GRID = (3, 6)
"""rows and columns of a grid drawn while training"""


def grid(images: Sequence[np.ndarray], columns: int, zoom: int = 1) -> PIL.Image.Image:
    """Lay uint8 images `[row, column, 3]` of one size out in rows, enlarged by whole pixels."""
    blank = np.full_like(images[0], 255)
    padded = [*images, *[blank] * (-len(images) % columns)]
    rows = [np.concatenate(padded[start : start + columns], axis=1) for start in range(0, len(padded), columns)]
    picture = PIL.Image.fromarray(np.concatenate(rows))
    return picture.resize((picture.width * zoom, picture.height * zoom), PIL.Image.Resampling.NEAREST)


def pipelines(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[dict[str, Tensor]], TransfusionPipeline]:
    """A function that makes a pipeline of averaged weights."""
    size, process, autoencoder = image_size(recipe), Process(recipe.diffusion), recipe.open_autoencoder()

    def pipe_of(weights: dict[str, Tensor]) -> TransfusionPipeline:
        model = averaged_model(recipe, weights)
        return TransfusionPipeline(Exported(model, process, autoencoder, tokenizer, size, recipe.generation))

    return pipe_of


def sample_grid(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[dict[str, Tensor], Path], None] | None:
    """A function that draws held-out prompts with averaged weights and writes them as one PNG; None where there are no
    captions."""
    prompts = held_out_prompts(recipe, GRID[0] * GRID[1])
    if not prompts:
        return None
    size = image_size(recipe)
    pipe_of = pipelines(recipe, tokenizer)

    def sample(weights: dict[str, Tensor], path: Path) -> None:
        images = pipe_of(weights)(prompts, generator=0, output_type="np").images
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images, GRID[1], zoom=max(1, 96 // size)).save(path)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")

    return sample
