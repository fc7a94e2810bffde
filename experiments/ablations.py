"""Tables 4 to 8 of the paper at any size: each row is a preset with a few changed settings, at several seeds.

    python -m experiments.ablations --size s --positions 2e6 --seeds 0 1 2     or: transfuse study ablations ...

Each row that draws gets the same number of positions, half of them text, as in the paper: equal positions are equal
steps and equal text, whatever an image is made of. Text alone takes the steps of the row `transfusion`. Differences are
paired by seed and compared with the paper's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from transfuse.cli.options import read
from transfuse.config import nearest
from transfuse.errors import UserError
from transfuse.recipes import Recipe, preset
from transfuse.recipes.paper import UNET_CHANNELS, scaled
from transfuse.report import Bar, Bars, Block, Details, Numbers, Page, Section, Table, Text
from transfuse.runs import resolve
from transfuse.version import __version__

from .common import (
    Shared,
    StudyRun,
    check_grid,
    common_scale,
    difference_cells,
    failures_block,
    plan_run,
    run_script,
    run_study,
    write_report,
)
from .evaluation import by_seed, check_one_size, unequal_text
from .paper_results import ABLATIONS
from .statistics import paired, weighted_sums

FIRST = "transfusion"
"""the row whose steps text alone takes"""


@dataclass(frozen=True)
class Ablations(Shared):
    """Train the rows of the paper's Tables 4 to 8 at several seeds, and compare each difference with the paper's.

    transfuse study ablations --size s --positions 2e6 --seeds 0 1 2

    Any number of processes may run this command on one folder.
    """

    run: Path = Path("runs/ablations")
    """folder of all runs, results and the report"""
    rows: tuple[str, ...] = ()
    """names of rows; those of Tables 4 to 8 if not given (docs/study.md lists them)"""
    size: str = "m"
    """of the transformer: xxs, xs, s, m, l, xl, xxl"""
    positions: float = 2e6
    """D of each row that draws"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """differences are paired by seed; a single one gives no interval"""


@dataclass(frozen=True)
class Row:
    """A preset with changed settings, by dotted names."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, size: str = "m") -> Recipe:
        return changed(scaled(preset(self.preset), size), self.changes)

    def words(self, name: str) -> list[str]:
        """Return the words of the command that trains this row alone, in the run folder `runs/name`."""
        words = ["transfuse", "train", self.preset, *(["--run", f"runs/{name}"] if self.changes else [])]
        for setting, value in self.changes.items():
            option = setting.replace("_", "-")
            if value is False:
                part, _, last = option.rpartition(".")
                words.append(f"--{part}.no-{last}")
            else:
                words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


def changed(recipe: Any, changes: Mapping[str, Any]) -> Any:
    """Return a nested dataclass with changed fields, such as `{"model.patch_size": 4}`. Raises KeyError."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if head not in {item.name for item in fields(recipe)}:
            raise KeyError(name)
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    for head, inner in nested.items():
        assert is_dataclass(getattr(recipe, head))
        own[head] = changed(getattr(recipe, head), inner)
    return replace(recipe, **own)


def _unet(*channels: int) -> dict[str, Any]:
    return {"model.adapter": "unet", "model.unet_channels": channels or UNET_CHANNELS}


_TRANSFUSION, _CHAMELEON = "transfusion-32", "chameleon-32"
_CAUSAL = {"model.image_attention": "causal"}

ROWS: dict[str, Row] = {
    "transfusion": Row(_TRANSFUSION),
    "llama": Row("llama-32"),
    "llama-stable": Row("llama-32-stable"),
    "chameleon": Row(_CHAMELEON),
    "causal": Row(_TRANSFUSION, _CAUSAL),
    "unet": Row(_TRANSFUSION, _unet()),
    "causal-unet": Row(_TRANSFUSION, {**_CAUSAL, **_unet()}),
    "patch1": Row(_TRANSFUSION, {"model.patch_size": 1}),
    "patch4": Row(_TRANSFUSION, {"model.patch_size": 4}),
    "patch8": Row(_TRANSFUSION, {"model.patch_size": 8}),
    "patch4-unet": Row(_TRANSFUSION, {"model.patch_size": 4, **_unet(48, 64, 128)}),
    "patch8-unet": Row(_TRANSFUSION, {"model.patch_size": 8, **_unet(32, 48, 64, 128)}),
    "no-limit-unet": Row(_TRANSFUSION, {"data.pairs.image_first_max_timestep": None, **_unet()}),
}
"""Tables 4 to 8"""

PIECES: dict[str, Row] = {
    "no-qk-norm": Row(_CHAMELEON, {"model.qk_norm": False}),
    "norm-order-pre": Row(_CHAMELEON, {"model.norm_order": "pre"}),
    "z-weight-0": Row(_CHAMELEON, {"objective.z_weight": 0}),
    "dropout-0.1": Row(_CHAMELEON, {"model.dropout": 0.1}),
    "eps-1e-8": Row(_CHAMELEON, {"optimizer.eps": 1e-8}),
}
"""Chameleon's stability measures one by one; the paper has no rows for them, so they have no direction"""

