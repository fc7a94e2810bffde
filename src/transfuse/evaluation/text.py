"""Perplexity and bits per byte of text.

Short texts are scored whole, EOS included. Files of any length are cut into windows of the model's context: blocks
without overlap, or windows that move by `stride` tokens and see the tokens before them; EOS is not scored then.
Perplexity depends on the tokenizer; bits per byte do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.readers import Columns, Fault, open_source
from ..errors import UserError
from ..export import Exported
from ..inference import score
from ..log import progress
from ..sequence import Document, Text
from .confidence import Estimate, bootstrap
from .context import EvalContext, Example, Metric, MetricResult, Result, extremes
from .generate import Made, Task, short_hash

GLOSSES = "definitions"
"""The name of the scorer's held-out texts, read where no files are given."""
SHOWN = 3
PIECE = 16
"""Windows of a long text that form one item, the most that is lost when a process dies."""


@dataclass(frozen=True)
class TextResult:
    """Totals over texts: e to the mean NLL per token (EOS included), and all bits over the UTF-8 bytes."""

    perplexity: Estimate
    bits_per_byte: Estimate
    documents: int
    tokens: int
    bytes: int


def perplexity(exported: Exported, texts: Sequence[str], batch: int = 32) -> TextResult:
    """Measure texts, `batch` documents at a time.

    Raises UserError for no texts, an empty text, or one longer than the model's context.
    """
    if not texts or not all(texts):
        raise UserError("perplexity: texts: expected at least one and none empty, found none or an empty one")
    nats, counts = [], []
    with progress("perplexity", len(texts), unit="texts") as bar:
        for start in range(0, len(texts), batch):
            documents = [_document(exported, text) for text in texts[start : start + batch]]
            for scores in score(exported, documents, batch):
                nats.append(scores.nll.sum())
                counts.append(len(scores.nll))
            bar.advance(len(documents))
    return _total(nats, counts, [len(text.encode()) for text in texts], len(texts))


def _document(exported: Exported, text: str) -> Document:
    return Document([Text(exported.tokenizer.encode(text))])


def _total(nats: Sequence[float], tokens: Sequence[int], sizes: Sequence[float], documents: int) -> TextResult:
    mean, bits = bootstrap(nats, tokens), bootstrap(np.asarray(nats) / math.log(2), sizes)
    exponential = Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)
    return TextResult(exponential, bits, documents, int(sum(tokens)), round(sum(sizes)))


