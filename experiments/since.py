"""The open ablation table of unified models: what the field measured since 2024, one switch a row.

    python -m experiments.since --size s --positions 1e6 --seeds 0 1 2        or: transfuse study since ...

A row is a file of `experiments/rows/`: its first line says what it is, the rest is settings for the preset
`latents-32`. The same file trains the row alone: `transfuse train latents-32 --config experiments/rows/flow.toml`.
`best` combines switches, and `best-without-X` leaves the switch of row X out. All rows get the same number of
positions, the same share of them text, the same seeds and the same judges; differences are paired by seed. Rows that
lose stay. `clean-copy` is compared with `capped`, too: both learn images that come before text, in equal pairs. An
image that stands twice takes more positions, so that row makes fewer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from transfuse.cli.options import read
from transfuse.config import nearest, read_settings, updated
from transfuse.errors import UserError
from transfuse.recipes import Recipe, preset
from transfuse.recipes.paper import scaled
from transfuse.report import Bar, Bars, Block, Details, Numbers, Page, Section, Table, Text
from transfuse.runs import resolve
from transfuse.version import __version__

from .common import (
    Shared,
    StudyRun,
    check_grid,
    common_scale,
    difference_cells,
    drawings_section,
    failures_block,
    plan_run,
    run_script,
    run_study,
    write_report,
)
from .evaluation import by_seed, check_one_size
from .statistics import Difference, paired, weighted_sums

FOLDER = Path(__file__).with_name("rows")
PRESET, BASE, BEST = "latents-32", "base", "best"

MEASURES: dict[str, tuple[str, str]] = {
    "noun_strict": ("drawn: noun right, strict judge", "higher"),
    "image_loss": ("diffusion loss of held-out images", "lower"),
    "frechet": ("drawn: Fréchet distance", "lower"),
    "caption_noun": ("caption: noun right", "higher"),
    "text_perplexity": ("perplexity of unseen definitions", "lower"),
    "seconds": ("seconds of training", "lower"),
}
"""key of a result, words, and which direction is better"""


@dataclass(frozen=True)
class Since(Shared):
    """Train the rows of the open ablation table at several seeds, and compare each with the base.

    transfuse study since --size s --positions 1e6 --seeds 0 1 2

    Any number of processes may run this command on one folder.
    """

    run: Path = Path("runs/since")
    """folder of all runs, results and the report"""
    rows: tuple[str, ...] = ()
    """names of rows, the files of experiments/rows; all if not given"""
    size: str = "s"
    """of the transformer: xxs, xs, s, m, l, xl, xxl"""
    positions: float = 1e6
    """positions that each row is trained on"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """differences are paired by seed; a single one gives no interval"""


def row_names() -> list[str]:
    """Return the names of all rows, the base first."""
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(names, key=lambda name: (name != BASE, name.startswith(BEST)))


def row_title(name: str) -> str:
    """Return what a row is, from the first line of its file."""
    return (FOLDER / f"{name}.toml").read_text().partition("\n")[0].removeprefix("# ")


def row_recipe(name: str, size: str) -> Recipe:
    """Return the recipe of a row with a transformer of another size. Raises UserError for an unknown name."""
    if name not in row_names():
        raise UserError(f'--rows: unknown name "{name}"{nearest(name, row_names())}')
    path = FOLDER / f"{name}.toml"
    return updated(scaled(preset(PRESET), size), read_settings(path), str(path))


def same_target(row: str, reference: str) -> bool:
    """Return True if two rows minimise one and the same diffusion loss, so that its values compare."""
    return row_recipe(row, "xs").diffusion == row_recipe(reference, "xs").diffusion


def references_of(row: str) -> tuple[str, ...]:
    """Return the rows that a row is compared with: `best` for a leave-one-out of it, the base for others."""
    if row == BASE:
        return ()
    if row.startswith(f"{BEST}-without-"):
        return (BEST,)
    return (BASE, "capped") if row == "clean-copy" else (BASE,)


def plan_since(folder: Path, rows: Sequence[str], size: str, positions: float, seeds: Sequence[int]) -> list[StudyRun]:
    """Plan rows at one size and budget, at every seed, with the rows they are compared with."""
    check_grid(rows=rows, seeds=seeds, positions=(positions,))
    wanted = list(dict.fromkeys([*(other for row in rows for other in references_of(row)), *rows]))
    recipes = {row: resolve(row_recipe(row, size), here=False).recipe for row in wanted}
    runs = []
    for row, seed in product(wanted, seeds):
        recipe = replace(recipes[row], seed=seed, preset=f"{row}-{size}")
        facts = {"variant": row, "size": size, "budget": positions, "seed": seed}
        runs.append(plan_run(folder, f"{row}-seed{seed}", recipe, positions, recipe, facts))
    return runs


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the report, as JSON: each row against the row it is compared with, by measure.

    Raises UserError for results of several sizes or budgets, whose differences are not those of the rows alone.
    """
    check_one_size("since", results)
    scores = {measure: by_seed(results, measure) for measure in MEASURES}
    trained = {result["variant"] for result in results}
    rows = [row for row in row_names() if row in trained]
    comparisons = []
    pairs = [(row, reference) for row in rows for reference in references_of(row)]
    for (row, reference), (measure, (_, better)) in product(pairs, MEASURES.items()):
        if measure == "image_loss" and not same_target(row, reference):
            continue
        if differences := weighted_sums({reference: -1, row: 1}, scores[measure]):
            difference, of = paired(differences), list(scores[measure][reference].values())
            comparisons.append(
                {
                    "row": row,
                    "reference": reference,
                    "measure": measure,
                    "reference_mean": fmean(of),
                    **asdict(difference),
                    "outcome": outcome(difference, better),
                }
            )
    return {
        "study": "since",
        "version": __version__,
        "titles": {row: row_title(row) for row in rows},
        "means": {row: {key: fmean(by[row].values()) for key, by in scores.items() if row in by} for row in rows},
        "results": list(results),
        "failures": list(failures),
        "comparisons": comparisons,
    }


