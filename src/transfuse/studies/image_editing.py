"""Section 4.4 at a size anyone can run: a trained model is fine-tuned on 8,000 edits; what it obeys, before and after.

    STUDY/study.json               the start, by its hash, and the settings of tuning, to which the folder keeps
    STUDY/tuning/                  the run, with its export
    STUDY/before, STUDY/after      what was drawn (`evaluation/`), and the judges
    STUDY/report.json, report.html, pictures/

The paper fine-tunes on 8,000 public triples of picture, instruction and picture, shows a few and gives no number and
no setting. Here the triples are of the bundled world, where every edit has one right picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import PIL.Image

from emoji_scenes import WorldConfig

from ..config import read_json
from ..errors import UserError
from ..evaluate import open_bench
from ..evaluation import EvalConfig, Example, MetricResult, evaluate, named
from ..folders import DEFAULT
from ..images import read_image
from ..io import atomic_write
from ..log import logger
from ..presets import Recipe, preset
from ..training import RESUMABLE
from ..version import __version__
from .arms import pin
from .page import columns, grid, image, made_of_report, page, section
from .training import train_run

SHOWN = 24
"""edits of which pictures are kept"""
VIEWS = ("source", "before", "after", "exact")


@dataclass(frozen=True)
class Tuning:
    """triples: different edits, seen `epochs` times each; rate: the largest learning rate, to a hundredth of it."""

    triples: int = 8000
    epochs: float = 4.0
    batch: int = 32
    rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("triples", "epochs", "batch", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name}: expected a number above 0, found {getattr(self, name):g}")

    @property
    def steps(self) -> int:
        return math.ceil(self.triples * self.epochs / self.batch)


def tuning_recipe(start: Path, tuning: Tuning, world: WorldConfig) -> Recipe:
    """The preset that learns edits, of edits of a world's scenes alone."""
    base = preset(DEFAULT)
    steps = tuning.steps
    return replace(
        base,
        preset="image-editing",
        seed=tuning.seed,
        start=str(start),
        data=replace(
            base.data,
            sources=("edits",),
            text_share=0.0,
            batch_size=tuning.batch,
            accumulate=1,
            row_length=None,
            autoencoder_weights="",
            source_fingerprints=(),
            world=world,
            edits=replace(base.data.edits, count=tuning.triples),
        ),
        optimizer=replace(
            base.optimizer,
            learning_rate=tuning.rate,
            final_learning_rate=tuning.rate / 100,
            warmup=min(base.optimizer.warmup, steps // 10),
        ),
        loop=replace(base.loop, steps=steps, max_seconds=None, sample_every=0, measure_every=0, best=""),
    )


def run_image_editing(
    folder: Path, start: Path, tuning: Tuning, options: EvalConfig, measures: Sequence[str], world: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Measure, fine-tune, measure again. Gives the exit code (75: stopped and saved) and the report.

    What is done is not done again. Raises UserError for what is no model, or none that draws; and for a folder in which
    another start was tuned, or otherwise.
    """
    chosen = named(("editing", *measures), "--measures")
    bench = open_bench(start, folder / "before", options, world)
    recipe = tuning_recipe(start, tuning, bench.world)
    pin(folder / "study.json", {"study": "image-editing", "start": bench.model, "world": world, **vars(tuning)})
    found = {"before": list(evaluate(bench, chosen))}
    tuned = folder / "tuning" / "export"
    if not (tuned / "config.json").is_file() and train_run(recipe, folder / "tuning").export is None:
        return RESUMABLE, {}
    # The judges of both are the same files.
    after = replace(open_bench(tuned, folder / "before", options, world), world=bench.world)
    found["after"] = list(evaluate(after, chosen))
    report: dict[str, Any] = {
        "study": "image-editing",
        "version": __version__,
        "start": start.name,
        "models": {"before": bench.model, "after": after.model},
        "tuning": {**vars(tuning), "steps": tuning.steps},
        "results": [
            {"when": when, **result.to_json()} for when, some in found.items() for one in some for result in one
        ],
        "edits": _keep_pictures(folder / "pictures", found["before"][0], found["after"][0]),
    }
    atomic_write(folder / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    return 0, show_image_editing(folder)


def show_image_editing(folder: Path) -> dict[str, Any]:
    """Make the page of `report.json` and the pictures beside it; gives the report. Raises UserError without one."""
    report: dict[str, Any] = read_json(folder / "report.json")
    atomic_write(folder / "report.html", lambda path: path.write_text(image_editing_page(report, folder)))
    logger.info(f"{folder / 'report.html'}: open it in a browser")
    return report


def _keep_pictures(folder: Path, before: MetricResult, after: MetricResult) -> list[dict[str, Any]]:
    """PNGs of the first edits: source, drawn before and after, exact. Gives what the page says of each."""
    folder.mkdir(parents=True, exist_ok=True)
    edits = []
    for number, (first, second) in enumerate(zip(before.exhibits[:SHOWN], after.exhibits, strict=False)):
        pixels = [first.pictures[0][0], first.pictures[1][0], second.pictures[1][0], first.pictures[2][0]]
        for view, some in zip(VIEWS, pixels, strict=True):
            PIL.Image.fromarray(some).save(folder / f"{number:02d}-{view}.png")
        edits.append({"instruction": first.text, "before": _marks(first), "after": _marks(second)})
    return edits


def _marks(exhibit: Example) -> dict[str, bool]:
    return {asked: right for asked, right, _ in exhibit.marks}


def summary(report: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    lines = ["| | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {before} | {after} |" for name, before, after, *_ in _pairs(report["results"])]
    return "\n".join(lines) + "\n"


# --- the page ---------------------------------------------------------------------------------------------------------


def image_editing_page(report: dict[str, Any], folder: Path) -> str:
    """The whole document."""
    tuning = report["tuning"]
    lead = (
        f"A trained model, fine-tuned on {tuning['triples']:,} edits of the bundled world ({tuning['steps']:,} steps "
        f"of {tuning['batch']}), asked the same before and after."
    )
    return page(
        "Editing by instruction, before and after fine-tuning",
        lead,
        [
            section("Numbers", _NUMBERS, _numbers(report["results"])),
            section("Edits", _EDITS.format(count=len(report["edits"])), _edits(report, folder)),
        ],
        made_of_report(report["version"], "image-editing"),
    )


_NUMBERS = (
    "In brackets 95 % intervals over items. Chance and reference are other answers, scored by the same measure: of "
    "edits the unchanged picture, and the exact one. The paper gives no number to compare with."
)
_EDITS = "The first {count} in order: picture, before, after, exact."


def _numbers(results: Sequence[dict[str, Any]]) -> str:
    return columns(["", "before", "after", "chance", "reference", "items"], _pairs(results))


def _pairs(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return of each number its name, before, after, chance, reference, items."""
    rows = []
    after = {(one["measure"], one["name"]): one for one in results if one["when"] == "after"}
    for one in (one for one in results if one["when"] == "before"):
        other = after[one["measure"], one["name"]]
        bounds = ["" if one[bound] is None else f"{one[bound]:.3g}" for bound in ("floor", "ceiling")]
        rows.append([f"{one['measure']}: {one['name']}", _said(one), _said(other), *bounds, f"{one['count']:,}"])
    return rows


def _said(result: dict[str, Any]) -> str:
    interval = "" if result["low"] is None else f" ({result['low']:.3g} to {result['high']:.3g})"
    return f"{result['value']:.3g}{interval}"


def _edits(report: dict[str, Any], folder: Path) -> str:
    items = []
    for number, edit in enumerate(report["edits"]):
        paths = {view: folder / "pictures" / f"{number:02d}-{view}.png" for view in VIEWS}
        if not all(path.is_file() for path in paths.values()):
            continue
        figures = "".join(
            f"<figure>{image(read_image(path), view)}<figcaption>{view}{_sign(edit, view)}</figcaption></figure>"
            for view, path in paths.items()
        )
        items.append(f'<div class="card"><p>{escape(edit["instruction"])}</p><div class="strip">{figures}</div></div>')
    return grid("wide", items) if items else '<p class="note">No pictures lie beside the report.</p>'


def _sign(edit: dict[str, Any], view: str) -> str:
    """Whether the instruction was obeyed, to see and to hear."""
    if view not in edit:
        return ""
    right = edit[view]["instruction obeyed"]
    said = "obeyed" if right else "not obeyed"
    return f' <span class="{"yes" if right else "no"}"><span class="heard">{said}</span></span>'
