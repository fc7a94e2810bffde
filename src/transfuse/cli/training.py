"""`transfuse train` and `transfuse demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from ..demo import run_demo
from ..log import logger
from ..recipes import PRESETS, Recipe
from ..train import train as train_model
from ..training import stopped_code
from .options import Config, Flat, Json, Positional, RunFolder, one_of, print_json, run_folder


def train(
    recipe: Annotated[Recipe, Flat],
    preset: Positional[Annotated[str | None, one_of(PRESETS, "PRESET")]] = None,
    *,
    config: Config = None,
    run: RunFolder = None,
    json: Json = False,
) -> int:
    """Train a preset, or resume a run.

    $ transfuse train demo --run runs/mine --loop.steps 500
    $ transfuse train --config settings.yaml

    Every setting of the recipe is an option. The same command resumes from the newest checkpoint; Ctrl-C saves
    and exits with code 75. On several processes:

    $ torchrun --nproc-per-node 8 -m transfuse -- train demo --run runs/mine
    """
    folder = run_folder(run, recipe.preset, config)
    trained = train_model(recipe, folder)
    if trained.export is None:
        return stopped_code(trained.trainer.ranks)
    if not trained.trainer.ranks.first:
        return 0
    prompt = next(iter(trained.run.held_out_prompts(1)), "a crab on a blue background")
    logger.info(f"{trained.export}: exported; try: transfuse generate {shlex.quote(prompt)} --model {trained.export}")
    if json:
        step, totals = trained.trainer.step, trained.trainer.totals
        print_json({"run": str(folder), "step": step, "export": str(trained.export), **totals})
    return 0


def demo(*, run: Path = Path("runs/demo"), minutes: float = 8.0, json: Json = False) -> int:
    """Train a small Transfusion on this machine, then draw, caption and write with it, and report.

    $ transfuse demo --run runs/demo

    Args:
        run: folder for the run and its report; a finished part is not done again
        minutes: most minutes of training
    """
    code, report = run_demo(run, minutes)
    if json:
        print_json(report)
    return code
