"""An autoencoder's run, from its recipe to its export: what `transfuse autoencoder train` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from emoji_scenes import World

from ..presets.autoencoders import (
    AutoencoderRecipe,
    averaged_autoencoder,
    build_autoencoder_trainer,
    export_autoencoder,
    image_source,
)
from ..presets.runs import claimed, run_device
from ..training import Trainer, join
from .samples import grid
from .training import run_trainer

SHOWN = 8
"""images of a grid of reconstructions"""


def train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> tuple[Trainer, Path | None]:
    """Open a run folder or go on with it, train, and export to `folder/export`; None where it was stopped before.

    Raises UserError where the folder was made by another recipe.
    """
    with join(run_device(recipe, folder)) as ranks, claimed(recipe, folder, ranks) as recipe:
        trainer = build_autoencoder_trainer(recipe, folder, reconstruction_grid(recipe), ranks)
        if run_trainer(trainer, folder) == "stopped":
            return trainer, None
        ranks.on_rank0(lambda: export_autoencoder(recipe, trainer, folder / "export"))
    return trainer, folder / "export"


def reconstruction_grid(recipe: AutoencoderRecipe) -> Callable[[dict[str, Tensor], Path], None]:
    """A function that writes held-out images over their reconstructions as one PNG; of a folder, its first images."""
    source = image_source(recipe)
    if recipe.data.folder is None:
        world = World(replace(recipe.data.world, split="heldout"))
        images = np.stack([world.render(world.scene(number)) for number in range(SHOWN)])
    else:
        images = np.stack([source(number) for number in range(SHOWN)])

    def sample(weights: dict[str, Tensor], path: Path) -> None:
        autoencoder = averaged_autoencoder(recipe, weights)
        again = autoencoder.decode(autoencoder.encode(images))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([*images, *again], SHOWN, zoom=max(1, 128 // images.shape[1])).save(path)

    return sample
