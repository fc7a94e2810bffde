"""Measures while a run trains: any that `transfuse evaluate` knows, on few samples; and the best weights by one.

run/measures/     what was drawn and captioned, and the judges, as `transfuse evaluate` keeps them
run/best/         an export of the best so far          run/best.json     by which number, of which step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import nearest, read_json
from ..errors import UserError
from ..evaluation import EvalConfig, EvalContext, Metric, check, evaluate, named, numbers
from ..evaluation.recogniser import weights_digest
from ..evaluation.result import Result
from ..io import atomic_write
from ..log import logger
from ..presets.recipe import Recipe, export_weights
from ..presets.sources import image_size
from ..sequence import Tokenizer
from ..training import Trainer
from .samples import pipelines


def measuring(
    recipe: Recipe, trainer: Trainer, tokenizer: Tokenizer, folder: Path
) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """What a trainer calls with averaged weights: numbers by "MEASURE/NUMBER". All ranks must call it.

    Raises UserError, before training begins, for an unknown name, and for what a measure lacks.
    """
    loop = recipe.loop
    measures = named(loop.measures, "loop.measures")
    pipe_of = pipelines(recipe, tokenizer)
    world = replace(recipe.data.world, size=image_size(recipe), split="train")

    def bench_of(weights: dict[str, Tensor]) -> EvalContext:
        options = EvalConfig(count=loop.measure_count)
        # By the weights, not the step: after a rollback a step may come again with others.
        return EvalContext(pipe_of(weights), weights_digest(weights), folder / "measures", world, options)

    first = trainer.averaged()
    trainer.ranks.on_rank0(lambda: _check(bench_of(first), measures, loop.best))

    def measure(weights: dict[str, Tensor]) -> dict[str, float]:
        bench = bench_of(weights)
        found: dict[str, Result] = {}
        for findings in evaluate(bench, measures):
            found |= {f"{findings.measure}/{result.name}": result for result in findings}
        if loop.best:
            if loop.best not in found:  # of those that a measure has for some data alone
                raise UserError(f"loop.best: expected one of {', '.join(sorted(found))}, found {loop.best!r}")
            if is_best(folder / "best.json", loop.best, found[loop.best]):
                export_weights(recipe, trainer, weights, tokenizer, folder / "best")
                best = found[loop.best]
                known = {"implementation": best.implementation, "data": best.data}
                note = {"measure": loop.best, "value": best.value, "step": trainer.step, **known}
                atomic_write(folder / "best.json", lambda path: path.write_text(json.dumps(note) + "\n"))
        numbers = {name: result.value for name, result in found.items()}
        logger.info(f"step {trainer.step}: " + "  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        return numbers

    return measure


def _check(bench: EvalContext, measures: Sequence[Metric], best: str) -> None:
    check(bench, measures)
    known = numbers(bench, measures)
    if best and best not in known:
        raise UserError(f'loop.best: unknown number "{best}"{nearest(best, known)}')


def is_best(path: Path, name: str, result: Result) -> bool:
    """Return whether a result is better than the one noted. A note of another number, or of the same by another judge,
    on other data or as many as before, does not count."""
    noted = read_json(path) if path.is_file() else None
    if not isinstance(noted, dict) or noted.get("measure") != name:
        return True
    if any(noted.get(key, "") != getattr(result, key) for key in ("implementation", "data")):
        return True
    sign = 1 if result.better == "higher" else -1
    return sign * result.value > sign * float(noted["value"])
