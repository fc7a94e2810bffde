"""Figure 5 at any size: train variants of several sizes on several budgets, fit power laws, and compare their cost.

    python -m experiments.scaling --sizes xs s m l --budgets 1e6 2e6 4e6       or: transfuse study scaling ...

A budget is a number of positions D for each variant that draws; a run costs 6 N D. Half of the positions are text and
half captioned images, in every variant, as in the paper. Text alone takes the steps of the first Transfusion and reads
as much text. Any number of processes may run the same command (`common.py`).

    STUDY/report.json, report.html       the analysis of STUDY/results/*.json; --report-only writes it again
    STUDY/figures/*.svg                  the plots as files
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transfuse.charts import ACCENT, SOFT, VIOLET, WARM, new_chart, svg_of
from transfuse.cli.options import read
from transfuse.io import atomic_write
from transfuse.recipes.paper import ARMS, SCALES, arm_recipe
from transfuse.report import Bar, Bars, Block, Charts, Details, Page, Section, Table, Text
from transfuse.runs import resolve
from transfuse.version import __version__

from . import paper_results
from .common import (
    Shared,
    StudyRun,
    check_grid,
    comparable,
    drawings_section,
    failures_block,
    plan_run,
    run_script,
    run_study,
    write_report,
)
from .evaluation import unequal_text
from .statistics import REACH, Better, Line, Parity, Point, fit, parity

BASELINE, FIRST = "chameleon", "transfusion"
COLOURS = {"transfusion": ACCENT, "transfusion-unet": VIOLET, "chameleon": WARM, "llama": SOFT}


@dataclass(frozen=True)
class Scaling(Shared):
    """Train variants of several sizes on several budgets, fit power laws, and compare their cost (Figure 5).

    transfuse study scaling --sizes xs s m l --budgets 1e6 2e6 4e6

    Any number of processes may run this command on one folder; each takes the next free run. Killed runs resume.
    """

    run: Path = Path("runs/scaling")
    """folder of all runs, results and the report"""
    variants: tuple[str, ...] = ("transfusion", "transfusion-unet", "chameleon", "llama")
    sizes: tuple[str, ...] = ("xs", "s", "m", "l")
    """of the transformer: xxs, xs, s, m, l, xl, xxl have 0.4 to 90 million parameters"""
    budgets: tuple[float, ...] = (1e6, 2e6, 4e6)
    """positions D of each variant that draws"""
    seeds: tuple[int, ...] = (0,)
    paper: bool = False
    """only fit the paper's printed points, and compare the ratios with the printed ones"""


@dataclass(frozen=True)
class Measure:
    """One measure of a result. key: in the result; paper: the paper's name of a corresponding measure.

    guard   a share that must be above chance, with its interval, for the value to count (footnote 16)
    """

    key: str
    title: str
    better: Better
    guard: str | None = None
    paper: str | None = None


MEASURES: tuple[Measure, ...] = (
    Measure("text_perplexity", "Perplexity of unseen definitions", "lower", paper="C4"),
    Measure("caption_perplexity", "Perplexity of unseen captions", "lower"),
    Measure("caption_cider", "Captions: CIDEr-D", "higher", "caption_noun", "CIDEr"),
    Measure("caption_noun", "Captions: noun right", "higher", "caption_noun"),
    Measure("frechet", "Drawings: Fréchet distance", "lower", "noun", "FID"),
    Measure("noun", "Drawings: noun right", "higher", "noun"),
    Measure("both", "Drawings: noun and background right", "higher", "both", "CLIP"),
)
AXES: dict[str, tuple[str, str, str]] = {
    "flops": ("theoretical_flops", "6 N D", "All runs by 6 N D, as in the paper."),
    "same size": ("theoretical_flops", "6 N D, one size", "Runs of the size with the most budgets of the baseline."),
    "executed": ("executed_flops", "executed FLOPs", "Executed: attention over visible keys, logits where learned."),
    "seconds": ("seconds", "seconds of training", "Wall-clock time; valid only where nothing else ran."),
}
"""key of a result, title, explanation"""
TARGETS: tuple[Literal["observed", "fitted"], ...] = ("observed", "fitted")
PACE = ("device", "processor", "threads", "precision")
"""facts of a machine that must be equal for seconds to compare"""


