"""The rivals on equal terms: arms that draw get the same 6 N D, the same shares of text and pictures, one exam.

    runs/rivals/transfusion-32/      a run like any other, resumable, with its export
    runs/rivals/chameleon-32/
    runs/rivals/recogniser.safetensors
    runs/rivals/report.json, report.md, drawings.png

Arms may be trained apart, on other cores or machines that share the folder: `--only chameleon-32`. What is finished is
not done again. 6 N D is the paper's measure: all parameters, all positions, whatever a step really costs; what was
executed and how long it took stand beside it. Arms that draw read equally much text, half of their positions. A
text-only arm takes the steps of the first and reads as much, for less compute.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation import held_out_scenes, keep_recogniser
from ..log import logger
from ..model.flops import count_parameters
from ..presets import Recipe, preset
from ..presets.runs import read_recipe
from ..training import RESUMABLE
from .arms import Effort, Exam, pin, positions_per_step, stream
from .samples import grid
from .training import train_run

SHOWN = 12
"""pictures a row of the contact sheet"""

ROWS: tuple[tuple[str, str, str], ...] = (
    ("parameters", "parameters", "{:,.0f}"),
    ("steps", "steps", "{:,.0f}"),
    ("positions", "positions (D)", "{:,.0f}"),
    ("images", "pictures seen", "{:,.0f}"),
    ("text_targets", "text tokens seen, captions included", "{:,.0f}"),
    ("definition_positions", "positions of definitions", "{:,.0f}"),
    ("theoretical_flops", "6 N D", "{:.3g}"),
    ("executed_flops", "operations executed", "{:.3g}"),
    ("seconds", "seconds of training", "{:,.0f}"),
    ("background", "drawn: background right", "{:.1%}"),
    ("noun_strict", "drawn: noun right, strictly: of all 328 or none", "{:.1%}"),
    ("noun", "drawn: noun right, of the world's own", "{:.1%}"),
    ("both", "drawn: both right", "{:.1%}"),
    ("frechet", "drawn: Fréchet distance", "{:.2f}"),
    ("caption_background", "caption: background right", "{:.1%}"),
    ("caption_noun", "caption: noun right", "{:.1%}"),
    ("caption_cider", "caption: CIDEr-D", "{:.1f}"),
    ("caption_perplexity", "perplexity of unseen captions", "{:.2f}"),
    ("text_perplexity", "perplexity of unread definitions", "{:.1f}"),
    ("bits_per_byte", "bits per byte of them", "{:.3f}"),
)
"""of the table: key, words, format"""


def run_rivals(
    folder: Path, flops: float, presets: Sequence[str], effort: Effort, only: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Train every arm, or one, on `flops` of 6 N D, then measure all that are trained and write the table.

    Gives the exit code (75: stopped and saved) and the report. Raises UserError for arms that do not go together.
    """
    if not 0 < flops < math.inf or not presets:
        raise UserError(f"rivals: expected a budget and presets, found {flops:g} and {len(presets)}")
    if only is not None and only not in presets:
        raise UserError(f'rivals: --only: expected one of {", ".join(presets)}, found "{only}"')
    recipes = {name: preset(name).settled() for name in presets}
    if len({stream(recipe) for recipe in recipes.values()}) > 1:
        raise UserError(
            f"rivals: expected presets of one world, mixture, vocabulary and seed, found {', '.join(presets)}"
        )
    held_out_scenes(recipes[presets[0]].data.world, 1)  # a world that can not be measured is refused now
    pin(folder / "budget.json", {"flops": flops, "presets": list(presets)})
    for name in [only] if only else presets:
        if (folder / name / "export" / "config.json").is_file():
            continue
        trained = train_run(_budgeted(recipes, name, flops, folder / name), folder / name)
        if trained.export is None:
            return RESUMABLE, {}
    missing = [name for name in presets if not (folder / name / "export" / "config.json").is_file()]
    if missing:
        logger.info(f"{folder}: {', '.join(missing)} still to be trained; then the table is written")
        return 0, {}
    return 0, _measure(folder, recipes, effort, flops)


def _budgeted(recipes: dict[str, Recipe], name: str, flops: float, folder: Path) -> Recipe:
    """The recipe with as many steps as its budget pays for; those of a run that has begun stay."""
    if (folder / "config.json").is_file():
        return read_recipe(folder / "config.json", Recipe)
    recipe = recipes[name]
    payer = next(iter(recipes.values())) if recipe.model.images == "none" else recipe
    positions = positions_per_step(payer)
    steps = max(1, round(flops / (6 * count_parameters(payer.model).total * positions)))
    logger.info(f"{name}: {steps} steps of {positions:.0f} positions (of {payer.preset})")
    return replace(recipe, loop=replace(recipe.loop, steps=steps, sample_every=0))


def _measure(folder: Path, recipes: dict[str, Recipe], effort: Effort, flops: float) -> dict[str, Any]:
    world = next(iter(recipes.values())).data.world
    recogniser = keep_recogniser(folder / "recogniser.safetensors", world, effort.recogniser_steps)
    exam = Exam.of(world, effort, recogniser)
    report: dict[str, Any] = {
        "flops": flops,
        "pictures_measured": effort.pictures,
        "recogniser_accuracy": recogniser.accuracy,
        "frechet_of_other_real_pictures": exam.distance_of_real(),
        "arms": {},
    }
    sheet = list(exam.real[:SHOWN])
    for name in recipes:
        logger.info(f"{name}: measuring")
        report["arms"][name], drawn = exam.take(folder / name)
        sheet += list(drawn[:SHOWN])
    grid(sheet, min(SHOWN, effort.pictures), zoom=max(1, 96 // world.size)).save(folder / "drawings.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(table(report))
    logger.info(f"{folder / 'report.md'}: written")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, one column an arm."""
    arms = report["arms"]
    lines = [f"| | {' | '.join(arms)} |", "| --- |" + " ---: |" * len(arms)]
    for key, words, form in ROWS:
        cells = []
        for arm in arms.values():
            cell = form.format(arm[key]) if key in arm else ""
            if f"{key}_interval" in arm:
                low, high = (form.format(bound) for bound in arm[f"{key}_interval"])
                cell += f" ({low} to {high})"
            cells.append(cell)
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