MEASURES: dict[str, tuple[str, str]] = {
    "text": ("text_perplexity", "perplexity of unseen definitions (C4)"),
    "captions": ("caption_cider", "CIDEr-D of captions (CIDEr)"),
    "distance": ("frechet", "Fréchet distance (FID)"),
    "likeness": ("both", "drawn as asked (CLIP)"),
}
"""key of a result, and words with the paper's corresponding measure in brackets"""


@dataclass(frozen=True)
class Comparison:
    """Rows with weights: `{"a": -1, "b": 1}` compares b - a here with b - a in the paper's table."""

    table: str
    asks: str
    weights: Mapping[str, float]

    def expected(self, measure: str) -> float | None:
        """Return the paper's difference; None where it has no such numbers."""
        rows = ABLATIONS.get(self.table, {})
        if not all(measure in rows.get(row, {}) for row in self.weights):
            return None
        return sum(weight * rows[row][measure] for row, weight in self.weights.items())

    @property
    def rounding(self) -> float:
        """The largest difference that printing one decimal can make."""
        return 0.05 * sum(map(abs, self.weights.values()))


def _from(table: str, before: str, after: str, asks: str) -> Comparison:
    return Comparison(table, asks, {before: -1, after: 1})


COMPARISONS: tuple[Comparison, ...] = (
    _from("Table 4", "llama", "transfusion", "what diffusion costs text"),
    _from("Table 4", "llama", "llama-stable", "what Chameleon's stability set costs text"),
    _from("Table 4", "llama-stable", "chameleon", "what learning images as tokens costs text"),
    _from("Table 4", "transfusion", "llama-stable", "the stability set alone against Transfusion"),
    _from("Table 5", "causal", "transfusion", "bidirectional attention within an image, linear"),
    _from("Table 5", "causal-unet", "unet", "bidirectional attention within an image, U-Net"),
    _from("Table 6", "patch1", "transfusion", "patches of 2 x 2 for 1 x 1, linear"),
    _from("Table 6", "transfusion", "patch4", "4 x 4 for 2 x 2, linear"),
    _from("Table 6", "patch4", "patch8", "8 x 8 for 4 x 4, linear"),
    _from("Table 6", "unet", "patch4-unet", "4 x 4 for 2 x 2, U-Net"),
    _from("Table 6", "patch4-unet", "patch8-unet", "8 x 8 for 4 x 4, U-Net"),
    Comparison(
        "Table 6",
        "how much more linear layers change from 2 x 2 to 8 x 8 than U-Net",
        {"transfusion": -1, "patch8": 1, "unet": 1, "patch8-unet": -1},
    ),
    _from("Table 7", "transfusion", "unet", "U-Net for linear patch layers"),
    _from("Table 8", "no-limit-unet", "unet", "a noise cap where the image comes first"),
    *(_from("", "chameleon", name, f"Chameleon with {name}") for name in PIECES),
)


def plan_ablations(
    folder: Path, rows: Sequence[str], size: str, positions: float, seeds: Sequence[int]
) -> list[StudyRun]:
    """Plan rows at one size and budget, at every seed. Raises UserError for unknown names."""
    check_grid(rows=rows, seeds=seeds, positions=(positions,))
    known = ROWS | PIECES
    for row in rows:
        if row not in known:
            raise UserError(f'--rows: unknown name "{row}"{nearest(row, known)}')
    recipes = {row: resolve(known[row].recipe(size), here=False).recipe for row in {*rows, FIRST}}
    runs = []
    for row, seed in product(rows, seeds):
        recipe = replace(recipes[row], seed=seed, preset=f"{row}-{size}")
        budget_model = recipes[FIRST] if recipe.model.images == "none" else recipe
        facts = {"variant": row, "size": size, "budget": positions, "seed": seed}
        runs.append(plan_run(folder, f"{row}-seed{seed}", recipe, positions, budget_model, facts))
    return runs