def plan_scaling(
    folder: Path, variants: Sequence[str], sizes: Sequence[str], budgets: Sequence[float], seeds: Sequence[int]
) -> list[StudyRun]:
    """Plan every variant at every size, budget and seed. Raises UserError for unknown names."""
    check_grid(variants=variants, sizes=sizes, budgets=budgets, seeds=seeds)
    recipes = {
        (name, size): resolve(arm_recipe(name, size), here=False).recipe
        for name, size in product({*variants, FIRST}, sizes)
    }
    assert len({comparable(recipe) for recipe in recipes.values()}) == 1, "variants of one mixture and vocabulary"
    runs = []
    for variant, size, budget, seed in product(variants, sizes, budgets, seeds):
        name = f"{variant}-{size}-{short(budget)}-seed{seed}"
        recipe = replace(recipes[variant, size], seed=seed, preset=name)
        budget_model = replace(recipes[FIRST, size], seed=seed) if recipe.model.images == "none" else recipe
        facts = {"variant": variant, "size": size, "budget": budget, "seed": seed}
        runs.append(plan_run(folder, name, recipe, budget, budget_model, facts))
    return runs


def short(number: float) -> str:
    """Return 2000000 as 2M and 150000 as 150k, for names."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the report, as JSON, from the results alone."""
    variants = sorted({result["variant"] for result in results}, key=list(ARMS).index)
    lines: dict[str, Any] = {}
    ratios: dict[str, Any] = {axis: {} for axis in AXES}
    for measure in MEASURES:
        measured = [variant for variant in variants if _of(results, variant, measure)]
        lines[measure.key] = {variant: _line(_of(results, variant, measure), measure) for variant in measured}
        for axis in AXES:
            others = [variant for variant in measured if variant != BASELINE]
            ratios[axis][measure.key] = {variant: _parity(results, measure, variant, axis) for variant in others}
    return {
        "study": "scaling",
        "version": __version__,
        "results": list(results),
        "failures": list(failures),
        "lines": lines,
        "parity": ratios,
        "unet_gain": list(_unet_gain(results)),
    }


def _of(results: Iterable[dict[str, Any]], variant: str, measure: Measure) -> list[dict[str, Any]]:
    return [result for result in results if result["variant"] == variant and measure.key in result]


def _guesses(result: dict[str, Any], measure: Measure) -> bool:
    guard = measure.guard
    return guard is not None and bool(result[f"{guard}_interval"][0] <= result[f"{guard}_chance"])


def why_left_out(result: dict[str, Any], measure: Measure) -> str:
    """Return why a value says nothing of a power law, "" if it does."""
    if result[measure.key] <= 0:
        return "not positive"
    if _guesses(result, measure):
        return f"{str(measure.guard).replace('_', ' ')} no better than guessing"
    if measure.guard == measure.key and result[f"{measure.key}_interval"][1] >= 1:
        return "cannot be distinguished from 100 %"
    return ""


def beaten(results: Sequence[dict[str, Any]], measure: Measure, cost: str) -> dict[str, str]:
    """Return the runs of one variant that a cheaper run of it beats, each with the reason.

    A network too large for its positions, for example, is not the best of its cost. Seeds of a size and budget count
    by their means. A run that guesses beats none: its blurs may be near real images.
    """
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["size"], result["budget"]), []).append(result)
    means = {
        cell: [float(np.mean([run[key] for run in runs])) for key in (cost, measure.key)]
        for cell, runs in cells.items()
    }
    able = [cell for cell, runs in cells.items() if not any(_guesses(run, measure) for run in runs)]
    sign, reasons = 1 if measure.better == "higher" else -1, {}
    for cell, (spent, value) in means.items():
        for size, budget in able:
            less, other = means[size, budget]
            if less < spent and sign * other > sign * value:
                reason = f"{size} on {short(budget)} positions is cheaper and better"
                reasons.update({run["run"]: reason for run in cells[cell]})
                break
    return reasons


def _points(results: Sequence[dict[str, Any]], measure: Measure, cost: str) -> list[Point]:
    kept = [result for result in results if not why_left_out(result, measure)]
    return [Point(result[cost], result[measure.key], result["run"]) for result in kept]


