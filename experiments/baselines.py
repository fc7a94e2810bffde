"""Transfusion, Chameleon and a text-only Llama on equal compute, text and images, measured the same way.

    python -m experiments.baselines --flops 2e14          or: transfuse study baselines --flops 2e14

6 N D is the paper's measure of compute: all parameters, all positions. What was executed and how long it took are in
the table too. Half of the positions of a variant that draws are text. At equal 6 N D the one with the fewest parameters
has the most positions, so it reads more text: transfusion-32 1.06 times as much as chameleon-32. A text-only variant
takes the steps of the first and reads as much, for less compute. Variants may be trained by several processes, as in
every study.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoji_scenes.accuracy import held_out_scenes
from transfuse.cli.options import read
from transfuse.errors import UserError
from transfuse.model.costs import count_parameters
from transfuse.recipes import preset
from transfuse.report import Bar, Bars, Page, Section, Table
from transfuse.runs import resolve
from transfuse.version import __version__

from .common import (
    Shared,
    StudyRun,
    comparable,
    drawings_section,
    failures_block,
    plan_run,
    run_script,
    run_study,
    write_report,
)
from .evaluation import unequal_text, with_variant


@dataclass(frozen=True)
class Baselines(Shared):
    """Train Transfusion and Chameleon on equal data and compute, a Llama on their texts, and measure them alike.

    transfuse study baselines --flops 2e14
    """

    run: Path = Path("runs/baselines")
    """folder of all runs, results and the report"""
    flops: float = 2e14
    """6 N D of each variant that draws"""
    presets: tuple[str, ...] = ("transfusion-32", "chameleon-32", "llama-32")
    """of equal scenes and batch size; a text-only one takes the steps of the first"""


ROWS: tuple[tuple[str, str, str], ...] = (
    ("parameters", "parameters", "{:,.0f}"),
    ("steps", "steps", "{:,.0f}"),
    ("positions", "positions (D)", "{:,.0f}"),
    ("images", "images seen", "{:,.0f}"),
    ("text_targets", "text tokens seen, captions included", "{:,.0f}"),
    ("definition_positions", "positions of definitions", "{:,.0f}"),
    ("theoretical_flops", "6 N D", "{:.3g}"),
    ("executed_flops", "executed FLOPs", "{:.3g}"),
    ("seconds", "seconds of training", "{:,.0f}"),
    ("background", "drawn: background right", "{:.1%}"),
    ("noun_strict", "drawn: noun right, of all 328 or none", "{:.1%}"),
    ("noun", "drawn: noun right, of the known", "{:.1%}"),
    ("both", "drawn: both right", "{:.1%}"),
    ("frechet", "drawn: Fréchet distance", "{:.2f}"),
    ("caption_background", "caption: background right", "{:.1%}"),
    ("caption_noun", "caption: noun right", "{:.1%}"),
    ("caption_cider", "caption: CIDEr-D", "{:.1f}"),
    ("caption_perplexity", "perplexity of unseen captions", "{:.2f}"),
    ("text_perplexity", "perplexity of unseen definitions", "{:.1f}"),
    ("bits_per_byte", "bits per byte of them", "{:.3f}"),
)
"""key of a result, words, format"""


def plan_baselines(folder: Path, flops: float, presets: Sequence[str]) -> list[StudyRun]:
    """Plan one run of each preset with equal 6 N D. Raises UserError for presets that do not compare."""
    if not 0 < flops < float("inf") or not presets:
        raise UserError(f"baselines: expected a budget and presets, found {flops:g} and {len(presets)}")
    recipes = {name: resolve(preset(name), here=False).recipe for name in presets}
    if len({comparable(recipe) for recipe in recipes.values()}) > 1:
        raise UserError(
            f"baselines: expected presets of one world, mixture, vocabulary and seed, found {', '.join(presets)}"
        )
    first = recipes[presets[0]]
    held_out_scenes(first.data.world, 1)  # refuses scenes that cannot be measured, before any training
    runs = []
    for name, recipe in recipes.items():
        budget_model = first if recipe.model.images == "none" else recipe
        positions = flops / (6 * count_parameters(budget_model.model).active)
        runs.append(plan_run(folder, name, recipe, positions, budget_model, {"variant": name, "seed": recipe.seed}))
    return runs


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the report, as JSON."""
    return {"study": "baselines", "version": __version__, "results": list(results), "failures": list(failures)}


def variants_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the results by variant, also of a report from before `arms` were called variants."""
    if "arms" in report:
        return {name: with_variant(result) for name, result in report["arms"].items()}
    return {result["variant"]: result for result in report["results"]}


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """Return a row for each number, with a column for each variant."""
    rows = []
    for key, words, form in ROWS:
        cells = []
        for result in variants_of(report).values():
            cell = form.format(result[key]) if key in result else ""
            if f"{key}_interval" in result:
                low, high = (form.format(bound) for bound in result[f"{key}_interval"])
                cell += f" ({low} to {high})"
            cells.append(cell)
        rows.append([words, *cells])
    return rows


def table(report: dict[str, Any]) -> str:
    """Return the report as a Markdown table, with a column for each variant."""
    names = list(variants_of(report))
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows_of(report))]) + "\n"


def baselines_page(report: dict[str, Any], folder: Path) -> Page:
    """Return the page: bars of every variant's main measures, then all numbers."""
    bars = []
    for key, words, better in (
        ("noun", "drawn: noun right", "higher"),
        ("frechet", "Fréchet distance", "lower"),
        ("caption_noun", "caption: noun right", "higher"),
        ("text_perplexity", "perplexity of definitions", "lower"),
    ):
        for name, result in variants_of(report).items():
            if key in result:
                low, high = result[f"{key}_interval"]
                reference = result.get("frechet_of_other_real_images") if key == "frechet" else None
                chance = result.get(f"{key}_chance")
                bars.append(Bar(f"{words}: {name}", result[key], low, high, chance, reference, better))
    numbers = Table(["", *variants_of(report)], rows_of(report))
    world = preset(Baselines.presets[0]).data.world
    note, results = "In brackets 95 % intervals over items.", list(variants_of(report).values())
    if results and (factor := unequal_text(results)):
        note += f" One variant reads {factor:.3g} times the text of another: their perplexities of text do not compare."
    return Page(
        "Transfusion and its baselines",
        f"{', '.join(variants_of(report))}: equal compute (6 N D), equal shares of text and images, one evaluation.",
        [Bars(bars, "a variant", "other real images")],
        [
            *drawings_section(folder, list(variants_of(report)), world),
            Section("All numbers", note, [numbers, *failures_block(report)]),
        ],
    )


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the study; return the exit code and the report."""
    options = read(Baselines, arguments, "study baselines")

    def plan() -> list[StudyRun]:
        return plan_baselines(options.run, options.flops, options.presets)

    settings = {"study": "baselines", "flops": options.flops, "presets": list(options.presets)}
    return run_study(options, plan, settings, lambda folder: write_report(folder, analyse, baselines_page), table)


if __name__ == "__main__":
    run_script(main)