def analyse(results: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the report, as JSON: every comparison whose rows have results, by measure.

    Raises UserError for results of several sizes or budgets, whose differences are not those of the rows alone.
    """
    check_one_size("ablations", results)
    return {
        "study": "ablations",
        "version": __version__,
        "results": list(results),
        "failures": list(failures),
        "comparisons": list(_compare(results)),
    }


def _compare(results: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for comparison, (measure, (key, _)) in product(COMPARISONS, MEASURES.items()):
        differences = weighted_sums(comparison.weights, by_seed(results, key))
        if not differences:
            continue
        difference, expected = paired(differences), comparison.expected(measure)
        factor = unequal_text([result for result in results if result["variant"] in comparison.weights])
        if measure == "text" and factor:
            significance = f"not comparable: one reads {factor:.2g} times the text"
        elif expected is None:
            significance = "no direction"
        else:
            significance = difference.significance(expected, comparison.rounding)
        yield {
            "table": comparison.table,
            "asks": comparison.asks,
            "weights": dict(comparison.weights),
            "measure": measure,
            "paper": expected,
            **asdict(difference),
            "significance": significance,
        }


_NOTE = (
    "A difference is the mean over seeds of paired differences with its 95 % interval (Student's t). Reproduced: the "
    "interval is on the paper's side of 0; not reproduced: on the other side; undecided: it contains 0, or there is a "
    "single seed; no direction: the paper has no such row, or its difference is within rounding; not comparable: the "
    "rows read unequally much text. The paper has 0.76 billion parameters and other data: only directions compare."
)
_OUTCOMES = ("reproduced", "not reproduced", "undecided", "no direction", "not comparable")


def ablations_page(report: dict[str, Any], folder: Path) -> Page:
    """Return the page: every difference counted, those that are decided as bars, then all by the paper's tables."""
    comparisons, results = report["comparisons"], report["results"]
    counts = Counter(each["significance"].split(":")[0] for each in comparisons)
    numbers = [(name.capitalize(), str(counts[name]), f"of {len(comparisons)} differences") for name in _OUTCOMES]
    decided = [each for each in comparisons if each["significance"] in _OUTCOMES[:2]]
    first: list[Block] = [Numbers(numbers)]
    if decided:
        bars = [_bar(each, comparisons, f"{each['table']}: {each['asks']}; ") for each in decided]
        first.append(Bars(bars, "difference", title="Differences that are decided"))
    sections = []
    for table in dict.fromkeys(each["table"] for each in comparisons):
        rows = [each for each in comparisons if each["table"] == table]
        blocks: list[Block] = []
        for asks in dict.fromkeys(each["asks"] for each in rows):
            bars = [_bar(each, comparisons) for each in rows if each["asks"] == asks]
            blocks.append(Bars(bars, "" if blocks else "difference", title=asks[0].upper() + asks[1:]))
        head = ["", "difference", "95 %", "seeds", "paper", ""]
        blocks.append(Details("The same as a table", [Table(head, [_row(each) for each in rows])]))
        sections.append(Section(table or "Not in the paper", "", blocks))
    head = ["", "6 N D", "positions", "text tokens", "images", "steps", "parameters"]
    runs = []
    for result in sorted(results, key=lambda run: (run["variant"], run["seed"])):
        names = ("positions", "text_targets", "images", "steps", "parameters")
        values = [f"{result[key]:.4g}" if key in result else "" for key, _ in MEASURES.values()]
        counted = [f"{result[name]:,.0f}" for name in names]
        runs.append([result["run"], f"{result['theoretical_flops']:.3g}", *counted, *values])
    every = Details("Every run", [Table([*head, *[words for _, words in MEASURES.values()]], runs)])
    seeds = len({result["seed"] for result in results})
    lead = (
        f"{len(results)} runs of size {results[0]['size']} on {results[0]['budget']:,.0f} positions, {seeds} seeds: do "
        "changes of the model have the effects that the paper found?"
    )
    provenance = [Details("How differences are judged", [Text(_NOTE)]), every, *failures_block(report)]
    return Page("The paper's ablations, small", lead, first, sections, provenance)


def _bar(comparison: dict[str, Any], comparisons: Sequence[dict[str, Any]], prefix: str = "") -> Bar:
    """Return a difference as a bar, on one scale with all differences of its measure."""
    scale = common_scale(each for each in comparisons if each["measure"] == comparison["measure"])
    paper = "" if comparison["paper"] is None else f"paper {comparison['paper']:+.1f}; "
    name, note = prefix + MEASURES[comparison["measure"]][1], paper + comparison["significance"]
    low, high = comparison["low"], comparison["high"]
    return Bar(name, comparison["mean"], low, high, better="", scale=scale, note=note)


def _row(comparison: dict[str, Any]) -> list[str]:
    paper = "" if comparison["paper"] is None else f"{comparison['paper']:+.1f}"
    name = f"{comparison['asks']}: {MEASURES[comparison['measure']][1]}"
    return [name, *difference_cells(comparison), str(comparison["count"]), paper, comparison["significance"]]


def summary(report: dict[str, Any]) -> str:
    """Return every comparison as a row of a Markdown table."""
    lines = ["| table | | difference | 95 % | paper | |", "| --- | --- | ---: | --- | ---: | --- |"]
    for each in report["comparisons"]:
        name, mean, interval, _, paper, significance = _row(each)
        lines.append(f"| {each['table']} | {name} | {mean} | {interval} | {paper} | {significance} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the study; return the exit code and the report."""
    options = read(Ablations, arguments, "study ablations")

    def plan() -> list[StudyRun]:
        return plan_ablations(options.run, options.rows or tuple(ROWS), options.size, options.positions, options.seeds)

    settings = {"study": "ablations", "size": options.size, "positions": options.positions}
    return run_study(options, plan, settings, lambda folder: write_report(folder, analyse, ablations_page), summary)


if __name__ == "__main__":
    run_script(main)
