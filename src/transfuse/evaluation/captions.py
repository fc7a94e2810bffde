"""CIDEr-D (Vedantam et al. 2015) and BLEU-4 (Papineni et al. 2002) of captions, equal to COCO's evaluation code.

    words = [tokenize(caption) for caption in captions]
    cider_d(words, references)          # float64 [image], times 100: the paper's scale (27.2, Table 3)

Captions are split into Penn Treebank tokens: lower case, clitics apart, no punctuation. `tokenize` equals Stanford's
PTBTokenizer 3.4.1 with pycocoevalcap's flags on the captions of the tests, and needs no Java. `open_words` runs
Stanford's own instead where a jar is given; each result says which of the two it used.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import PIL.Image

from ..data.sources import document_images
from ..errors import UserError
from ..inference import score
from ..io import sha256
from ..sequence import Document, Text
from .confidence import Estimate, bootstrap, resampled, share
from .context import EvalContext, Example, Metric, MetricResult, Result, extremes
from .generate import Made, Task
from .pairs import Pairs, check_pairs, context_pairs

ORDER = 4  # length of the longest n-grams
SIGMA = 6.0  # scale in words of CIDEr-D's penalty on lengths that differ
MAX_TOKENS = 64
SHOWN = 12
LEAST = 2  # fewest images: with a single one no n-gram is rarer than another, and every CIDEr-D is 0
NAMES, PERPLEXITY = ("CIDEr-D x 100", "BLEU-4 x 100"), "perplexity of captions"

Gram = tuple[str, ...]
Words = Sequence[str]


# --- scores -----------------------------------------------------------------------------------------------------------


def n_grams(words: Words) -> Counter[Gram]:
    """Count each run of 1 to `ORDER` words."""
    spans = ((start, start + size) for size in range(1, ORDER + 1) for start in range(len(words) - size + 1))
    return Counter(tuple(words[start:end]) for start, end in spans)


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return float64 `[image]`, 0 to 1000, of tokenized captions, one per image, and the references of each image.

    Cosines of n-gram counts weighted by rarity among the references, clipped, reduced where lengths differ, averaged
    over n and references; times 10 as its authors define it, times 100 as papers print it.

    Raises:
        ValueError: fewer than `LEAST` images, or an image without references.
    """
    _check_lengths("cider_d", captions, references)
    if len(captions) < LEAST:
        raise ValueError(f"cider_d: expected at least {LEAST} images, found {len(captions)}")
    counted = [[n_grams(reference) for reference in of_image] for of_image in references]
    images: Counter[Gram] = Counter()
    for of_image in counted:
        images.update(set().union(*of_image))
    log_images = np.log(float(len(references)))

    def weigh(counts: Counter[Gram]) -> tuple[list[dict[Gram, float]], list[float], int]:
        vectors: list[dict[Gram, float]] = [{} for _ in range(ORDER)]
        for gram, times in counts.items():
            vectors[len(gram) - 1][gram] = times * (log_images - np.log(max(1.0, images[gram])))
        norms = [float(np.sqrt(sum(value**2 for value in vector.values()))) for vector in vectors]
        # The original measures length in pairs of words, and published numbers depend on it.
        return vectors, norms, sum(times for gram, times in counts.items() if len(gram) == 2)

    scores = np.zeros(len(captions))
    for image, (words, of_image) in enumerate(zip(captions, counted, strict=True)):
        vectors, norms, length = weigh(n_grams(words))
        for counts in of_image:
            truths, truth_norms, truth_length = weigh(counts)
            penalty = np.exp(-((length - truth_length) ** 2) / (2 * SIGMA**2))
            for vector, truth, norm, truth_norm in zip(vectors, truths, norms, truth_norms, strict=True):
                product = sum(min(value, truth.get(gram, 0.0)) * truth.get(gram, 0.0) for gram, value in vector.items())
                scores[image] += penalty * (product / (norm * truth_norm) if norm and truth_norm else product)
        scores[image] /= ORDER * len(of_image)
    return 1000 * scores


