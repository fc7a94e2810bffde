"""`transfuse evaluate`: measure an exported model and write the numbers and a page that shows examples.

out/generated/          what the model generated, keyed by everything it depends on; nothing is generated twice
out/*.safetensors       the judges' weights
out/results.json        every number, and what is needed to reproduce it
out/report.html         the same to look at, with the images and texts
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

from .charts import ACCENT, line_chart
from .config import from_dict
from .data import DataSet
from .data.bundled import SceneScorer, WorldConfig
from .devices import Device, pick_device
from .errors import UserError, check_kinds, shown
from .evaluation import (
    Drawing,
    EvalConfig,
    EvalContext,
    Metric,
    MetricResult,
    Result,
    check_paper,
    evaluate,
    model_hash,
    named,
)
from .evaluation.image_quality import CLASSIFIER, MOBILENET
from .export import describe
from .inference import TransfusionPipeline
from .io import atomic_json
from .log import logger
from .recipes import preset
from .report import Bar, Bars, Block, Card, Cards, Charts, Details, Page, Section, Table, Text, plain, write_page
from .version import __version__

PAGE_ORDER = ("drawing", "composition", "captioning", "clip", "geneval", "editing", "autoencoder", "text", "choice")
"""The metrics of a page, images first, whatever the order in which they were asked for; others follow."""
KINDS: dict[str, tuple[Any, str]] = {
    "model": (str | Path, "a folder, or a model's name"),
    "out": (str | Path, "a folder"),
    "data": (str | Path, "a data set"),
    "count": (Integral, "a whole number as count"),
    "seed": (Integral, "a whole number as seed"),
}
"""arguments of `evaluate_model`, with the types they take and these in words"""


def run_evaluation(
    model: Path,
    suite: Sequence[str],
    out: Path,
    options: EvalConfig,
    drawing: Drawing,
    sweep: str | None = None,
    world: str | None = None,
    batch: int = 24,
    device: Device = "auto",
) -> dict[str, Any]:
    """Measure an export, write numbers and page, and return the content of `results.json`.

    world   a preset whose scenes are shown; None: the model's own

    Raises UserError, before any work, for something missing in the model, the files or the names.
    """
    if options.data:
        suite = suite or (("text",) if DataSet(options.data).manifest.kind == "text" else ("pairs",))
        if options.features == CLASSIFIER:  # it knows the bundled scenes alone
            options = replace(options, features=MOBILENET)
    suite = suite or ("quick",)
    metrics = named(suite)
    try:
        drawings = Drawing.sweep(sweep, drawing) if sweep else []
    except ValueError as error:
        raise UserError(f"--sweep: {error}") from None
    if "paper" in suite:
        check_paper(options)
    context = replace(open_context(model, out, options, world, device), drawing=drawing, batch=batch)
    measured: list[MetricResult] = []
    for outcome in evaluate(context, metrics, drawings):
        measured.append(outcome)
        for result in outcome:
            how = f" ({describe_drawing(result.drawing)})" if result.drawing else ""
            logger.info(f"{outcome.measure}: {result.name}{how}: {result.value:.4g}")
    report = {
        "version": __version__,
        "model": str(model),
        "model_hash": context.model,
        "suite": list(suite),
        "results": [result.to_json() for outcome in measured for result in outcome],
        "tables": {outcome.measure: outcome.tables for outcome in measured if outcome.tables},
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_json(out / "results.json", report)
    write_page(out / "report.html", evaluation_page(report, metrics, measured))
    logger.info(f"{out / 'report.html'}: open it in a browser")
    return report


def open_context(
    model: Path, folder: Path, options: EvalConfig, world: str | None = None, device: Device = "cpu"
) -> EvalContext:
    """Open an export for measuring in a folder; `world` as in `run_evaluation`."""
    pipe = TransfusionPipeline.from_pretrained(model, device=pick_device(device))
    scorer = None
    if not options.data:
        scorer = SceneScorer(replace(world_of(model, world, pipe.exported.image_size), split="train"))
    return EvalContext(pipe, model_hash(model), folder, scorer, options)


def world_of(model: Path, preset_name: str | None, size: int) -> WorldConfig:
    """Return the scenes of a preset, or those an export records, or all bundled scenes, at the model's size.

    Raises UserError for recorded settings that the bundled scenes do not have.
    """
    if preset_name is not None:
        return replace(preset(preset_name).data.world, size=size)
    export = describe(model)
    if export.world is None:
        logger.info(f"{model}: records no training scenes; using all bundled ones (--world PRESET names others)")
        return WorldConfig(size=size)
    return replace(from_dict(WorldConfig, export.world, str(export.place["config.json"])), size=size)


# --- the page ---------------------------------------------------------------------------------------------------------


def evaluation_page(report: dict[str, Any], metrics: Sequence[Metric], measured: Sequence[MetricResult]) -> Page:
    """Return the page: a bar per metric, then examples, then every number; folded, how each was made."""
    model = Path(report["model"])
    name = model.parent.name if model.name == "export" else model.name
    headlines: list[Bar] = []
    sections: list[Section] = []
    numbers: list[Block] = []
    origins: list[list[str]] = []
    for metric in sorted(metrics, key=lambda metric: [*PAGE_ORDER, metric.name].index(metric.name)):
        outcomes = [outcome for outcome in measured if outcome.measure == metric.name]
        results = [result for outcome in outcomes for result in outcome]
        for r in results[:1]:
            title = f"{metric.name}: {r.name}"
            headlines.append(Bar(title, r.value, r.low, r.high, r.floor, r.ceiling, r.better))
        examples: list[Block] = []
        for outcome in outcomes:
            heading = f"{describe_drawing(outcome.drawing)}. " if len(outcomes) > 1 else ""
            groups: dict[str, list[Card]] = {}
            for example in outcome.examples:
                card = Card(example.text, example.pictures, example.marks)
                groups.setdefault(heading + example.group, []).append(card)
            examples += [Cards(cards, title) for title, cards in groups.items()]
        if examples:
            about = f"{metric.about[0].upper()}{metric.about[1:]}."
            sections.append(Section(metric.name.capitalize(), about, examples))
        if results:
            numbers += [_numbers(metric, results), *([Text(metric.compared)] if metric.compared else [])]
            numbers += _sweep(results)
        for outcome in outcomes:
            for title, table in outcome.tables.items():
                head, *rows = [[str(cell) for cell in row] for row in table]
                numbers.append(Details(title, [Table(head, rows)]))
        origins += [
            [f"{metric.name}: {result.name}", result.implementation, describe_drawing(result.drawing), result.data]
            for result in results
        ]
    provenance = Details("Code, settings and data of each number", [Table(["", "code", "drawing", "data"], origins)])
    facts = [["model", str(model)], ["hash of its files", report["model_hash"]], ["version", report["version"]]]
    return Page(
        name,
        "What the model can do: the first number of each measure. Intervals are 95\u202f% over items; chance and "
        "reference are other answers scored the same way.",
        [Bars(headlines)],
        [*sections, Section("Every number", "", numbers)],
        [provenance, Details("The model", [Table([], facts)])],
        f"Made by Transfuse {report['version']}. Every number is in results.json with all that it depends on.",
    )


def _numbers(metric: Metric, results: Sequence[Result]) -> Table:
    """Return the table of a metric's numbers."""
    rows, names = [], [result.name for result in results]
    for result in results:
        interval = "" if result.low is None or result.high is None else f"{plain(result.low)} to {plain(result.high)}"
        bounds = ["" if bound is None else plain(bound) for bound in (result.floor, result.ceiling)]
        arrow = "↑" if result.better == "higher" else "↓"
        swept = f" ({describe_drawing(result.drawing)})" if names.count(result.name) > 1 else ""
        rows.append([result.name + swept, f"{plain(result.value)} {arrow}", interval, *bounds, f"{result.count:,}"])
    head = [metric.name, "value", "95 %", "chance", "reference", "items"]
    used = [at for at in range(len(head)) if any(row[at] for row in rows)]  # a phone has no room for empty columns
    return Table([head[at] for at in used], [[row[at] for at in used] for row in rows])


