"""Figure 5 at a size anyone can run: arms, sizes and budgets, lines through them, and what parity costs.

    STUDY/results/*.json                 one a run; everything below is made of these
    STUDY/report.json, report.html       `transfuse study scaling --report-only` makes them anew
    STUDY/figures/*.svg                  the plots, one a file

Runs are queued in a shared folder (`queue.py`). A budget is a number of positions D for each arm that draws; a run
costs 6 N D; half of the positions are text and half captioned pictures, in every arm, as in the paper. Text alone takes
the steps of the first Transfusion and reads as much text. Measures are those of `transfuse study rivals` (`arms.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..presets import Recipe
from ..presets.scales import ARMS, SCALES, arm_recipe
from ..version import __version__
from .arms import UNEQUAL, stream, text_read
from .power_law import Better, Parity, Point, fit, parity
from .queue import Planned, Survey, plan_run, short

RIVAL = "chameleon"
FIRST = "transfusion"
"""whose steps text alone takes"""


@dataclass(frozen=True)
class Measure:
    """guard: a share that must lie above chance, its interval too, for the value to say something (footnote 16).

    paper: the paper's measure of the same, as `published.MEASURES` names it
    """

    key: str
    title: str
    better: Better
    guard: str | None = None
    paper: str | None = None


MEASURES: tuple[Measure, ...] = (
    Measure("text_perplexity", "Perplexity of unread definitions", "lower", paper="C4"),
    Measure("caption_perplexity", "Perplexity of unseen captions", "lower"),
    Measure("caption_cider", "Captions: CIDEr-D", "higher", "caption_noun", "CIDEr"),
    Measure("caption_noun", "Captions: noun right", "higher", "caption_noun"),
    Measure("frechet", "Drawings: Fréchet distance", "lower", "noun", "FID"),
    Measure("noun", "Drawings: noun right", "higher", "noun"),
    Measure("both", "Drawings: noun and background right", "higher", "both", "CLIP"),
)

TARGETS: tuple[Literal["observed", "fitted"], ...] = ("observed", "fitted")
"""the rival's result as it was, and as its line has it"""
AXES: dict[str, tuple[str, str]] = {
    "flops": ("theoretical_flops", "6 N D, as the paper"),
    "same size": ("theoretical_flops", "6 N D, one size alone"),
    "executed": ("executed_flops", "operations executed"),
    "seconds": ("seconds", "seconds of training"),
}
"""what is held against what: key of a result, words"""
PACE = ("device", "processor", "threads", "precision")
"""facts of a result's machine in which runs must be alike for their seconds to compare"""


def plan_scaling(
    folder: Path, arms: Sequence[str], sizes: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]
) -> list[Planned]:
    """Every arm at every size with every budget and seed. Raises UserError for names that are not there."""
    check_grid(arms=arms, sizes=sizes, budgets=budgets, seeds=seeds)
    survey = Survey(folder)
    recipes = {(arm, size): arm_recipe(arm, size).settled() for arm, size in product({*arms, FIRST}, sizes)}
    assert len({stream(recipe) for recipe in recipes.values()}) == 1, "arms of one world, mixture and vocabulary"
    runs = []
    for arm, size, budget, seed in product(arms, sizes, budgets, seeds):
        name = f"{arm}-{size}-{short(budget)}-seed{seed}"
        facts = {"arm": arm, "size": size, "budget": budget, "seed": seed}
        recipe, payer = (_seeded(recipes[one, size], seed, name) for one in (arm, _payer(recipes, arm, size)))
        runs.append(plan_run(name, recipe, budget, payer, survey, facts))
    return runs


def check_grid(**axes: Sequence[Any]) -> None:
    """Raise UserError for an empty axis of a grid, one with something twice, or a budget that is none."""
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            found = ", ".join(map(str, values)) or "none"
            raise UserError(f"--{name}: expected at least one, and each once, found {found}")
    for name in ("budgets", "positions"):
        for budget in axes.get(name, ()):
            if not 0 < budget < math.inf:
                raise UserError(f"--{name}: expected positive numbers of positions, found {budget:g}")


def _payer(recipes: dict[tuple[str, str], Recipe], arm: str, size: str) -> str:
    return FIRST if recipes[arm, size].model.images == "none" else arm


def _seeded(recipe: Recipe, seed: int, name: str) -> Recipe:
    return replace(recipe, seed=seed, preset=name)


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything that the report says, from the results alone: plain JSON."""
    order = list(ARMS)
    arms = sorted({result["arm"] for result in results}, key=order.index)
    ours = [arm for arm in arms if arm != RIVAL]
    return {
        "study": "scaling",
        "version": __version__,
        "results": list(results),
        "failures": list(failures),
        "lines": {
            measure.key: {arm: _line(results, measure, arm) for arm in arms if _has(results, measure, arm)}
            for measure in MEASURES
        },
        "parity": {
            axis: {
                measure.key: {arm: _parity(results, measure, arm, axis) for arm in ours if _has(results, measure, arm)}
                for measure in MEASURES
            }
            for axis in AXES
        },
        "unet_gain": list(_unet_gain(results)),
    }


def _of(results: Iterable[dict[str, Any]], arm: str, measure: Measure) -> list[dict[str, Any]]:
    return [result for result in results if result["arm"] == arm and measure.key in result]


def _has(results: Sequence[dict[str, Any]], measure: Measure, arm: str) -> bool:
    return bool(_of(results, arm, measure))


def left_out(result: dict[str, Any], measure: Measure) -> str:
    """Why a result's value says nothing of the law: no better than guessing, or as good as can be; "" if it does."""
    if result[measure.key] <= 0:
        return "not positive"
    if _guesses(result, measure):
        return f"{str(measure.guard).replace('_', ' ')} no better than guessing"
    if measure.guard == measure.key and result[f"{measure.key}_interval"][1] >= 1:
        return "can not be told from 100 %"
    return ""