def _line(results: list[dict[str, Any]], measure: Measure) -> dict[str, Any]:
    reasons = beaten(results, measure, "theoretical_flops")
    kept = [result for result in results if result["run"] not in reasons]
    line = fit(_points(kept, measure, "theoretical_flops"))
    reasons |= {result["run"]: why for result in results if (why := why_left_out(result, measure))}
    return {"line": None if line is None else asdict(line), "left_out": reasons}


def _parity(results: Sequence[dict[str, Any]], measure: Measure, variant: str, axis: str) -> dict[str, Any]:
    """Return the ratios to the baseline's result as observed and as fitted, or why there are none."""

    def both(ratio_to: Callable[[Literal["observed", "fitted"]], Parity]) -> dict[str, Any]:
        ratios = {target: ratio_to(target) for target in TARGETS}
        return {target: {**asdict(ratio), "is_cheaper": ratio.is_cheaper()} for target, ratio in ratios.items()}

    def none(note: str) -> dict[str, Any]:
        return both(lambda target: Parity(None, note=note))

    cost = AXES[axis][0]
    ours, baseline = (_of(results, name, measure) for name in (variant, BASELINE))
    if not baseline:
        return none("no run of the baseline is done")
    if axis == "same size":  # with the most budgets, the largest of several
        budgets = {
            run["size"]: {other["budget"] for other in baseline if other["size"] == run["size"]} for run in baseline
        }
        size = max(budgets, key=lambda size: (len(budgets[size]), list(SCALES).index(size)))
        ours, baseline = ([run for run in runs if run["size"] == size] for runs in (ours, baseline))
    if measure.key == "text_perplexity" and (factor := unequal_text([*ours, *baseline], share=True)):
        return none(f"one variant reads {factor:.2g} times the text at equal positions: not comparable")
    machines = {tuple(run["machine"].get(fact) for fact in PACE) for run in [*ours, *baseline]}
    if axis == "seconds" and len(machines) > 1:
        return none("runs on different machines: seconds do not compare")
    for runs in (ours, baseline):
        weak = beaten(runs, measure, cost)
        runs[:] = [run for run in runs if run["run"] not in weak]
    top = max(baseline, key=lambda run: run[cost])
    seeds = [run for run in baseline if (run["size"], run["budget"]) == (top["size"], top["budget"])]
    for run in seeds:
        if why := why_left_out(run, measure):
            return none(f"the baseline's largest run does not count: {why}")
    our_points, baseline_points, goals = (_points(runs, measure, cost) for runs in (ours, baseline, seeds))
    return both(lambda target: parity(our_points, baseline_points, measure.better, target, goals))


