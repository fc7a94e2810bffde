"""The rivals on equal terms: arms that draw get the same 6 N D, all the same data in the same order and measures.

    runs/rivals/transfusion-32/      a run like any other, resumable, with its export
    runs/rivals/chameleon-32/
    runs/rivals/recogniser.safetensors
    runs/rivals/report.json, report.md, drawings.png

Arms may be trained apart, on other cores or machines that share the folder: `--only chameleon-32`. What is finished is
not done again. 6 N D is the paper's measure: all parameters, all positions, whatever a step really costs; what was
executed and how long it took stand beside it. A text-only arm takes the steps of the first: the same texts, and less
compute.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration import read_json
from ..console import say
from ..data.world import glosses
from ..errors import UserError
from ..evaluation import (
    Measured,
    Recogniser,
    caption_accuracy,
    draw_accuracy,
    held_out_scenes,
    keep_recogniser,
    perplexity,
)
from ..evaluation.reconstruction import frechet_distance
from ..inference import TransfusionPipeline
from ..model.flops import count_parameters
from ..presets import Recipe, preset
from ..presets.recipe import build_trainer
from ..presets.runs import read_recipe, resolve
from ..training import RESUMABLE, read_metrics
from .samples import grid
from .training import train_run

SURVEYED = 50
"""steps whose positions are counted to turn a budget into a number of steps"""
SHOWN = 12
"""pictures a row of the contact sheet"""

ROWS: tuple[tuple[str, str, str], ...] = (
    ("parameters", "parameters", "{:,.0f}"),
    ("steps", "steps", "{:,.0f}"),
    ("positions", "positions (D)", "{:,.0f}"),
    ("images", "pictures seen", "{:,.0f}"),
    ("text_targets", "text tokens seen", "{:,.0f}"),
    ("theoretical_flops", "6 N D", "{:.3g}"),
    ("executed_flops", "operations executed", "{:.3g}"),
    ("seconds", "seconds of training", "{:,.0f}"),
    ("background", "drawn: background right", "{:.1%}"),
    ("noun", "drawn: noun right", "{:.1%}"),
    ("frechet", "drawn: Fréchet distance", "{:.2f}"),
    ("caption_background", "caption: background right", "{:.1%}"),
    ("caption_noun", "caption: noun right", "{:.1%}"),
    ("caption_perplexity", "perplexity of unseen captions", "{:.2f}"),
    ("text_perplexity", "perplexity of unread definitions", "{:.1f}"),
    ("bits_per_byte", "bits per byte of them", "{:.3f}"),
)
"""of the table: key, words, format"""


def run_rivals(
    folder: Path, flops: float, presets: Sequence[str], pictures: int, only: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Train every arm, or one, on `flops` of 6 N D, then measure all that are trained and write the table.

    Gives the exit code (75: stopped and saved) and the report. Raises UserError for arms that do not go together.
    """
    if flops <= 0 or not presets or pictures < 2:
        found = f"{flops:g}, {len(presets)} and {pictures}"
        raise UserError(f"rivals: expected a budget, presets and at least 2 pictures, found {found}")
    if only is not None and only not in presets:
        raise UserError(f'rivals: --only: expected one of {", ".join(presets)}, found "{only}"')
    recipes = {name: preset(name).settled() for name in presets}
    if len({_stream(recipe) for recipe in recipes.values()}) > 1:
        raise UserError(
            f"rivals: expected presets of one world, mixture, vocabulary and seed, found {', '.join(presets)}"
        )
    held_out_scenes(recipes[presets[0]].data.world, 1)  # a world that can not be measured is refused now
    _claim(folder, {"flops": flops})
    for name in [only] if only else presets:
        if (folder / name / "export" / "config.json").is_file():
            continue
        trained = train_run(_budgeted(recipes, name, flops, folder / name), folder / name)
        if trained.export is None:
            return RESUMABLE, {}
    missing = [name for name in presets if not (folder / name / "export" / "config.json").is_file()]
    if missing:
        say(f"{folder}: {', '.join(missing)} still to be trained; then the table is written")
        return 0, {}
    return 0, _measure(folder, recipes, pictures, flops)


def _stream(recipe: Recipe) -> tuple[Any, ...]:
    """What makes sample i what it is, and its words what they are."""
    data = recipe.data
    mixture = data.batch_size, data.text_share, data.share_of, data.pairs
    return data.world, mixture, recipe.model.vocabulary, recipe.seed


