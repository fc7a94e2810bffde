"""How like real pictures the drawn ones are, all together: Fréchet distance, KID, precision and recall.

The prompts of the data are drawn once; the pictures that belong to them are what they are compared with. The reference
of each number is what other real pictures, as many, score against these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image

from ..config import to_dict
from .bench import EvalContext, Metric
from .distances import (
    LEAST,
    RECOGNISER,
    all_features,
    check_features,
    distance_name,
    features_name,
    frechet,
    kernel_distance,
    open_features,
    precision_recall,
)
from .generate import Made, Outcome, Task
from .pairs import Pairs, bench_pairs, check_pairs, world_pairs
from .result import Example, MetricResult, Result, first_of

SHOWN = 24


def pictures_task(
    bench: EvalContext,
    name: str,
    label: str,
    count: int,
    prompt: Callable[[int], Sequence[str | PIL.Image.Image]],
    facts: Callable[[int], dict[str, Any]],
    candidates: int = 1,
) -> Task:
    """Every prompt answered by one picture, number n with the seed `drawing.seed + n`: it does not depend on its batch.

    facts   what is kept of picture n beside it; candidates   drawn for each, of which the model keeps one
    """
    drawing = bench.drawing

    def work(numbers: Sequence[int]) -> list[Made]:
        requests = [
            replace(
                bench.request(prompt(n)),
                draw="force",
                max_tokens=0,
                seed=drawing.seed + n,
            )
            for n in numbers
        ]
        replies = bench.pipe.replies(requests, candidates)
        return [Made(facts(n), np.asarray(reply.images[0])) for n, reply in zip(numbers, replies, strict=True)]

    return Task(name, {"data": label, "drawing": to_dict(drawing)}, count, work)


def draw_task(bench: EvalContext, name: str, label: str, ids: Sequence[str], prompts: Sequence[str]) -> Task:
    """Every prompt drawn once."""
    seed = bench.drawing.seed
    return pictures_task(
        bench,
        name,
        label,
        len(prompts),
        lambda n: [prompts[n]],
        lambda n: {"id": ids[n], "prompt": prompts[n], "seed": seed + n},
        bench.drawing.candidates,
    )


def drawn_pairs(bench: EvalContext) -> tuple[Pairs, Outcome]:
    """The data, and its prompts drawn: what `drawing` and `clip` score."""
    pairs = bench_pairs(bench)
    return pairs, bench.make(draw_task(bench, "drawings", pairs.label, pairs.ids, pairs.prompts))


def _check(bench: EvalContext) -> None:
    check_pairs(bench, "drawing", LEAST)
    check_features(bench.options.features)


def _titles(network: str) -> tuple[str, str, str, str]:
    return distance_name(network), distance_name(network, "KID", "KD"), "precision", "recall"


def _score(bench: EvalContext) -> MetricResult:
    pairs, drawn = drawn_pairs(bench)
    name = bench.options.features
    sees = open_features(name, bench.recogniser() if name == RECOGNISER else None, bench.device)
    count = len(pairs.ids)
    a, b = all_features(sees, drawn.image, count), all_features(sees, pairs.picture, count)
    ceiling: dict[str, float] = {}
    if bench.options.captions is None:
        others = world_pairs(replace(bench.world, size=bench.pipe.exported.image_size), 2 * count)
        c = all_features(sees, lambda n: others.picture(count + n), count)
        ceiling = {"frechet": frechet(c, b, 2).value, "kid": kernel_distance(c, b).value}
        shares = precision_recall(c, b)
        ceiling |= {"precision": shares[0].value, "recall": shares[1].value}
    said = f"{bench.version}, features {sees.name}@{sees.digest}"
    precision, recall = precision_recall(a, b)

    def result(title: str, found: object, better: str, key: str) -> Result:
        return Result.of(title, found, better, said, pairs.whole_label, ceiling=ceiling.get(key))  # type: ignore[arg-type]

    titles = _titles(sees.name)
    results = [
        result(titles[0], frechet(a, b), "lower", "frechet"),
        result(titles[1], kernel_distance(a, b), "lower", "kid"),
        result(titles[2], precision, "higher", "precision"),
        result(titles[3], recall, "higher", "recall"),
    ]
    shown = range(min(SHOWN, count))
    title = first_of(count, SHOWN, "drawings")
    return MetricResult(
        results,
        [
            Example(pairs.prompts[n], [(drawn.image(n), "drawn"), (pairs.picture(n), "real")], group=title)
            for n in shown
        ],
    )


ABOUT = "Fréchet distance, KID, precision and recall of drawings"
COMPARED = "Reference: other real pictures of the bundled world, as many, in place of the drawings, which can pass it."
DRAWING = Metric(
    "drawing", ABOUT, _check, _score, lambda bench: _titles(features_name(bench.options.features)), True, COMPARED
)