def windows(tokens: Sequence[int], room: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield (context, tokens to score) so that every token is scored once, with at most `room` tokens in a window.

    With stride == room these are blocks without context; with less, each window but the first scores `stride` tokens
    given the `room - stride` before them. Raises ValueError for a stride outside 1 to `room`.
    """
    if not 1 <= stride <= room:
        raise ValueError(f"stride: expected 1 to {room} tokens, found {stride}")
    yield tokens[:0], tokens[:room]
    for start in range(room, len(tokens), stride):
        yield tokens[start - (room - stride) : start], tokens[start : start + stride]


def read_texts(path: Path) -> list[str]:
    """Return the documents of a .txt file (one), a .jsonl (field "text"), or a folder of these.

    Raises UserError for images, unreadable documents, or no text.
    """
    reader = open_source(str(path), Columns())
    if not reader.text_only:
        raise UserError(f"{path}: expected text alone, found pictures")
    texts = []
    for part in reader.parts():
        for item in reader.read(part):
            if isinstance(item, Fault):
                raise UserError(f"{path}: {item.key}: {item.reason}")
            texts += [words for words in item.parts if isinstance(words, str)]
    if not texts:
        raise UserError(f"{path}: expected documents with words, found none")
    return texts


# --- the metric -------------------------------------------------------------------------------------------------------


def _check(context: EvalContext) -> None:
    if not context.options.texts:
        context.needs_scorer("--texts")
    for path in context.options.texts:
        if not path.exists():
            raise UserError(f"{path}: expected a .txt or .jsonl file, or a folder of them, for --texts, found none")
    room, stride = context.pipe.exported.model.config.max_seq_len - 1, context.options.stride
    if stride is not None and not 1 <= stride <= room:
        raise UserError(f"--stride: expected 1 to {room} tokens, found {stride}")


def _titles(name: str) -> tuple[str, str]:
    return f"perplexity of {name}", f"bits per byte of {name}"


def _numbers(context: EvalContext) -> list[str]:
    return [title for path in context.options.texts or (Path(GLOSSES),) for title in _titles(path.stem)]


def _score(context: EvalContext) -> MetricResult:
    result = MetricResult([])
    if not context.options.texts:
        texts = list(context.needs_scorer("text").texts())
        _add(result, context, GLOSSES, "glosses:heldout", _documents_task(context, texts))
    for path in context.options.texts:
        texts = read_texts(path)
        _add(result, context, path.stem, f"{path.name}:{short_hash(texts)}", _windows_task(context, path.stem, texts))
    return result


def _add(result: MetricResult, context: EvalContext, name: str, data: str, task: Task) -> None:
    """Run a task and add its results and examples."""
    records = context.make(task).records
    nats, tokens, sizes = ([record[key] for record in records] for key in ("nats", "tokens", "bytes"))
    total = _total(nats, tokens, sizes, task.settings["documents"])
    tokenizer = context.pipe.exported.tokenizer
    implementation = f"{context.version} {task.settings['windows']}, tokenizer {tokenizer.fingerprint}"
    data = f"{data}, {total.documents} documents, {total.tokens} tokens, {total.bytes} bytes"
    names, floor = _titles(name), float(tokenizer.vocab_size)
    result.results += [
        Result.of(names[0], total.perplexity, "lower", implementation, data, floor=floor),
        Result.of(names[1], total.bits_per_byte, "lower", implementation, data),
    ]
    each = [math.exp(total_nats / count) for total_nats, count in zip(nats, tokens, strict=True)]
    result.exhibits += [
        Example(f"perplexity {each[n]:.1f}: {records[n]['text']}", group=title)
        for n, title in extremes(each, SHOWN, f"texts of {name}", "perplexity")
    ]


def _documents_task(context: EvalContext, texts: Sequence[str]) -> Task:
    """Return a task that scores whole texts, each within the context."""
    exported = context.pipe.exported

    def work(numbers: Sequence[int]) -> list[Made]:
        scores = score(exported, [_document(exported, texts[n]) for n in numbers], context.batch)
        return [
            Made({"text": texts[n], "nats": s.nll.sum(), "tokens": len(s.nll), "bytes": len(texts[n].encode())})
            for n, s in zip(numbers, scores, strict=True)
        ]

    settings = {"data": short_hash(list(texts)), "documents": len(texts), "windows": "whole documents, EOS counted"}
    return Task("definitions", settings, len(texts), work)


def _windows_task(context: EvalContext, name: str, texts: Sequence[str]) -> Task:
    """Return a task that scores texts of any length in windows; the bytes of a text are split by tokens."""
    exported = context.pipe.exported
    room = exported.model.config.max_seq_len - 1
    stride = context.options.stride or room
    encoded = [exported.tokenizer.encode(text) for text in texts]
    cut = [list(windows(ids, room, stride)) for ids in encoded]
    pieces = [(text, start) for text, of_text in enumerate(cut) for start in range(0, len(of_text), PIECE)]

    def work(numbers: Sequence[int]) -> list[Made]:
        made = []
        for text, start in (pieces[n] for n in numbers):
            piece = cut[text][start : start + PIECE]
            documents = [Document([Text(tuple(a), predict=False), Text(tuple(b))], closed=False) for a, b in piece]
            scores = score(exported, documents, context.batch)
            count = sum(len(s.nll) for s in scores)
            first = exported.tokenizer.decode(piece[0][1][:60])
            record = {"text": first, "nats": sum(s.nll.sum() for s in scores), "tokens": count}
            made.append(Made({**record, "bytes": len(texts[text].encode()) * count / len(encoded[text])}))
        return made

    overlap = "blocked" if stride == room else f"sliding by {stride}"
    settings = {"data": short_hash(list(texts)), "documents": len(texts), "windows": f"{overlap}, {room} tokens"}
    return Task(f"text-{name}", settings, len(pieces), work)


TEXT = Metric(
    "text",
    "perplexity and bits per byte on text it never read",
    _check,
    _score,
    _numbers,
    compared="Chance: every token of the vocabulary as likely as any other.",
)
