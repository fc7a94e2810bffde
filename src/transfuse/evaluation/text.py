"""How well a model foretells text it never read: perplexity per token, and bits per byte (Transfusion section 4.1).

Every text is a document of its own: BOS, text, EOS, laid out by the grammar that training uses. Perplexity depends on
the tokenizer; bits per byte do not, so they compare models of different vocabularies.

A text longer than the context is cut into windows. Blocked: each token is foretold from those before it in its block
alone. Sliding: a window moves by `stride` tokens, and only its new ones count; more context, lower perplexity, more
work. EOS does not count there: a block ends where it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emoji_scenes import glosses

from ..data.readers import Columns, Fault, open_source
from ..errors import UserError
from ..export import Exported
from ..inference import foretell
from ..log import progress
from ..sequence import Document, Text
from .bench import EvalContext, Metric
from .confidence import Estimate, bootstrap
from .generate import Made, Task, short_hash
from .result import Example, MetricResult, Result, extremes

GLOSSES = "definitions"
"""what is read where no files are given"""
SHOWN = 3
PIECE = 16
"""windows of a long text that are one item: what a crash loses at most"""


@dataclass(frozen=True)
class TextResult:
    """perplexity: e to the mean nats per token, EOS among them; bits_per_byte: all bits over the texts' UTF-8 bytes."""

    perplexity: Estimate
    bits_per_byte: Estimate
    documents: int
    tokens: int
    bytes: int


def perplexity(exported: Exported, texts: Sequence[str], batch: int = 32) -> TextResult:
    """Measure texts (definitions, captions, anything), `batch` documents at a time.

    Raises UserError for no texts, an empty one, or one longer than the model's context.
    """
    if not texts or not all(texts):
        raise UserError("perplexity: texts: expected at least one and none empty, found none or an empty one")
    nats, counts = [], []
    with progress("perplexity", len(texts), unit="texts") as bar:
        for start in range(0, len(texts), batch):
            some = [_document(exported, text) for text in texts[start : start + batch]]
            found = foretell(exported, some, batch)
            nats += [one.nats.sum() for one in found]
            counts += [len(one.nats) for one in found]
            bar.advance(len(some))
    return _summed(nats, counts, [len(text.encode()) for text in texts], len(texts))


def _document(exported: Exported, text: str) -> Document:
    return Document([Text(exported.tokenizer.encode(text))])


def _summed(nats: Sequence[float], tokens: Sequence[int], sizes: Sequence[float], documents: int) -> TextResult:
    mean, bits = bootstrap(nats, tokens), bootstrap(np.asarray(nats) / math.log(2), sizes)
    exponential = Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)
    return TextResult(exponential, bits, documents, int(sum(tokens)), round(sum(sizes)))


