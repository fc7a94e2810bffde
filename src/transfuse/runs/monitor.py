"""Monitoring of a training run: a grid of images, metrics of `transfuse evaluate`, and the best weights by one of them.

run/measures/     samples, captions and judges, as `transfuse evaluate` keeps them
run/best/         an export of the best weights so far
run/best.json     the number they are best by, and its step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
from torch import Tensor

from ..config import nearest, read_json
from ..data.bundled import SceneScorer
from ..errors import UserError
from ..evaluation import EvalConfig, EvalContext, Metric, check, evaluate, named, numbers
from ..evaluation.context import Result
from ..evaluation.generate import weights_digest
from ..evaluation.image_quality import MOBILENET
from ..export import Exported
from ..inference import TransfusionPipeline
from ..io import atomic_write
from ..log import logger
from ..model import Transfusion
from ..recipes import Recipe
from ..training import Trainer
from ..training.trainer import SINCE_BEST
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
        Exported(model, run.process, run.autoencoder, run.tokenizer, run.sources.image_size, run.recipe.generation)
    )


def sample_grid(run: Run) -> Callable[[dict[str, Tensor], Path], None] | None:
    """Return a function that draws held-out prompts with averaged weights as one PNG; None without captions."""
    prompts = run.sources.held_out_prompts(GRID[0] * GRID[1])
    if not prompts:
        return None

    def sample(weights: dict[str, Tensor], path: Path) -> None:
        images = pipeline_of(run, weights)(prompts, generator=0, output_type="np").images
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images, GRID[1], zoom=max(1, 96 // run.sources.image_size)).save(path)
        path.with_suffix(".txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")

    return sample


def measuring(
    run: Run, trainer: Trainer, folder: Path, export_best: Callable[[dict[str, Tensor]], object]
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """Return a function from averaged weights to numbers by "METRIC/NUMBER". All ranks must call this.

    Raises UserError, before training begins, for an unknown name, or if a metric lacks something.
    """
    loop = run.recipe.loop
    metrics = named(loop.measures, "loop.measures")
    scorer, config = None, EvalConfig(count=loop.measure_count, data=loop.measure_data, features=MOBILENET)
    if not loop.measure_data:
        scorer = SceneScorer(replace(run.recipe.data.world, size=run.sources.image_size, split="train"))
        config = EvalConfig(count=loop.measure_count)

    def context_of(weights: dict[str, Tensor]) -> EvalContext:
        # Keyed by the weights, not the step: after a rollback a step comes again with other weights.
        return EvalContext(pipeline_of(run, weights), weights_digest(weights), folder / "measures", scorer, config)

    first = trainer.averaged()
    trainer.ranks.on_rank0(lambda: _check(context_of(first), metrics, loop.best))

    def measure(weights: dict[str, Tensor]) -> dict[str, float]:
        results: dict[str, Result] = {}
        for outcome in evaluate(context_of(weights), metrics):
            results |= {f"{outcome.measure}/{result.name}": result for result in outcome}
        if loop.best:
            best = results.get(loop.best)
            if best is None:  # a number that the metric has for some data alone
                raise UserError(f"loop.best: expected one of {', '.join(sorted(results))}, found {loop.best!r}")
            if is_best(folder / "best.json", loop.best, best):
                export_best(weights)
                note = {"measure": loop.best, "value": best.value, "step": trainer.step}
                note |= {"implementation": best.implementation, "data": best.data}
                atomic_write(
                    folder / "best.json", lambda path: path.write_text(json.dumps(note) + "\n", encoding="utf-8")
                )
        values = {name: result.value for name, result in results.items()}
        logger.info(f"step {trainer.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if loop.best:  # by the file, because a resumed run meets the step of its best again
            values[SINCE_BEST] = max(0.0, trainer.step - read_json(folder / "best.json")["step"])
        return values

    return measure


def _check(context: EvalContext, metrics: Sequence[Metric], best: str) -> None:
    check(context, metrics)
    known = numbers(context, metrics)
    if best and best not in known:
        raise UserError(f'loop.best: unknown number "{best}"{nearest(best, known)}')


def is_best(path: Path, name: str, result: Result) -> bool:
    """Return True if a result is better than the one in `best.json`.

    A note of another number, judge, data set or sample count does not count.
    """
    noted = read_json(path) if path.is_file() else None
    if not isinstance(noted, dict) or noted.get("measure") != name:
        return True
    if any(noted.get(key, "") != getattr(result, key) for key in ("implementation", "data")):
        return True
    sign = 1 if result.better == "higher" else -1
    return sign * result.value > sign * float(noted["value"])
