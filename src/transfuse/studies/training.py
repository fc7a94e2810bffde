"""A run from its recipe to its export: what `transfuse train` and the demo both do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..log import logger
from ..presets.recipe import Recipe, build_trainer, export_run
from ..presets.runs import claimed, run_device
from ..training import Trainer, join
from .measures import measuring
from .samples import sample_grid


@dataclass(eq=False)
class Trained:
    """recipe: with "auto" settled. outcome: "stopped" means saved, to go on later; then there is no export yet."""

    recipe: Recipe
    trainer: Trainer
    outcome: Literal["finished", "stopped"]
    export: Path | None


def run_trainer(trainer: Trainer, folder: Path) -> Literal["finished", "stopped"]:
    """Go on where the run is, and say so."""
    if trainer.restore():
        logger.info(f"{folder}: going on from step {trainer.step}")
    outcome = trainer.run()
    if outcome == "stopped":
        logger.info(f"{folder}: stopped at step {trainer.step} and saved; the same command goes on")
    return outcome


def train_run(recipe: Recipe, folder: Path) -> Trained:
    """Open a run folder or go on with it, train, and export the averaged weights to `folder/export`; in as many
    processes as there are.

    Raises UserError where the folder was made by another recipe.
    """
    parallel = recipe.parallel
    device = run_device(recipe, folder)
    with join(device, parallel.replicate, parallel.tensor) as ranks, claimed(recipe, folder, ranks) as recipe:
        trainer, tokenizer = build_trainer(recipe, folder, ranks)
        if recipe.model.images != "none":
            trainer.sample = sample_grid(recipe, tokenizer)
        if recipe.loop.measure_every:
            trainer.measure = measuring(recipe, trainer, tokenizer, folder)
        outcome = run_trainer(trainer, folder)
        if outcome == "stopped":
            return Trained(recipe, trainer, outcome, None)
        return Trained(recipe, trainer, outcome, export_run(recipe, trainer, tokenizer, folder / "export"))
