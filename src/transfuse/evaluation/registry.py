"""The metrics by name, the suites, and `evaluate`, which runs them: from the command line, or during training.

    for result in evaluate(context, named(["quick"])): ...      # all checks first, then the work

To add a metric, write a function from `EvalContext` to `MetricResult`, say what it needs, and add it to `METRICS`. The
mean brightness of drawings, for example, in `drawings.py`:

    def _score_brightness(context: EvalContext) -> MetricResult:
        pairs, drawn = drawn_pairs(context)                             # each prompt is drawn once, for all metrics
        estimate = bootstrap(drawn.images().mean((1, 2, 3)))            # one number per image, with an interval
        return MetricResult([Result.of("level", estimate, "higher", context.version, pairs.label)])

    BRIGHTNESS = Metric(
        "brightness",                                                   # transfuse evaluate --suite brightness
        "mean brightness of drawings",
        lambda context: check_pairs(context, "brightness", least=1),    # complains before any work
        _score_brightness,
        lambda context: ["level"],                                      # names of its numbers, before any work
        draws=True,                                                     # a sweep repeats it
    )

The page gives it a bar and a table, `results.json` its number. Metrics of text go to `text.py`, of captions to
`captions.py`, of autoencoders to `reconstruction.py`; those that need one data set belong to it
(`data.bundled.data_set_metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..config import nearest
from ..data.bundled import data_set_metrics
from ..errors import UserError
from .captions import CAPTIONING
from .context import Drawing, EvalConfig, EvalContext, Metric, MetricResult
from .drawings import CLIP, CLIP_URL, DENOISING, DRAWING, GENEVAL, GENEVAL_URL
from .image_quality import CLASSIFIER, FID_FILE, FID_URL, MOBILENET
from .pairs import WHERE
from .reconstruction import AUTOENCODER
from .speed import SPEED
from .text import CHOICE, HARNESS, TEXT

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (TEXT, CHOICE, HARNESS, CAPTIONING, DRAWING, DENOISING, CLIP, GENEVAL, AUTOENCODER, SPEED)
}
"""The metrics for any data set; `all_metrics` adds those that data sets bring."""
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("text", "choice", "captioning", "drawing", "composition", "speed"),
    "pairs": ("captioning", "drawing", "autoencoder"),
    "paper": ("text", "harness", "captioning", "drawing", "clip", "geneval"),
}
"""quick: the metrics that need only the package. pairs: those of a data set with images. paper: Transfusion's own
metrics, on files that the user has."""
TEXT_ONLY = ("text", "choice", "harness", "speed")  # the metrics for models without images


def all_metrics() -> dict[str, Metric]:
    """Return every metric by name: those for any data set, and those that installed data sets bring."""
    return {**METRICS, **data_set_metrics()}


def named(names: Sequence[str], where: str = "--suite") -> list[Metric]:
    """Return the metrics of suites and names, each once, in order. Raises UserError with the nearest name."""
    known, chosen = all_metrics(), dict[str, Metric]()
    for name in names:
        if name not in SUITES and name not in known:
            raise UserError(f'{where}: unknown measure "{name}"{nearest(name, [*SUITES, *known])}')
        chosen |= {metric: known[metric] for metric in SUITES.get(name, (name,)) if metric in known}
    return list(chosen.values())


def check(context: EvalContext, metrics: Sequence[Metric]) -> None:
    """Raise UserError for missing inputs, and for image metrics of a model without images."""
    for metric in metrics:
        if context.pipe.exported.model.config.images == "none" and metric.name not in TEXT_ONLY:
            raise UserError(f"{metric.name}: expected a model that knows images, found one of text alone")
        metric.check(context)


def check_paper(options: EvalConfig) -> None:
    """Raise UserError for a missing file without which a metric of the paper would use the bundled data set."""
    needed = {
        "texts": "held-out C4 and Wikipedia as .jsonl; from https://huggingface.co/datasets/allenai/c4 and others",
        "captions": f"captions_val2014.json or dataset_coco.json; from {WHERE}",
        "images": f"the folder of val2014's pictures; from {WHERE}",
        "clip": f"weights of a CLIP; from {CLIP_URL}",
        "geneval": f"evaluation_metadata.jsonl; from {GENEVAL_URL}",
    }
    for name, what in needed.items():
        if not getattr(options, name):
            raise UserError(f"--suite paper: --{name}: expected {what}, found none")
    if options.features in (CLASSIFIER, MOBILENET):
        raise UserError(f"--suite paper: --features: expected {FID_FILE}, found {options.features}; from {FID_URL}")


def numbers(context: EvalContext, metrics: Sequence[Metric]) -> list[str]:
    """Return the names of all results as METRIC/NUMBER, before any work."""
    return [f"{metric.name}/{name}" for metric in metrics for name in metric.numbers(context)]


def evaluate(context: EvalContext, metrics: Sequence[Metric], sweep: Sequence[Drawing] = ()) -> Iterator[MetricResult]:
    """Check everything, then yield the results of each metric, for each drawing of a sweep in turn.

    Raises UserError before any work, as `check` does.
    """
    contexts = [replace(context, drawing=drawing).resolved() for drawing in sweep or (context.drawing,)]
    check(contexts[0], metrics)
    for other in contexts[1:]:
        check(other, [metric for metric in metrics if metric.draws])
    for metric in metrics:
        for current in contexts if metric.draws else contexts[:1]:
            result = metric.score(current)
            result.measure, result.drawing = metric.name, current.drawing if metric.draws else None
            result.results = [
                replace(number, measure=metric.name, model=current.model, drawing=result.drawing)
                for number in result.results
            ]
            yield result