def bleu_4(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Estimate:
    """Return BLEU-4 of the whole set, 0 to 100, with its interval over images, by the nearest reference length."""
    _check_lengths("bleu_4", captions, references)
    rows, lengths = [], range(1, ORDER + 1)
    for words, of_image in zip(captions, references, strict=True):
        most = Counter[Gram]()
        for reference in of_image:
            most |= n_grams(reference)
        shared = n_grams(words) & most
        right = [sum(times for gram, times in shared.items() if len(gram) == n) for n in lengths]
        nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in of_image)[1]
        rows.append([*right, *(max(0, len(words) - n + 1) for n in lengths), len(words), nearest])
    counts = np.array(rows)
    low, high = np.percentile(resampled(counts, _bleu), [2.5, 97.5])
    return Estimate(float(_bleu(counts.sum(0)[None])[0]), float(low), float(high), len(captions))


def _bleu(sums: np.ndarray) -> np.ndarray:
    """Return BLEU `[set]` of sums over images; the small constants are the original's.

    sums `[set, 2 * ORDER + 2]`: n-grams shared with any reference by n, all n-grams by n, words, and words of the
    nearest reference.
    """
    right, total, length, nearest = sums[:, :ORDER], sums[:, ORDER:-2], sums[:, -2], sums[:, -1]
    precision = np.prod((right + 1e-15) / (total + 1e-9), axis=1) ** (1 / ORDER)
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return 100 * precision * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def _check_lengths(name: str, captions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(f"{name}: expected captions, and references for each, found {len(captions)} captions")


# --- words ------------------------------------------------------------------------------------------------------------

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|ltd|corp|prof|rev|gen|col|lt|sgt|capt|mt|ave|blvd|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_TOKEN = re.compile(
    rf"""
    (?:https?://\S+|www\.\S+)                            # addresses
    | (?:{_ABBREVIATIONS})\.(?!\w)              # a full stop that belongs to the word
    | no\.(?=\s*\d)
    | (?:[a-z]\.){{2,}}                                  # u.s., a.m.
    | \d+(?:[.,:/]\d+)+                                  # 1,000  3.5  12:30  1/2
    | '(?:n'|\d0s)                                       # rock 'n' roll, the '90s
    | c\+\+
    | [^\W_]+(?:(?:[-_&@./]|'(?=\D))(?=[^\W_])[^\W_]+)*   # words, with hyphens and all
    | '(?:s|m|d|re|ve|ll)\b
    | \.\.\.+ | --+ | \S
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"^(.+?)(n't|'(?:s|m|d|re|ve|ll))$")
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "y'all": ("y'", "all"),
}
# The original drops brackets in capitals, but sees them in lower case: they stay, as words.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = {*"'`\".?!,:;-–—…", "''", "``", "--", "..."}


def tokenize(text: str) -> list[str]:
    """Return the words in lower case, clitics apart, punctuation left out."""
    words: list[str] = []
    text = text.lower().replace("\n", " ").replace("’", "'").replace("“", '"').replace("”", '"')
    for token in _TOKEN.findall(text):
        if token in _DROPPED or set(token) <= {".", "-"}:
            continue
        match = _CLITIC.match(token)
        if token in _BRACKETS:
            words.append(_BRACKETS[token])
        elif match:
            words += _SPLIT.get(match[1], (match[1],))
            words.append(match[2])
        else:
            words += _SPLIT.get(token, (token,))
    return words


PACKAGE, JAR = "pycocoevalcap", "stanford-corenlp-3.4.1.jar"
MAIN = "edu.stanford.nlp.process.PTBTokenizer"
STANFORD_DROPPED = {*"'`.?!,:-;", "''", "``", "--", "..."}
"""The punctuation that pycocoevalcap drops; brackets in capitals are on its list too, but never come."""


@dataclass(frozen=True)
class WordTokenizer:
    """Cuts texts into words, all at once; results carry its name."""

    name: str
    cut: Callable[[Sequence[str]], list[list[str]]]


def open_words(jar: str) -> WordTokenizer:
    """Open our own tokenizer (""), Stanford's (the path of a jar), or the jar of the package "pycocoevalcap".

    Raises UserError for a jar or java that is missing or wrong; `cut` raises it where java fails.
    """
    if not jar:
        return WordTokenizer("PTB-like tokens", lambda texts: [tokenize(text) for text in texts])
    path = Path(jar)
    if jar == PACKAGE:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            hint = "install it with pip, or give a jar"
            raise UserError(f"--ptb-jar: expected the package {PACKAGE}, found none; {hint}")
        path = Path(next(iter(spec.submodule_search_locations)), "tokenizer", JAR)
    wanted = f"--ptb-jar: expected {JAR} with Stanford's PTBTokenizer, as {PACKAGE} brings it"
    if not path.is_file():
        raise UserError(f"{wanted}, found no {path}")
    try:
        with ZipFile(path) as archive:
            archive.getinfo(f"{MAIN.replace('.', '/')}.class")
    except (OSError, BadZipFile, KeyError):
        raise UserError(f"{wanted}, found something else in {path}") from None
    java = shutil.which("java")
    if java is None:
        raise UserError("--ptb-jar: expected java on the PATH, found none; without the option no Java is needed")
    name = f"Stanford PTBTokenizer ({path.name}@{sha256(path)[:8]})"
    return WordTokenizer(name, partial(_stanford, java, path))


def _stanford(java: str, jar: Path, texts: Sequence[str]) -> list[list[str]]:
    """Run Stanford's tokenizer with pycocoevalcap's flags, one line per text."""
    lines = [" ".join(text.split()) for text in texts]
    command = [java, "-cp", str(jar), MAIN, "-preserveLines", "-lowerCase"]
    try:
        process = subprocess.run(command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True)
    except OSError as error:
        raise UserError(f"--ptb-jar: {java}: expected java, found what does not run ({error.strerror})") from None
    message = process.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
    if process.returncode:
        raise UserError(f"--ptb-jar: {java}: expected words, found exit code {process.returncode} ({message[0]})")
    cut = process.stdout.decode().split("\n")[:-1]
    if len(cut) != len(lines):
        raise UserError(f"--ptb-jar: {java}: expected a line of words for each of {len(lines)}, found {len(cut)}")
    return [[word for word in line.split(" ") if word and word not in STANFORD_DROPPED] for line in cut]


# --- the metric -------------------------------------------------------------------------------------------------------


def _check(context: EvalContext) -> None:
    pairs = check_pairs(context, "captioning", LEAST)
    if len({tuple(sorted(of_image)) for of_image in pairs.references}) == 1:
        given = f"the same of all ({pairs.name})"
        raise UserError(f"captioning: expected references that tell pictures apart, found {given}")
    open_words(context.options.ptb_jar)


def _names(context: EvalContext) -> Sequence[str]:
    if context.options.data:
        return (*NAMES, PERPLEXITY)
    if context.options.captions is not None:
        return NAMES
    return (*NAMES, *context.needs_scorer("captioning").caption_facts())


def _score(context: EvalContext) -> MetricResult:
    pairs = context_pairs(context)

    def work(numbers: Sequence[int]) -> list[Made]:
        """Caption images greedily, as in the paper, with no text before them."""
        pictures = [PIL.Image.fromarray(pairs.picture(n)) for n in numbers]
        captions = context.pipe.caption(pictures, max_tokens=MAX_TOKENS)
        return [Made({"id": pairs.ids[n], "said": text}) for n, text in zip(numbers, captions, strict=True)]

    settings = {"data": pairs.whole_label, "max_tokens": MAX_TOKENS, "prompt": "the picture alone"}
    records = context.make(Task("captions", settings, len(pairs.ids), work)).records
    captions = [record["said"] for record in records]
    tokenizer = open_words(context.options.ptb_jar)
    texts = zip(captions, pairs.references, strict=True)
    tokenized = iter(tokenizer.cut([text for caption, of_image in texts for text in (caption, *of_image)]))
    by_image = [list(islice(tokenized, 1 + len(of_image))) for of_image in pairs.references]
    words, references = [of_image[0] for of_image in by_image], [of_image[1:] for of_image in by_image]
    scores = cider_d(words, references)
    elsewhere = cider_d([*words[1:], words[0]], references)
    ceiling = None
    if min(map(len, references)) > 1:  # the first reference of each image, scored against its others
        others = [of_image[1:] for of_image in references]
        ceiling = float(cider_d([of_image[0] for of_image in references], others).mean())
    code, data = f"{context.version}, {tokenizer.name}, greedy", pairs.whole_label
    bounds = {"floor": float(elsewhere.mean()), "ceiling": ceiling}
    results = [
        Result.of(NAMES[0], bootstrap(scores), "higher", f"{code}, n 4, sigma 6", data, **bounds),
        Result.of(NAMES[1], bleu_4(words, references), "higher", f"{code}, nearest length", data),
    ]
    if context.options.data:
        results.append(_perplexity(context, pairs))
    if not context.options.own_pairs:
        # The share of captions that state the facts of the picture, all of them and no others.
        for name, facts_in in context.needs_scorer("captioning").caption_facts().items():
            truth = [facts_in(wordings[0]) for wordings in pairs.references]
            last = [wordings[-1] for wordings in pairs.references]
            right, other, best = (
                np.array([facts_in(text) == facts for text, facts in zip(texts, truth, strict=True)])
                for texts in (captions, [*captions[1:], captions[0]], last)
            )
            bounds = {"floor": float(other.mean()), "ceiling": float(best.mean())}
            how = f"{context.version}, words found"
            results.append(Result.of(name, share(right), "higher", how, data, **bounds))
    examples = []
    for n, title in extremes(scores, SHOWN, "captions", "CIDEr-D"):
        text = f"{captions[n] or '(nothing)'}  [{scores[n]:.0f}]"
        examples.append(Example(text, [(pairs.picture(n), pairs.references[n][0])], group=title))
    return MetricResult(results, examples)


def _perplexity(context: EvalContext, pairs: Pairs) -> Result:
    """Return the perplexity of the true captions, EOS included, each after its image."""
    exported, count = context.pipe.exported, len(pairs.ids)
    texts = [exported.tokenizer.encode(prompt) for prompt in pairs.prompts]

    def work(numbers: Sequence[int]) -> list[Made]:
        images = document_images(np.stack([pairs.picture(n) for n in numbers]), exported.autoencoder)
        clean = [replace(image, target=False) for image in images]
        documents = [Document([image, Text(texts[n])]) for n, image in zip(numbers, clean, strict=True)]
        scores = score(exported, documents, context.batch)
        return [Made({"nats": s.nll[-len(texts[n]) - 1 :].sum()}) for n, s in zip(numbers, scores, strict=True)]

    nats = [r["nats"] for r in context.make(Task("caption-scores", {"data": pairs.whole_label}, count, work)).records]
    mean = bootstrap(nats, [len(ids) + 1 for ids in texts])
    value = Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)
    code = f"{context.version}, tokenizer {exported.tokenizer.fingerprint}"
    floor = float(exported.tokenizer.vocab_size)
    return Result.of(PERPLEXITY, value, "lower", code, pairs.whole_label, floor=floor)


CAPTIONING = Metric(
    "captioning",
    "CIDEr-D and BLEU-4 of captions",
    _check,
    _score,
    _names,
    compared=(
        "Chance: each caption held against the references of another picture. Reference: of CIDEr-D, the first "
        "reference caption of each picture against its others, which a model's captions can pass; of nouns and "
        "backgrounds, captions that the bundled world gives its own scenes."
    ),
)
