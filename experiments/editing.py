"""Section 4.4 at any size: fine-tune a trained model on 8,000 edits and measure what it obeys before and after.

    python -m experiments.editing --start small-64        or: transfuse study editing --start small-64

    STUDY/study.json               the starting model, by its hash, and the settings of tuning
    STUDY/tuning/                  the training run, with its export
    STUDY/before                   what both models drew, and the judges
    STUDY/report.json, report.html, pictures/

The paper fine-tunes on 8,000 public triples of image, instruction and image, shows a few results and gives no number
and no setting. Here the triples are of emoji scenes, where every edit has one right image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.cli.options import read
from transfuse.cli.writing import default_model
from transfuse.config import read_json
from transfuse.errors import UserError
from transfuse.evaluate import open_context
from transfuse.evaluation import EvalConfig, MetricResult, evaluate, named
from transfuse.evaluation.confidence import CORRECTED
from transfuse.folders import DEFAULT
from transfuse.images import read_image
from transfuse.log import logger
from transfuse.recipes import Recipe, preset
from transfuse.report import Bar, Bars, Card, Cards, Page, Section, Table, write_page
from transfuse.train import train
from transfuse.training import RESUMABLE
from transfuse.version import __version__

from .common import pin, run_script, write_json

SHOWN = 24
"""edits whose images are kept"""
VIEWS = ("source", "before", "after", "exact")


@dataclass(frozen=True)
class Editing:
    """Fine-tune a trained model on 8,000 edits, and measure what it obeys before and after (section 4.4).

    transfuse study editing --start small-64
    """

    run: Path = Path("runs/editing")
    """folder of the training run, the drawings and the report"""
    start: Path | None = None
    """export, or a bundled model's name; by default the newest under runs/ that draws, or the bundled one"""
    triples: int = 8000
    """different edits"""
    epochs: float = 4.0
    """passes over them"""
    batch: int = 32
    """edits per step"""
    rate: float = 5e-4
    """largest learning rate; it decays to a hundredth"""
    seed: int = 0
    world: str | None = None
    """preset whose scenes are edited; by default those that the export records"""
    count: int = 240
    """edits that are measured"""
    measures: tuple[str, ...] = ()
    """further measures of `transfuse evaluate`, before and after: what is forgotten"""
    judge_steps: int | None = None
    """training steps of the judges of drawings"""
    report_only: bool = False
    """only write the page of the report in the folder"""
    json: bool = False
    """end with one line of JSON"""

    def __post_init__(self) -> None:
        for name in ("triples", "epochs", "batch", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name}: expected a number above 0, found {getattr(self, name):g}")

    @property
    def steps(self) -> int:
        return math.ceil(self.triples * self.epochs / self.batch)