def windows(tokens: Sequence[int], room: int, stride: int) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(context, tokens to foretell) of each window: every token once, at most `room` in a window.

    stride == room: blocks without context. Less: each window but the first foretells `stride` tokens from the
    `room - stride` before them. Raises ValueError for a stride that is not from 1 to `room`.
    """
    if not 1 <= stride <= room:
        raise ValueError(f"stride: expected 1 to {room} tokens, found {stride}")
    yield tokens[:0], tokens[:room]
    for start in range(room, len(tokens), stride):
        yield tokens[start - (room - stride) : start], tokens[start : start + stride]


# --- as a measure -----------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> list[str]:
    """Documents of a .txt file (one), a .jsonl (field "text"), or a folder of these. UserError names what is wrong."""
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


def _check(bench: EvalContext) -> None:
    for path in bench.options.texts:
        if not path.exists():
            raise UserError(f"{path}: expected a .txt or .jsonl file, or a folder of them, for --texts, found none")
    room, stride = bench.pipe.exported.model.config.max_seq_len - 1, bench.options.stride
    if stride is not None and not 1 <= stride <= room:
        raise UserError(f"--stride: expected 1 to {room} tokens, found {stride}")


def _titles(name: str) -> tuple[str, str]:
    return f"perplexity of {name}", f"bits per byte of {name}"


def _numbers(bench: EvalContext) -> list[str]:
    return [title for path in bench.options.texts or (Path(GLOSSES),) for title in _titles(path.stem)]


def _score(bench: EvalContext) -> MetricResult:
    findings = MetricResult([])
    if not bench.options.texts:
        _add(findings, bench, GLOSSES, "glosses:heldout", _documents_task(bench, glosses("heldout")))
    for path in bench.options.texts:
        texts = read_texts(path)
        _add(findings, bench, path.stem, f"{path.name}:{short_hash(texts)}", _windows_task(bench, path.stem, texts))
    return findings


def _add(findings: MetricResult, bench: EvalContext, name: str, data: str, task: Task) -> None:
    records = bench.make(task).records
    nats, tokens, sizes = ([record[key] for record in records] for key in ("nats", "tokens", "bytes"))
    found = _summed(nats, tokens, sizes, task.settings["documents"])
    vocabulary = bench.pipe.exported.tokenizer.vocab_size
    said = f"{bench.version} {task.settings['windows']}, tokenizer {bench.pipe.exported.tokenizer.fingerprint}"
    data = f"{data}, {found.documents} documents, {found.tokens} tokens, {found.bytes} bytes"
    findings.results += [
        Result.of(_titles(name)[0], found.perplexity, "lower", said, data, floor=float(vocabulary)),
        Result.of(_titles(name)[1], found.bits_per_byte, "lower", said, data),
    ]
    each = [math.exp(one / count) for one, count in zip(nats, tokens, strict=True)]
    findings.exhibits += [
        Example(f"perplexity {each[n]:.1f}: {records[n]['text']}", group=title)
        for n, title in extremes(each, SHOWN, f"texts of {name}", "perplexity")
    ]


def _documents_task(bench: EvalContext, texts: Sequence[str]) -> Task:
    """Texts that fit the context, whole."""
    exported = bench.pipe.exported

    def work(numbers: Sequence[int]) -> list[Made]:
        found = foretell(exported, [_document(exported, texts[n]) for n in numbers], bench.batch)
        return [
            Made({"text": texts[n], "nats": one.nats.sum(), "tokens": len(one.nats), "bytes": len(texts[n].encode())})
            for n, one in zip(numbers, found, strict=True)
        ]

    settings = {"data": short_hash(list(texts)), "documents": len(texts), "windows": "whole documents, EOS counted"}
    return Task("definitions", settings, len(texts), work)


def _windows_task(bench: EvalContext, name: str, texts: Sequence[str]) -> Task:
    """Texts of any length, in windows; an item is a piece of a text. Bytes are shared out among pieces by tokens."""
    exported = bench.pipe.exported
    room = exported.model.config.max_seq_len - 1
    stride = bench.options.stride or room
    encoded = [exported.tokenizer.encode(text) for text in texts]
    cut = [list(windows(ids, room, stride)) for ids in encoded]
    pieces = [(text, start) for text, all_of in enumerate(cut) for start in range(0, len(all_of), PIECE)]

    def work(numbers: Sequence[int]) -> list[Made]:
        made = []
        for text, start in (pieces[n] for n in numbers):
            some = cut[text][start : start + PIECE]
            documents = [Document([Text(tuple(a), predict=False), Text(tuple(b))], closed=False) for a, b in some]
            found = foretell(exported, documents, bench.batch)
            count = sum(len(one.nats) for one in found)
            said = exported.tokenizer.decode(some[0][1][:60])
            record = {"text": said, "nats": sum(one.nats.sum() for one in found), "tokens": count}
            made.append(Made({**record, "bytes": len(texts[text].encode()) * count / len(encoded[text])}))
        return made

    words = "blocked" if stride == room else f"sliding by {stride}"
    settings = {"data": short_hash(list(texts)), "documents": len(texts), "windows": f"{words}, {room} tokens"}
    return Task(f"text-{name}", settings, len(pieces), work)


ABOUT = "perplexity and bits per byte on text it never read"
COMPARED = "Chance: every token of the vocabulary as likely as any other."
TEXT = Metric("text", ABOUT, _check, _score, _numbers, compared=COMPARED)