def _unet_gain(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Yield Fréchet distances of U-Net and linear patch layers at equal size, budget and seed (Table 7)."""
    cell = ("size", "budget", "seed")
    unet = {tuple(run[key] for key in cell): run for run in results if run["variant"] == "transfusion-unet"}
    for linear in sorted(results, key=lambda run: (list(SCALES).index(run["size"]), run["budget"])):
        other = unet.get(tuple(linear[key] for key in cell))
        if linear["variant"] == FIRST and other is not None:
            yield {
                **{name: linear[name] for name in cell},
                "frechet_linear": linear["frechet"],
                "frechet_unet": other["frechet"],
                "ratio": linear["frechet"] / other["frechet"] if other["frechet"] > 0 else None,
            }


# --- figure and page --------------------------------------------------------------------------------------------------


def plot(report: dict[str, Any], measure: Measure, standalone: bool = False) -> str:
    """Return an SVG of a measure over 6 N D, both logarithmic, as in Figure 5; "" without a positive value.

    Bars are 95 % intervals; hollow points are left out of the lines.
    """
    figure, axes = new_chart("6 N D", measure.title if standalone else "")
    drawn = False
    for variant, fitted in report["lines"][measure.key].items():
        colour, label = COLOURS[variant], variant
        for result in _of(report["results"], variant, measure):
            x, y = result["theoretical_flops"], result[measure.key]
            if y <= 0:
                continue
            hollow = result["run"] in fitted["left_out"]
            low, high = result[f"{measure.key}_interval"]
            bars = None if hollow else [[max(0.0, y - max(low, y / 1e3))], [max(0.0, high - y)]]
            inside = "none" if hollow else colour
            axes.errorbar(x, y, yerr=bars, fmt="o", markersize=4, color=colour, markerfacecolor=inside, label=label)
            drawn, label = True, "_"
        if fitted["line"] is not None:
            line = Line(**fitted["line"])
            ends = (line.smallest, line.largest)
            axes.plot(ends, [line.at(end) for end in ends], color=colour, linewidth=1.5)
    if not drawn:
        return ""
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter("")  # labels between powers of ten would overlap
    axes.legend(frameon=False, fontsize="small", labelcolor=SOFT)
    return svg_of(figure, standalone)


def scaling_page(report: dict[str, Any], folder: Path) -> Page:
    """Return the page: parity ratios first, then lines, drawings, tables and every run."""
    results, ratios, bars = report["results"], [], []
    for measure in MEASURES:
        for variant, by_target in report["parity"]["flops"][measure.key].items():
            ratios.append((f"{variant}: {measure.title}", by_target["observed"]))
    known = [(name, ratio) for name, ratio in ratios if ratio["ratio"] is not None]
    numbers = [1.0, *(ratio[key] for _, ratio in known for key in ("ratio", "low", "high") if ratio[key] is not None)]
    scale = (max(1 / REACH, min(numbers) / 1.2), min(REACH, max(numbers) * 1.2))
    for name, ratio in known:
        bars.append(Bar(name, ratio["ratio"], ratio["low"], ratio["high"], reference=1.0, better="lower", scale=scale))
    summary: list[Block] = [Bars(bars, "parity ratio (log scale, lower is better)", "parity")] if bars else []
    counts = Counter(ratio["is_cheaper"] for _, ratio in ratios)
    failed = f", {len(report['failures'])} failed" if report["failures"] else ""
    lead = (
        f"{len(results)} runs{failed}: the part of the largest Chameleon's compute that other variants need for its "
        f"result. Of {len(ratios)} comparisons {counts['reproduced']} are below 1, {counts['not reproduced']} above 1, "
        f"{counts['undecided']} undecided."
    )
    charts = [(measure.title, svg) for measure in MEASURES if (svg := plot(report, measure))]
    by_cost = sorted(results, key=lambda result: result["theoretical_flops"])
    largest = list({result["variant"]: result["run"] for result in by_cost}.values())
    tables = [
        Section(f"Parity by {title}", about, [_parity_table(report, axis)]) for axis, (_, title, about) in AXES.items()
    ]
    sections = [
        Section("Power laws", _LINES, [Charts(charts), Details("Slopes", [_slopes(report)])]),
        *drawings_section(folder, largest, ARMS[FIRST]().data.world),
        *tables,
        *([Section("U-Net and linear patch layers", _UNET, [_unet_table(report)])] if report["unet_gain"] else []),
    ]
    runs = [Details("Every run", [_runs_table(report)]), *failures_block(report)]
    return Page("Transfusion and Chameleon at equal compute", lead, [*summary, Text(_PARITY)], sections, runs)


_PARITY = (
    "Parity ratio: the 6 N D at which a variant's line equals the score of the largest Chameleon, over the 6 N D of "
    "that Chameleon; below 1, less compute is needed. Intervals are 95 % by Fieller's theorem. The paper's ratios have "
    "other data and sizes, and no intervals."
)
_LINES = (
    "Both axes are logarithmic; bars are 95 % intervals over items. Hollow points are left out of the lines: no better "
    "than guessing, not distinguishable from 100 %, or worse than a cheaper run of the same variant."
)
_UNET = (
    "Fréchet distances at equal size, positions and seed. In the paper the gap is largest at the smallest size: 37.6 "
    "to 18.8, then 21.5 to 18.1 (Table 7)."
)


def format_ratio(ratio: dict[str, Any]) -> str:
    """Return a ratio with its interval, or a dash; far from the points a line says only that a bound is far."""
    if ratio["ratio"] is None:
        return "–"
    if ratio["low"] is None:
        return f"{ratio['ratio']:.3g}"
    low, high = (f"{bound:.3g}" if bound < REACH else f"above {REACH:g}" for bound in (ratio["low"], ratio["high"]))
    return f"{ratio['ratio']:.3g} ({low} to {high})"


def _parity_table(report: dict[str, Any], axis: str) -> Table:
    rows = []
    for measure in MEASURES:
        printed = ""
        if measure.paper is not None:
            printed = f"{paper_results.PRINTED[list(paper_results.MEASURES).index(measure.paper)]:g} ({measure.paper})"
        for variant, ratios in report["parity"][axis][measure.key].items():
            observed, fitted = ratios["observed"], ratios["fitted"]
            paper = printed if variant == FIRST and axis == "flops" else ""
            row = [measure.title, variant, format_ratio(observed), format_ratio(fitted), paper]
            rows.append([*row, observed["is_cheaper"], observed["note"]])
    return Table(["", "variant", "ratio", "to its line", "paper", "below 1", "remarks"], rows)


def _slopes(report: dict[str, Any]) -> Table:
    rows = []
    for measure in MEASURES:
        for variant, fitted in report["lines"][measure.key].items():
            line, left_out = fitted["line"], str(len(fitted["left_out"]))
            if line is None:
                rows.append([measure.title, variant, "–", "", "too few", left_out])
                continue
            interval = "" if line["low"] is None else f"{line['low']:.3f} to {line['high']:.3f}"
            rows.append([measure.title, variant, f"{line['slope']:.3f}", interval, str(line["count"]), left_out])
    return Table(["", "variant", "slope", "95 %", "runs", "left out"], rows)


def _unet_table(report: dict[str, Any]) -> Table:
    rows = [
        [
            f"{pair['size']}, {pair['budget']:,.0f} positions, seed {pair['seed']}",
            f"{pair['frechet_linear']:.2f}",
            f"{pair['frechet_unet']:.2f}",
            "–" if pair["ratio"] is None else f"{pair['ratio']:.2f}",
        ]
        for pair in report["unet_gain"]
    ]
    return Table(["", "linear", "U-Net", "linear over U-Net"], rows)


def _runs_table(report: dict[str, Any]) -> Table:
    head = ["", "6 N D", "positions", "text tokens", "images", "parameters", "seconds"]
    head += [*[measure.title for measure in MEASURES], "machine"]
    rows = []
    for result in sorted(report["results"], key=lambda run: (run["variant"], run["theoretical_flops"])):
        machine = result["machine"]
        where = machine.get("processor", "cpu") if machine["device"] == "cpu" else machine["device"]
        counts = ("positions", "text_targets", "images", "parameters", "seconds")
        values = [f"{result[measure.key]:.4g}" if measure.key in result else "" for measure in MEASURES]
        row = [result["run"], f"{result['theoretical_flops']:.3g}", *[f"{result[name]:,.0f}" for name in counts]]
        rows.append([*row, *values, f"{where}, {machine['threads']} threads, {machine['precision']}"])
    return Table(head, rows)


def summary(report: dict[str, Any]) -> str:
    """Return the parity FLOP ratios as a Markdown table."""
    lines = ["| | variant | parity FLOP ratio | below 1 | |", "| --- | --- | ---: | --- | --- |"]
    for title, variant, ratio, _, _, cheaper, note in _parity_table(report, "flops").rows:
        lines.append(f"| {title} | {variant} | {ratio} | {cheaper} | {note} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> dict[str, Any]:
    """Write report, page and figures of a folder's results."""
    report = write_report(folder, analyse, scaling_page)
    (folder / "figures").mkdir(exist_ok=True)
    for measure in MEASURES:
        if svg := plot(report, measure, standalone=True):
            path = folder / "figures" / f"{measure.key.replace('_', '-')}.svg"
            atomic_write(path, lambda partial, svg=svg: partial.write_text(svg))  # type: ignore[misc]
    return report


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the study; return the exit code and the report."""
    options = read(Scaling, arguments, "study scaling")
    if options.paper:
        print(paper_results.table())
        return 0, paper_results.as_json()

    def plan() -> list[StudyRun]:
        return plan_scaling(options.run, options.variants, options.sizes, options.budgets, options.seeds)

    return run_study(options, plan, {"study": "scaling"}, write, summary)


if __name__ == "__main__":
    run_script(main)