def _guesses(result: dict[str, Any], measure: Measure) -> bool:
    guard = measure.guard
    return guard is not None and bool(result[f"{guard}_interval"][0] <= result[f"{guard}_chance"])


def beaten(results: Sequence[dict[str, Any]], measure: Measure, cost: str) -> dict[str, str]:
    """Runs of one arm that a cheaper one of it beats, and which: a network too large for its positions, say, is not
    what the arm can do for that cost. One that guesses beats none: the blurs it draws may lie near real pictures.
    Seeds of a size and budget count together, by their means."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["size"], result["budget"]), []).append(result)
    means = {cell: [_mean(some, key) for key in (cost, measure.key)] for cell, some in cells.items()}
    sign = 1 if measure.better == "higher" else -1
    found = {}
    able = {cell: means[cell] for cell, some in cells.items() if not any(_guesses(one, measure) for one in some)}
    for cell, (spent, value) in means.items():
        for (size, budget), (less, other) in able.items():
            if less < spent and sign * other > sign * value:
                said = f"{size} on {short(budget)} positions is cheaper and better"
                found.update({result["run"]: said for result in cells[cell]})
                break
    return found


def _mean(results: Sequence[dict[str, Any]], key: str) -> float:
    return float(sum(result[key] for result in results)) / len(results)


def _unbeaten(results: Sequence[dict[str, Any]], measure: Measure, cost: str) -> list[dict[str, Any]]:
    out = beaten(results, measure, cost)
    return [result for result in results if result["run"] not in out]


def _points(results: Sequence[dict[str, Any]], measure: Measure, cost: str) -> list[Point]:
    return [
        Point(result[cost], result[measure.key], result["run"]) for result in results if not left_out(result, measure)
    ]


def _line(results: Sequence[dict[str, Any]], measure: Measure, arm: str) -> dict[str, Any]:
    some, cost = _of(results, arm, measure), "theoretical_flops"
    reasons = beaten(some, measure, cost)
    line = fit(_points([result for result in some if result["run"] not in reasons], measure, cost))
    reasons |= {result["run"]: why for result in some if (why := left_out(result, measure))}
    return {"line": None if line is None else asdict(line), "left_out": reasons}


def _as_json(ratio: Parity) -> dict[str, Any]:
    return {**asdict(ratio), "below_one": ratio.below_one()}


def _parity(results: Sequence[dict[str, Any]], measure: Measure, arm: str, axis: str) -> dict[str, Any]:
    """Ratios to the rival's result as it was observed, and as its line has it."""
    cost, _ = AXES[axis]
    ours, rivals = (_of(results, name, measure) for name in (arm, RIVAL))
    if not rivals:
        nothing = _as_json(Parity(None, note="no run of the rival is done"))
        return {"observed": nothing, "fitted": nothing}
    if axis == "same size":
        size = _longest_studied(rivals)
        ours, rivals = ([one for one in some if one["size"] == size] for some in (ours, rivals))
    if measure.key == "text_perplexity":
        shares = [text_read(one) / one["positions"] for one in [*ours, *rivals]]
        if (times := max(shares) / min(shares)) > UNEQUAL:
            note = f"one arm reads {times:.2g} times the text at equal positions: not comparable"
            nothing = _as_json(Parity(None, note=note))
            return {"observed": nothing, "fitted": nothing}
    machines = {tuple(one["machine"].get(fact) for fact in PACE) for one in [*ours, *rivals]}
    if axis == "seconds" and len(machines) > 1:
        nothing = _as_json(Parity(None, note="runs on different machines: seconds do not compare"))
        return {"observed": nothing, "fitted": nothing}
    ours, rivals = (_unbeaten(some, measure, cost) for some in (ours, rivals))
    dearest = max(rivals, key=lambda result: result[cost])
    seeds = [one for one in rivals if (one["size"], one["budget"]) == (dearest["size"], dearest["budget"])]
    best = _points(seeds, measure, cost)
    if len(best) < len(seeds):
        said = next(why for one in seeds if (why := left_out(one, measure)))
        nothing = _as_json(Parity(None, note=f"the rival's dearest run does not count: {said}"))
        return {"observed": nothing, "fitted": nothing}
    found: dict[str, Any] = {}
    for target in TARGETS:
        mine, theirs = (_points(some, measure, cost) for some in (ours, rivals))
        found[target] = _as_json(parity(mine, theirs, measure.better, target, best))
    return found


def _longest_studied(results: Sequence[dict[str, Any]]) -> str:
    """The size with the most budgets, the largest of several."""
    budgets: dict[str, set[float]] = {}
    for result in results:
        budgets.setdefault(result["size"], set()).add(result["budget"])
    return max(budgets, key=lambda size: (len(budgets[size]), list(SCALES).index(size)))


def _unet_gain(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """U-Net against linear at equal size, budget and seed (Table 7): Fréchet distances, linear over U-Net."""

    def cell(result: dict[str, Any]) -> tuple[Any, ...]:
        return result["size"], result["budget"], result["seed"]

    unet = {cell(one): one for one in results if one["arm"] == "transfusion-unet"}
    pairs = [(one, unet[cell(one)]) for one in results if one["arm"] == FIRST and cell(one) in unet]
    for linear, other in sorted(pairs, key=lambda pair: (list(SCALES).index(pair[0]["size"]), pair[0]["budget"])):
        yield {
            **{name: linear[name] for name in ("size", "budget", "seed")},
            "frechet_linear": linear["frechet"],
            "frechet_unet": other["frechet"],
            "ratio": linear["frechet"] / other["frechet"] if other["frechet"] > 0 else None,
        }
