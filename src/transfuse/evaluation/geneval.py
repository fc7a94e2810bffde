"""The original GenEval (Ghosh et al. 2023): its prompts drawn into its own folder layout, for its own scorer.

    geneval/guidance-G-seed-S/00000/metadata.jsonl             the line of evaluation_metadata.jsonl
    geneval/guidance-G-seed-S/00000/samples/0000.png .. 0003.png

    python evaluation/evaluate_images.py geneval/guidance-G-seed-S --outfile results.jsonl --model-path <Mask2Former>
    python evaluation/summary_scores.py results.jsonl

Both scripts are GenEval's (https://github.com/djghosh13/geneval), which wants CUDA and packages of 2022, and so a
separate environment. It gives the number; this gives none.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from ..errors import UserError
from ..log import logger
from .context import EvalContext, Example, Metric, MetricResult, first_of
from .generate import short_hash
from .image_quality import draw_prompts

SAMPLES = 4
SHOWN = 12
WHERE = "https://github.com/djghosh13/geneval (prompts/evaluation_metadata.jsonl)"


def _prompts(context: EvalContext) -> list[dict[str, Any]]:
    """The lines of the file. Raises UserError where it is missing, or has none with a prompt."""
    path = context.options.geneval
    if path is None or not path.is_file():
        given = "none" if path is None else f"no {path}"
        raise UserError(f"--geneval: expected evaluation_metadata.jsonl, found {given}; from {WHERE}")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        if lines and all(isinstance(line["prompt"], str) for line in lines):
            return lines
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: expected JSON lines with a "prompt", found something else ({error})') from None
    raise UserError(f'{path}: expected JSON lines with a "prompt", found none')


def _score(context: EvalContext) -> MetricResult:
    lines = _prompts(context)
    prompts = [line["prompt"] for line in lines for _ in range(SAMPLES)]
    ids = [f"{n:05d}/{k:04d}" for n in range(len(lines)) for k in range(SAMPLES)]
    drawn = draw_prompts(context, "geneval", f"geneval {short_hash(lines)}", ids, prompts)
    drawing, made = context.drawing, drawn.folder.name.rpartition("-")[2]  # other models have other folders
    folder = context.folder / "geneval" / f"guidance-{drawing.guidance_scale:g}-seed-{drawing.seed}-{made}"
    try:
        for number, line in enumerate(lines):
            place = folder / f"{number:05d}"
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(line) + "\n")
            for sample in range(SAMPLES):
                shutil.copyfile(drawn.path(number * SAMPLES + sample), place / "samples" / f"{sample:04d}.png")
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    logger.info(f"geneval: {len(prompts)} pictures in {folder}; score them with GenEval's evaluate_images.py")
    first = range(0, min(SHOWN, len(lines)) * SAMPLES, SAMPLES)
    title = first_of(len(lines), SHOWN, "prompts") + ", the first drawing of each"
    return MetricResult([], [Example(prompts[n], [(drawn.image(n), "drawn")], group=title) for n in first])


ABOUT = "prompts of the original GenEval, drawn for its own scorer"
GENEVAL = Metric("geneval", ABOUT, _prompts, _score, lambda context: (), True)