def _sweep(results: Sequence[Result]) -> list[Block]:
    """Return a chart of each number over the guidance scale, if more than one scale was tried."""
    charts = []
    for name in dict.fromkeys(result.name for result in results):
        points = sorted(
            (result.drawing.guidance_scale, result.value)
            for result in results
            if result.name == name and result.drawing is not None and result.drawing.guidance_scale is not None
        )
        if len({x for x, _ in points}) > 1:
            charts.append((f"{name} by guidance scale", line_chart([(name, points, ACCENT)], "guidance scale")))
    return [Charts(charts)] if charts else []


def describe_drawing(drawing: Drawing | None) -> str:
    """Return how images were generated, in words; "" where none were."""
    if drawing is None:
        return ""
    by = "code by code" if drawing.sampler is None else f"{drawing.sampler}, {drawing.steps} steps"
    interval = drawing.guidance_interval
    where = f" at {interval[0]:g} to {interval[1]:g} of the noise" if interval else ""
    best = f", the best of {drawing.candidates} by the model's own score" if drawing.candidates > 1 else ""
    return f"{by}, guidance {drawing.guidance_scale:g}{where}, seed {drawing.seed}{best}"


def evaluate_model(
    model: Path | str,
    suite: Sequence[str] = (),
    out: Path | str = "evaluation",
    count: int = 240,
    *,
    data: Path | str = "",
    seed: int = 0,
    device: Device = "auto",
) -> dict[str, Any]:
    """Measure an export by a suite's metrics, write page and numbers to `out`, and return these: `transfuse.evaluate`.

    suite    names of metrics or suites; none: "quick", and with `data` what fits the set
    count    images, captions and edits of each metric
    data     a data set, whose held-out images and captions (or texts) are used in place of the bundled world
    seed     of the drawings
    device   "auto", "cpu", "cuda" or "mps"

    Raises UserError as `run_evaluation`, which has every option.
    """
    if isinstance(suite, str) or not isinstance(suite, Sequence) or not all(isinstance(name, str) for name in suite):
        raise UserError(f"evaluate: expected a list of names, found {shown(suite)}")
    check_kinds(locals(), KINDS)
    options = EvalConfig(count=int(count), data=str(data))
    return run_evaluation(Path(model), suite, Path(out), options, Drawing(seed=int(seed)), device=device)


class _CallableModule(ModuleType):
    """A module that is called as `evaluate_model`: the package has the module and the function under one name."""

    __call__ = staticmethod(evaluate_model)
    __signature__ = inspect.signature(evaluate_model)


__doc__ = f"{evaluate_model.__doc__}\n{__doc__}"  # of `help(transfuse.evaluate)`
sys.modules[__name__].__class__ = _CallableModule
