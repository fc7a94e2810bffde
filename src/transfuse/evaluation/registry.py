"""Every measure by name, the suites, and the one function that runs them: from the command line, or while training.

results = evaluate(bench, suite("quick"))       # all checks first, then the work; what is done is not done again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..config import nearest
from ..errors import UserError
from .bench import EvalConfig, EvalContext, Metric
from .captions import CAPTIONING
from .clip import CLIP
from .clip import WHERE as CLIP_WEIGHTS
from .composition import COMPOSITION
from .distances import MOBILENET, RECOGNISER
from .drawing import DRAWING
from .edits import EDITING
from .geneval import GENEVAL
from .geneval import WHERE as GENEVAL_PROMPTS
from .harness import HARNESS
from .inception import FILE, URL
from .multiple_choice import CHOICE
from .pairs import WHERE as COCO
from .reconstructions import AUTOENCODER
from .result import Drawing, MetricResult
from .speed import SPEED
from .text import TEXT

METRICS: dict[str, Metric] = {
    measure.name: measure
    for measure in (TEXT, CHOICE, HARNESS, CAPTIONING, DRAWING, CLIP, COMPOSITION, GENEVAL, EDITING, AUTOENCODER, SPEED)
}
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("text", "choice", "captioning", "drawing", "composition", "speed"),
    "paper": ("text", "harness", "captioning", "drawing", "clip", "geneval"),
}
"""quick: what needs nothing but the package. paper: Transfusion's own measures, on files that the user has"""
TEXT_ONLY = ("text", "choice", "harness", "speed")
"""measures of models that know no images"""


def check_paper(options: EvalConfig) -> None:
    """Raise UserError for a file without which a measure of the paper would fall back on the bundled world."""
    needed = {
        "texts": "held-out C4 and Wikipedia as .jsonl; from https://huggingface.co/datasets/allenai/c4 and others",
        "captions": f"captions_val2014.json or dataset_coco.json; from {COCO}",
        "images": f"the folder of val2014's pictures; from {COCO}",
        "clip": f"weights of a CLIP; from {CLIP_WEIGHTS}",
        "geneval": f"evaluation_metadata.jsonl; from {GENEVAL_PROMPTS}",
    }
    for name, what in needed.items():
        if not getattr(options, name):
            raise UserError(f"--suite paper: --{name}: expected {what}, found none")
    if options.features in (RECOGNISER, MOBILENET):
        raise UserError(f"--suite paper: --features: expected {FILE}, found {options.features}; from {URL}")


def named(names: Sequence[str], where: str = "--suite") -> list[Metric]:
    """Measures of suites and names, each once, in order. Raises UserError with the nearest name."""
    found: dict[str, Metric] = {}
    for name in names:
        if name not in SUITES and name not in METRICS:
            raise UserError(f'{where}: unknown measure "{name}"{nearest(name, [*SUITES, *METRICS])}')
        found |= {one: METRICS[one] for one in SUITES.get(name, (name,))}
    return list(found.values())


def check(bench: EvalContext, measures: Sequence[Metric]) -> None:
    """Raises UserError for what is missing, and for measures that a model without images has not."""
    for measure in measures:
        if bench.pipe.exported.model.config.images == "none" and measure.name not in TEXT_ONLY:
            raise UserError(f"{measure.name}: expected a model that knows images, found one of text alone")
        measure.check(bench)


def numbers(bench: EvalContext, measures: Sequence[Metric]) -> list[str]:
    """What measures will give, as MEASURE/NUMBER, before any work."""
    return [f"{measure.name}/{name}" for measure in measures for name in measure.numbers(bench)]


def evaluate(bench: EvalContext, measures: Sequence[Metric], sweep: Sequence[Drawing] = ()) -> Iterator[MetricResult]:
    """Check everything, then measure: findings of one measure after the other, of each drawing of a sweep in turn.

    Raises UserError before any work, as `check`.
    """
    benches = [replace(bench, drawing=drawing).settled() for drawing in sweep or (bench.drawing,)]
    check(benches[0], measures)
    for one in benches[1:]:
        check(one, [measure for measure in measures if measure.draws])
    for measure in measures:
        for one in benches if measure.draws else benches[:1]:
            found = measure.score(one)
            found.measure, found.drawing = measure.name, one.drawing if measure.draws else None
            found.results = [
                replace(result, measure=found.measure, model=one.model, drawing=found.drawing)
                for result in found.results
            ]
            yield found
