"""`transfuse train` and `transfuse demo`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..log import logger
from .parsing import parse, parse_run, preset_name, print_json

if TYPE_CHECKING:
    from ..recipes import Recipe


def train(arguments: Sequence[str]) -> int:
    """Train a preset, or go on with a run.

    transfuse train demo --run runs/mine --loop.steps 500

    Every setting of the recipe is an option. The same command resumes from the newest checkpoint; Ctrl-C saves
    and exits with code 75. On several processes:

    torchrun --nproc-per-node 8 -m transfuse -- train demo --run runs/mine
    """
    from ..recipes import PRESETS, preset

    named = preset_name("train", arguments, PRESETS, train.__doc__)
    if named is None:
        return 0
    name, rest = named
    return _train(*parse_run("train", preset(name), name, rest, train.__doc__))


def _train(recipe: Recipe, folder: Path, as_json: bool) -> int:
    from ..train import train as train_model
    from ..training import stopped_code

    trained = train_model(recipe, folder)
    if trained.export is None:
        return stopped_code(trained.trainer.ranks)
    if not trained.trainer.ranks.first:
        return 0
    prompt = next(iter(trained.run.held_out_prompts(1)), "a crab on a blue background")
    logger.info(f"{trained.export}: exported; try: transfuse generate {shlex.quote(prompt)} --model {trained.export}")
    if as_json:
        step, totals = trained.trainer.step, trained.trainer.totals
        print_json({"run": str(folder), "step": step, "export": str(trained.export), **totals})
    return 0


@dataclass(frozen=True)
class Demo:
    """Train a small Transfusion on this machine, then draw, caption and write with it, and report.

    transfuse demo --run runs/demo
    """

    run: Path = Path("runs/demo")
    """folder for the run and its report; a finished part is not done again"""
    minutes: float = 8.0
    """most minutes of training"""
    json: bool = False
    """end with one line of JSON"""


def demo(arguments: Sequence[str]) -> int:
    """Train a small model on this machine, draw, caption, write, report (about 9 minutes)."""
    from ..demo import run_demo

    options = parse(Demo, arguments, "demo")
    code, report = run_demo(options.run, options.minutes)
    if options.json:
        print_json(report)
    return code