def tuning_recipe(start: Path, options: Editing, world: WorldConfig) -> Recipe:
    """Return the default preset, started from an export and trained on edits alone."""
    base, steps = preset(DEFAULT), options.steps
    return replace(
        base,
        preset="image-editing",
        seed=options.seed,
        start=str(start),
        data=replace(
            base.data,
            sources=("edits",),
            text_share=0.0,
            batch_size=options.batch,
            accumulate=1,
            row_length=None,
            autoencoder_weights="",
            source_fingerprints=(),
            world=world,
            edits=replace(base.data.edits, count=options.triples),
        ),
        optimizer=replace(
            base.optimizer,
            learning_rate=options.rate,
            final_learning_rate=options.rate / 100,
            warmup=min(base.optimizer.warmup, steps // 10),
        ),
        loop=replace(base.loop, steps=steps, max_seconds=None, sample_every=0, measure_every=0, best=""),
    )


def run_editing(options: Editing, start: Path) -> tuple[int, dict[str, Any]]:
    """Measure, fine-tune and measure again; return the exit code (75: stopped and saved) and the report.

    Nothing is done twice. Raises UserError for a model that does not draw, or a folder with another start or settings.
    """
    folder, config = options.run, EvalConfig(count=options.count, judge_steps=options.judge_steps)
    metrics = named(("editing", *options.measures), "--measures")
    before = open_context(start, folder / "before", config, options.world)
    assert isinstance(before.scorer, SceneScorer)
    recipe = tuning_recipe(start, options, before.scorer.world)
    settings = {name: getattr(options, name) for name in ("world", "triples", "epochs", "batch", "rate", "seed")}
    pin(folder / "study.json", {"study": "image-editing", "start": before.model, **settings})
    results = {"before": list(evaluate(before, metrics))}
    tuned = folder / "tuning" / "export"
    if not (tuned / "config.json").is_file() and train(recipe, folder / "tuning").export is None:
        return RESUMABLE, {}
    # Both models are measured in one folder, with the same judges.
    after = replace(open_context(tuned, folder / "before", config, options.world), scorer=before.scorer)
    results["after"] = list(evaluate(after, metrics))
    tuning = {name: value for name, value in settings.items() if name != "world"}
    report: dict[str, Any] = {
        "study": "image-editing",
        "version": __version__,
        "start": start.name,
        "models": {"before": before.model, "after": after.model},
        "tuning": {**tuning, "steps": options.steps},
        "results": [
            {"when": when, **result.to_json()}
            for when, measured in results.items()
            for each in measured
            for result in each
        ],
        "edits": _keep_images(folder / "pictures", results["before"][0], results["after"][0]),
    }
    write_json(folder / "report.json", report)
    return 0, write(folder)


def write(folder: Path) -> dict[str, Any]:
    """Write the page of `report.json` and the images next to it; return the report. Raises UserError without one."""
    report: dict[str, Any] = read_json(folder / "report.json")
    write_page(folder / "report.html", editing_page(report, folder))
    logger.info(f"{folder / 'report.html'}: open it in a browser")
    return report


def _keep_images(folder: Path, before: MetricResult, after: MetricResult) -> list[dict[str, Any]]:
    """Write PNGs of the first edits: source, drawn before and after, exact; return the instructions and marks."""
    folder.mkdir(parents=True, exist_ok=True)
    edits = []
    for number, (first, second) in enumerate(zip(before.examples[:SHOWN], after.examples, strict=False)):
        views = [first.pictures[0][0], first.pictures[1][0], second.pictures[1][0], first.pictures[2][0]]
        for view, pixels in zip(VIEWS, views, strict=True):
            PIL.Image.fromarray(pixels).save(folder / f"{number:02d}-{view}.png")
        marks = [{name: right for name, right, _ in example.marks} for example in (first, second)]
        edits.append({"instruction": first.text, "before": marks[0], "after": marks[1]})
    return edits


# --- the page ---------------------------------------------------------------------------------------------------------


def editing_page(report: dict[str, Any], folder: Path) -> Page:
    """Return the page: what is obeyed before and after, then edits, then all numbers."""
    tuning, bars = report["tuning"], []
    scores = [pair for pair in _pairs(report) if pair[0]["measure"] == "editing" and CORRECTED not in pair[0]["name"]]
    for pair in scores:
        for when, result in zip(("before", "after"), pair, strict=True):
            name = f"{result['name']}, {when}"
            bounds = (result["low"], result["high"], result["floor"], result["ceiling"])
            bars.append(Bar(name, result["value"], *bounds, result.get("better", "higher")))
    cards = []
    for number, edit in enumerate(report["edits"]):
        paths = [folder / "pictures" / f"{number:02d}-{view}.png" for view in VIEWS]
        if all(path.is_file() for path in paths):
            images = [(read_image(path), view) for path, view in zip(paths, VIEWS, strict=True)]
            marks = [(f"obeyed {when}", edit[when]["instruction obeyed"], "") for when in ("before", "after")]
            cards.append(Card(edit["instruction"], images, marks))
    examples = [Section("Edits", f"The first {len(cards)} in order.", [Cards(cards)])] if cards else []
    numbers = Table(["", "before", "after", "chance", "reference", "items"], rows_of(report))
    return Page(
        f"{report['start']}: editing by instruction",
        f"Before and after fine-tuning on {tuning['triples']:,} edits of emoji scenes ({tuning['steps']:,} steps of "
        f"{tuning['batch']}). Chance is the unchanged image.",
        [Bars(bars, "the model", "the exact image")],
        [*examples, Section("All numbers", "In brackets 95 % intervals over items.", [numbers])],
    )


def _pairs(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the results of each number before and after."""
    results = {when: [each for each in report["results"] if each["when"] == when] for when in ("before", "after")}
    after = {(each["measure"], each["name"]): each for each in results["after"]}
    return [(each, after[each["measure"], each["name"]]) for each in results["before"]]


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    """Return for each number its name, before, after, chance, reference and items."""
    rows = []
    for before, after in _pairs(report):
        values = []
        for result in (before, after):
            interval = "" if result["low"] is None else f" ({result['low']:.3g} to {result['high']:.3g})"
            values.append(f"{result['value']:.3g}{interval}")
        bounds = ["" if before[bound] is None else f"{before[bound]:.3g}" for bound in ("floor", "ceiling")]
        rows.append([f"{before['measure']}: {before['name']}", *values, *bounds, f"{before['count']:,}"])
    return rows


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the study; return the exit code and the report."""
    options = read(Editing, arguments, "study editing")
    if options.report_only:
        code, report = 0, write(options.run)
    else:
        code, report = run_editing(options, options.start or default_model())
    if report:
        lines = [f"| {name} | {before} | {after} |" for name, before, after, *_ in rows_of(report)]
        print("\n".join(["| | before | after |", "| --- | ---: | ---: |", *lines]))
    return code, report


if __name__ == "__main__":
    run_script(main)