def _claim(folder: Path, budget: dict[str, Any]) -> None:
    """One folder, one budget: arms of two would stand in one table as if they were equal."""
    path = folder / "budget.json"
    if path.is_file():
        if read_json(path) != budget:
            raise UserError(f"{path}: expected --flops {read_json(path)['flops']:g}, found {budget['flops']:g}")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(budget) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None


def _budgeted(recipes: dict[str, Recipe], name: str, flops: float, folder: Path) -> Recipe:
    """The recipe with as many steps as its budget pays for; those of a run that has begun stay."""
    if (folder / "config.json").is_file():
        return read_recipe(folder / "config.json", Recipe)
    recipe = recipes[name]
    payer = next(iter(recipes.values())) if recipe.model.images == "none" else recipe
    with tempfile.TemporaryDirectory() as scratch:
        trainer, _ = build_trainer(resolve(payer), Path(scratch))
        counted = [batch.quantities["positions"] for step in range(SURVEYED) for batch in trainer.load(step)]
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    steps = max(1, round(flops / (6 * parameters * sum(counted) / SURVEYED)))
    say(f"{name}: {steps} steps of {sum(counted) / SURVEYED:.0f} positions (of {payer.preset})")
    return replace(recipe, loop=replace(recipe.loop, steps=steps, sample_every=0))


def _measure(folder: Path, recipes: dict[str, Recipe], pictures: int, flops: float) -> dict[str, Any]:
    world = next(iter(recipes.values())).data.world
    recogniser = keep_recogniser(folder / "recogniser.safetensors", world)
    _, _, real = held_out_scenes(world, pictures)
    _, _, other = held_out_scenes(world, pictures, seed=1)
    there = recogniser.features(real)
    report: dict[str, Any] = {
        "flops": flops,
        "pictures_measured": pictures,
        "recogniser_accuracy": recogniser.accuracy,
        "frechet_of_other_real_pictures": frechet_distance(recogniser.features(other), there),
        "arms": {},
    }
    sheet = list(real[:SHOWN])
    for name in recipes:
        say(f"{name}: measuring")
        arm, drawn = _measure_arm(folder / name, real, recogniser)
        report["arms"][name] = arm
        sheet += list(drawn[:SHOWN])
    grid(sheet, min(SHOWN, pictures), zoom=max(1, 96 // world.size)).save(folder / "drawings.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(table(report))
    say(f"{folder / 'report.md'}: written")
    return report


def _measure_arm(folder: Path, real: np.ndarray, recogniser: Recogniser) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one arm, each number with its 95 % interval where it has one; and its drawings."""
    recipe = read_recipe(folder / "config.json", Recipe)
    pipe = TransfusionPipeline.from_pretrained(folder / "export")
    totals = read_metrics(folder / "metrics.jsonl")[-1]
    parameters = count_parameters(recipe.model).total
    arm: dict[str, Any] = {
        "preset": recipe.preset,
        "parameters": parameters,
        "steps": recipe.loop.steps,
        **{name: totals[name] for name in ("positions", "images", "text_targets", "seconds")},
        "theoretical_flops": 6 * parameters * totals["positions"],
        "executed_flops": totals["flops"],
        "guidance_scale": pipe.exported.generation.guidance_scale,
    }
    text = perplexity(pipe.exported, glosses("heldout"))
    found: dict[str, Measured] = {"text_perplexity": text.perplexity, "bits_per_byte": text.bits_per_byte}
    drawn = np.empty((0, *real.shape[1:]), dtype=np.uint8)
    if recipe.model.images != "none":
        drawings = draw_accuracy(pipe, recipe.data.world, len(real), recogniser)
        captions = caption_accuracy(pipe, recipe.data.world, len(real))
        drawn = drawings.images
        reconstructed = pipe.exported.autoencoder.decode(pipe.exported.autoencoder.encode(real))
        there = recogniser.features(real)
        arm["frechet"] = frechet_distance(recogniser.features(drawn), there)
        arm["frechet_of_reconstructions"] = frechet_distance(recogniser.features(reconstructed), there)
        arm["images_per_second"] = len(real) / drawings.seconds
        found |= {
            "background": drawings.background,
            "noun": drawings.noun,
            "caption_background": captions.background,
            "caption_noun": captions.noun,
            "caption_perplexity": perplexity(pipe.exported, captions.truths).perplexity,
        }
    for name, measured in found.items():
        arm |= {name: measured.value, f"{name}_interval": [measured.low, measured.high]}
    return arm, drawn


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