def outcome(difference: Difference, better: str) -> str:
    """Return "better" or "worse" where the 95 % interval excludes 0, else "undecided"."""
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return "undecided"
    return "better" if (difference.mean > 0) == (better == "higher") else "worse"


def since_page(report: dict[str, Any], folder: Path) -> Page:
    """Return the page: the rows that are decided, then every row by measure, drawings, and all numbers."""
    comparisons, results, titles = report["comparisons"], report["results"], report["titles"]
    counted = [(each["outcome"], each["measure"]) for each in comparisons]
    numbers = Numbers(
        [
            (
                f"{words}: better",
                str(counted.count(("better", key))),
                f"of {sum(m == key for _, m in counted)} comparisons",
            )
            for key, (words, _) in MEASURES.items()
        ]
    )
    head = ["row", "what it is", *(words for words, _ in MEASURES.values()), "better than its reference", "worse"]
    table = [
        [row, titles[row], *mean_cells(means), *decided(row, comparisons)] for row, means in report["means"].items()
    ]
    note = (
        "Means over seeds; losses compare only where rows minimise the same. Undecided measures are in neither column."
    )
    sections = [Section("All rows", note, [Table(head, table)])]
    for key, (words, better) in MEASURES.items():
        alike = [each for each in comparisons if each["measure"] == key]
        if not alike:
            continue
        scale = common_scale(alike)
        bars = [
            Bar(label(each), each["mean"], each["low"], each["high"], better="", scale=scale,
                note=f"{titles[each['row']]}; {each['outcome']}")
            for each in alike
        ]  # fmt: skip
        head = ["row", "compared with", "its mean", "difference", "95 %", "seeds", ""]
        rows = [
            [
                each["row"],
                each["reference"],
                f"{each['reference_mean']:.4g}",
                *difference_cells(each),
                str(each["count"]),
                each["outcome"],
            ]
            for each in alike
        ]
        blocks: list[Block] = [Bars(bars, "difference"), Details("The same as a table", [Table(head, rows)])]
        sections.append(Section(words[0].upper() + words[1:], f"The {better}, the better.", blocks))
    seed = min(result["seed"] for result in results)
    sections += drawings_section(folder, [f"{row}-seed{seed}" for row in titles], preset(PRESET).data.world)
    head = ["run", "steps", "positions", "images", "parameters", *(words for words, _ in MEASURES.values())]
    every = [
        [result["run"], *(f"{result[key]:,.0f}" for key in ("steps", "positions", "images", "parameters")),
         *(f"{result[key]:.4g}" if key in result else "" for key in MEASURES)]
        for result in sorted(results, key=lambda run: (run["variant"], run["seed"]))
    ]  # fmt: skip
    note = (
        "A difference is the mean over seeds of paired differences with its 95 % interval (Student's t); better or "
        "worse where the interval excludes 0. Leave-one-outs are compared with `best`, other rows with `base`, "
        "`clean-copy` with `capped`, too. Seconds compare only where all runs had the machine to themselves."
    )
    lead = (
        f"{len(titles)} recipes of size {results[0]['size']} on {results[0]['budget']:,.0f} positions, "
        f"up to {len({result['seed'] for result in results})} seeds: what does each switch give?"
    )
    provenance = [Details("How differences are judged", [Text(note)]), Details("Every run", [Table(head, every)])]
    return Page("Since 2024, one switch a row", lead, [numbers], sections, [*provenance, *failures_block(report)])


def label(comparison: dict[str, Any]) -> str:
    """Return the name of a comparison: its row, and what that is compared with if it is not the first of several."""
    row, reference = comparison["row"], comparison["reference"]
    return row if reference == references_of(row)[0] else f"{row} against {reference}"


def mean_cells(means: dict[str, float]) -> list[str]:
    """Return a row's mean of each measure, "" where it has none."""
    return [f"{means[key]:.4g}" if key in means else "" for key in MEASURES]


def decided(row: str, comparisons: Sequence[dict[str, Any]]) -> list[str]:
    """Return the measures in which a row is better, and those in which it is worse, than its first reference."""
    own = [each for each in comparisons if label(each) == row]
    return [
        ", ".join(MEASURES[each["measure"]][0] for each in own if each["outcome"] == outcome) or "none"
        for outcome in ("better", "worse")
    ]


def summary(report: dict[str, Any]) -> str:
    """Return two Markdown tables: every row's means, seconds of training included, and every comparison."""
    words = [words for words, _ in MEASURES.values()]
    lines = [f"| row | {' | '.join(words)} |", f"| --- |{' ---: |' * len(words)}"]
    lines += [f"| {row} | {' | '.join(mean_cells(means))} |" for row, means in report["means"].items()]
    lines += ["", "| row | measure | difference | 95 % | |", "| --- | --- | ---: | --- | --- |"]
    for each in report["comparisons"]:
        cells = (label(each), MEASURES[each["measure"]][0], *difference_cells(each), each["outcome"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the study; return the exit code and the report."""
    options = read(Since, arguments, "study since")

    def plan() -> list[StudyRun]:
        return plan_since(
            options.run, options.rows or tuple(row_names()), options.size, options.positions, options.seeds
        )

    settings = {"study": "since", "size": options.size, "positions": options.positions}
    return run_study(options, plan, settings, lambda folder: write_report(folder, analyse, since_page), summary)


if __name__ == "__main__":
    run_script(main)
