"""Images drawn while a run trains, and grids of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from torch import Tensor

from ..export import Exported
from ..inference import TransfusionPipeline
from ..model import Transfusion
from ..recipes import Recipe
from .resolve import Run

GRID = (3, 6)  # rows and columns of a grid drawn while training


def grid(images: Sequence[np.ndarray], columns: int, zoom: int = 1) -> PIL.Image.Image:
    """Return uint8 images `[row, column, 3]` of one size in rows of `columns`, enlarged by whole pixels."""
    blank = np.full_like(images[0], 255)
    padded = [*images, *[blank] * (-len(images) % columns)]
    rows = [np.concatenate(padded[start : start + columns], axis=1) for start in range(0, len(padded), columns)]
    sheet = PIL.Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), PIL.Image.Resampling.NEAREST)


def averaged_model(recipe: Recipe, weights: dict[str, Tensor]) -> Transfusion:
    """Return the network with a trainer's averaged weights, which it shares and must not change."""
    model = Transfusion.on_meta(recipe.model, recipe.compute)
    model.load_state_dict(weights, assign=True)
    return model.to(recipe.device).requires_grad_(False)


def pipeline_of(run: Run, weights: dict[str, Tensor]) -> TransfusionPipeline:
    """Return a pipeline with averaged weights."""
    model = averaged_model(run.recipe, weights)
    return TransfusionPipeline(
        Exported(model, run.process, run.autoencoder, run.tokenizer, run.image_size, run.recipe.generation)
    )


def sample_grid(run: Run) -> Callable[[dict[str, Tensor], Path], None] | None:
    """Return a function that draws held-out prompts with averaged weights as one PNG; None without captions."""
    prompts = run.held_out_prompts(GRID[0] * GRID[1])
    if not prompts:
        return None

    def sample(weights: dict[str, Tensor], path: Path) -> None:
        images = pipeline_of(run, weights)(prompts, generator=0, output_type="np").images
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images, GRID[1], zoom=max(1, 96 // run.image_size)).save(path)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")

    return sample
