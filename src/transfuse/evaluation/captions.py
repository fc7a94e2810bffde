"""How well a picture is described: CIDEr-D (Vedantam et al. 2015) and BLEU-4 (Papineni et al. 2002), as COCO has them.

    words = [tokenize(said) for said in captions]
    cider_d(words, references)          # float64 [image], times 100: what the paper prints (27.2, Table 3)

Captions are lower-cased and cut as the Penn Treebank does, without punctuation: `words.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import PIL.Image

from emoji_scenes import colours_in, nouns_in

from ..errors import UserError
from .bench import EvalContext, Metric
from .confidence import Estimate, bootstrap, resampled, share
from .generate import Made, Task
from .pairs import Pairs, bench_pairs, check_pairs
from .ptb_tokenizer import check_words, open_words
from .result import Example, MetricResult, Result, extremes

ORDER = 4
"""longest n-grams"""
SIGMA = 6.0
"""of the penalty on lengths that differ, in words"""
MAX_TOKENS = 64
SHOWN = 12
LEAST = 2
"""pictures; among one, no word is rarer than another, and every CIDEr-D is 0"""
NAMES = ("CIDEr-D x 100", "BLEU-4 x 100")
OF_THE_WORLD = ("nouns right", "background right")
"""of captions of the bundled world, where it is known what there is to see"""


def n_grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to `ORDER` words occurs."""
    spans = ((start, start + size) for size in range(1, ORDER + 1) for start in range(len(words) - size + 1))
    return Counter(tuple(words[start:end]) for start, end in spans)


# --- measures ---------------------------------------------------------------------------------------------------------


def cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Of tokenized captions, one an image, and the references of each image: float64 `[image]`, 0 to 1000.

    Cosines of n-gram counts weighted by rarity among the images' references, clipped, less for lengths that differ,
    averaged over n and references; times 10 as its authors have it, times 100 as everybody prints it. Raises ValueError
    for fewer than `LEAST` images.
    """
    _check_lengths("cider_d", captions, references)
    if len(captions) < LEAST:
        raise ValueError(f"cider_d: expected at least {LEAST} images, found {len(captions)}")
    cooked = [[n_grams(reference) for reference in some] for some in references]
    images: Counter[tuple[str, ...]] = Counter()
    for some in cooked:
        images.update(set().union(*some))
    log_images = np.log(float(len(references)))

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDER)]
        for gram, times in counts.items():
            vectors[len(gram) - 1][gram] = times * (log_images - np.log(max(1.0, images[gram])))
        norms = [float(np.sqrt(sum(value**2 for value in vector.values()))) for vector in vectors]
        # Lengths are counted in pairs of words: so does the original, and its numbers are the ones people compare with.
        return vectors, norms, sum(times for gram, times in counts.items() if len(gram) == 2)

    scores = np.zeros(len(captions))
    for image, (words, some) in enumerate(zip(captions, cooked, strict=True)):
        said, said_norms, said_length = weigh(n_grams(words))
        for counts in some:
            truth, norms, length = weigh(counts)
            penalty = np.exp(-((said_length - length) ** 2) / (2 * SIGMA**2))
            for vector, other, norm, other_norm in zip(said, truth, said_norms, norms, strict=True):
                product = sum(min(value, other.get(gram, 0.0)) * other.get(gram, 0.0) for gram, value in vector.items())
                scores[image] += penalty * (product / (norm * other_norm) if norm and other_norm else product)
        scores[image] /= ORDER * len(some)
    return 1000 * scores


def bleu_4(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Estimate:
    """Of the whole set, 0 to 100, with its interval over images. The nearest reference's length counts for each."""
    _check_lengths("bleu_4", captions, references)
    counted = np.array([_matches(words, some) for words, some in zip(captions, references, strict=True)])
    low, high = np.percentile(resampled(counted, _bleu), [2.5, 97.5])
    return Estimate(float(_bleu(counted.sum(0)[None])[0]), float(low), float(high), len(captions))


