"""`transfuse evaluate`: an exported model measured by any of the measures, with a page that shows what they saw.

out/generated/          what the model made, and everything it depends on; nothing is made twice
out/*.safetensors       judges
out/results.json        every number, and what it takes to get it again
out/report.html         the same to look at, with the pictures and words behind it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emoji_scenes import WorldConfig

from ..config import from_dict
from ..devices import Device, pick_device
from ..errors import UserError
from ..evaluation import Drawing, EvalConfig, EvalContext, MetricResult, check_paper, evaluate, model_hash, named
from ..export import describe
from ..inference import TransfusionPipeline
from ..io import atomic_write
from ..log import logger
from ..presets import preset
from ..version import __version__
from .evaluation_page import evaluation_page, said_drawing


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
    """Measure an export and write numbers and page. world: a preset whose scenes are shown; None: the model's own.

    Raises UserError before any work for what is missing, in the model, the files or the names.
    """
    measures = named(suite)
    try:
        drawings = Drawing.sweep(sweep, drawing) if sweep else []
    except ValueError as error:
        raise UserError(f"--sweep: {error}") from None
    if "paper" in suite:
        check_paper(options)
    bench = open_bench(model, out, options, world, device)
    bench = replace(bench, drawing=drawing, batch=batch)
    found: list[MetricResult] = []
    for findings in evaluate(bench, measures, drawings):
        found.append(findings)
        for result in findings:
            drawn = f" ({said_drawing(result.drawing)})" if result.drawing else ""
            logger.info(f"{findings.measure}: {result.name}{drawn}: {result.value:.4g}")
    report = {
        "version": __version__,
        "model": str(model),
        "model_hash": bench.model,
        "suite": list(suite),
        "results": [result.to_json() for findings in found for result in findings],
        "tables": {findings.measure: findings.tables for findings in found if findings.tables},
    }
    out.mkdir(parents=True, exist_ok=True)
    text, page = json.dumps(report, indent=2) + "\n", evaluation_page(report, measures, found)
    atomic_write(out / "results.json", lambda path: path.write_text(text))
    atomic_write(out / "report.html", lambda path: path.write_text(page))
    logger.info(f"{out / 'report.html'}: open it in a browser")
    return report


def open_bench(
    model: Path, folder: Path, options: EvalConfig, world: str | None = None, device: Device = "cpu"
) -> EvalContext:
    """An export to be measured in a folder; world as `run_evaluation` has it."""
    pipe = TransfusionPipeline.from_pretrained(model, device=pick_device(device))
    scenes = replace(world_of(model, world, pipe.exported.image_size), split="train")
    return EvalContext(pipe, model_hash(model), folder, scenes, options)


def world_of(model: Path, named_preset: str | None, size: int) -> WorldConfig:
    """The scenes of a preset; of what an export says it learned from; or all of the bundled world, at the model's size.

    Raises UserError for settings of a world that there are not.
    """
    if named_preset is not None:
        return replace(preset(named_preset).data.world, size=size)
    found = describe(model)
    if found.world is None:
        logger.info(
            f"{model}: does not say what scenes it knows: asked about all of the bundled world; --world asks otherwise"
        )
        return WorldConfig(size=size)
    return replace(from_dict(WorldConfig, found.world, str(found.place["config.json"])), size=size)