def _matches(words: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """n-grams shared with any reference, by n; n-grams there are, by n; words; words of the nearest reference."""
    said, most = n_grams(words), Counter[tuple[str, ...]]()
    for reference in references:
        most |= n_grams(reference)
    shared = said & most
    lengths = range(1, ORDER + 1)
    right = [sum(times for gram, times in shared.items() if len(gram) == n) for n in lengths]
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [*right, *(max(0, len(words) - n + 1) for n in lengths), len(words), nearest]


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Of sums `[set, 2 * ORDER + 2]` as `_matches` counts: `[set]`. The small numbers are the original's."""
    right, there, length, nearest = sums[:, :ORDER], sums[:, ORDER:-2], sums[:, -2], sums[:, -1]
    precision = np.prod((right + 1e-15) / (there + 1e-9), axis=1) ** (1 / ORDER)
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return 100 * precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _check_lengths(measure: str, captions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(f"{measure}: expected captions, and references for each, found {len(captions)} captions")


# --- as a measure -----------------------------------------------------------------------------------------------------


def caption_task(bench: EvalContext, pairs: Pairs) -> Task:
    """Every picture described greedily, as in the paper; nothing is said before it."""

    def work(numbers: Sequence[int]) -> list[Made]:
        pictures = [PIL.Image.fromarray(pairs.picture(n)) for n in numbers]
        said = bench.pipe.caption(pictures, max_tokens=MAX_TOKENS)
        return [Made({"id": pairs.ids[n], "said": text}) for n, text in zip(numbers, said, strict=True)]

    settings = {"data": pairs.whole_label, "max_tokens": MAX_TOKENS, "prompt": "the picture alone"}
    return Task("captions", settings, len(pairs.ids), work)


def _score(bench: EvalContext) -> MetricResult:
    pairs = bench_pairs(bench)
    said = [record["said"] for record in bench.make(caption_task(bench, pairs)).records]
    cut = open_words(bench.options.ptb_jar)
    counts = [1 + len(some) for some in pairs.references]
    both = iter(cut([text for one, some in zip(said, pairs.references, strict=True) for text in (one, *some)]))
    cut_up = [list(islice(both, count)) for count in counts]
    words, references = [one[0] for one in cut_up], [one[1:] for one in cut_up]
    scores = cider_d(words, references)
    elsewhere = cider_d([*words[1:], words[0]], references)
    code = f"{bench.version}, {cut.name}, greedy"
    ceiling = None
    if min(map(len, references)) > 1:  # what one person says, held against the others
        others = [some[1:] for some in references]
        ceiling = float(cider_d([some[0] for some in references], others).mean())
    results = [
        Result.of(
            NAMES[0],
            bootstrap(scores),
            "higher",
            f"{code}, n 4, sigma 6",
            pairs.whole_label,
            floor=float(elsewhere.mean()),
            ceiling=ceiling,
        ),
        Result.of(NAMES[1], bleu_4(words, references), "higher", f"{code}, nearest length", pairs.whole_label),
    ]
    if bench.options.captions is None:
        results += _seen_right(bench, pairs, said)
    exhibits = [
        Example(
            f"{said[n] or '(nothing)'}  [{scores[n]:.0f}]",
            [(pairs.picture(n), pairs.references[n][0])],
            group=title,
        )
        for n, title in extremes(scores, SHOWN, "captions", "CIDEr-D")
    ]
    return MetricResult(results, exhibits)


def _seen_right(bench: EvalContext, pairs: Pairs, said: Sequence[str]) -> Iterator[Result]:
    """How often a caption names the things there are, all of them and no others; and the background's colour."""
    for name, find in zip(OF_THE_WORLD, (nouns_in, colours_in), strict=True):
        truth = [find(some[0]) for some in pairs.references]
        right, elsewhere = (
            np.array([find(text) == there for text, there in zip(captions, truth, strict=True)])
            for captions in (said, [*said[1:], said[0]])
        )
        best = np.array([find(some[-1]) == there for some, there in zip(pairs.references, truth, strict=True)])
        bounds = {"floor": float(elsewhere.mean()), "ceiling": float(best.mean())}
        yield Result.of(name, share(right), "higher", f"{bench.version}, words found", pairs.whole_label, **bounds)


def _numbers(bench: EvalContext) -> Sequence[str]:
    return (*NAMES, *OF_THE_WORLD) if bench.options.captions is None else NAMES


def _check(bench: EvalContext) -> None:
    pairs = check_pairs(bench, "captioning", LEAST)
    if len({tuple(sorted(some)) for some in pairs.references}) == 1:
        raise UserError(
            f"captioning: expected references that tell pictures apart, found the same of all ({pairs.name})"
        )
    check_words(bench.options.ptb_jar)


COMPARED = (
    "Chance: each caption held against the references of another picture. Reference: of CIDEr-D, the first reference "
    "caption of each picture against its others, which a model's captions can pass; of nouns and backgrounds, captions "
    "that the bundled world gives its own scenes."
)
CAPTIONING = Metric("captioning", "CIDEr-D and BLEU-4 of captions", _check, _score, _numbers, compared=COMPARED)
