"""Text metrics by log-likelihood: perplexity, multiple choice, and the Llama suite of lm-evaluation-harness.

`text`      perplexity and bits per byte; perplexity depends on the tokenizer, bits per byte do not
`choice`    which of four endings of a held-out text is most probable?
`harness`   HellaSwag, PIQA, SIQA, WinoGrande, ARC-e, ARC-c, BoolQ, zero-shot (Transfusion section 4.1)

    lm_eval.simple_evaluate(model=harness_model(pipe), tasks=["hellaswag"])      # or from your own code
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import DataSet
from ..data.readers import Columns, Fault, Raw, open_source
from ..errors import UserError, install_command
from ..export import Exported
from ..inference import TransfusionPipeline, score
from ..log import logger, progress
from ..sequence import Document, Text, Tokenizer
from .confidence import Estimate, bootstrap, share
from .context import EvalContext, Example, Metric, MetricResult, Result, extremes, first_of
from .generate import Made, Task, short_hash

GLOSSES = "definitions"  # the name of the scorer's held-out texts, read where no files are given
PIECE = 16  # windows of a long text that form one item, the most that is lost when a process dies
CHOICES = 4
LLAMA_SUITE = ("hellaswag", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge", "boolq")
MAX_TOKENS = 256  # most tokens written for a harness task that does not say
SHOWN_TEXTS, SHOWN_QUESTIONS = 3, 12

Tokens = Sequence[int]


# --- perplexity -------------------------------------------------------------------------------------------------------


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
    nll, counts = [], []
    with progress("perplexity", len(texts), unit="texts") as bar:
        for start in range(0, len(texts), batch):
            documents = [Document([Text(exported.tokenizer.encode(text))]) for text in texts[start : start + batch]]
            for scores in score(exported, documents, batch):
                nll.append(scores.nll.sum())
                counts.append(len(scores.nll))
            bar.advance(len(documents))
    return _total(nll, counts, [len(text.encode()) for text in texts], len(texts))


def _total(nll: Sequence[float], tokens: Sequence[int], sizes: Sequence[float], documents: int) -> TextResult:
    mean, bits = bootstrap(nll, tokens), bootstrap(np.asarray(nll) / math.log(2), sizes)
    exponential = Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)
    return TextResult(exponential, bits, documents, int(sum(tokens)), round(sum(sizes)))


def windows(tokens: Tokens, room: int, stride: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Yield (context, tokens to score) so that every token is scored once, with at most `room` tokens in a window.

    With stride == room these are blocks without context; with less, each window but the first scores `stride` tokens
    given the `room - stride` before them. Raises ValueError for a stride outside 1 to `room`.
    """
    if not 1 <= stride <= room:
        raise ValueError(f"stride: expected 1 to {room} tokens, found {stride}")
    yield tokens[:0], tokens[:room]
    for start in range(room, len(tokens), stride):
        yield tokens[start - (room - stride) : start], tokens[start : start + stride]


def _given(context: Tokens, scored: Tokens) -> Document:
    """Return a document that scores tokens given those before them."""
    return Document([Text(tuple(context), predict=False), Text(tuple(scored))], closed=False)


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
            if isinstance(item, Raw):
                texts += [words for words in item.parts if isinstance(words, str)]
    if not texts:
        raise UserError(f"{path}: expected documents with words, found none")
    return texts


def _held_out_texts(data: DataSet, count: int) -> list[str]:
    """Return held-out documents of a set of text. Raises UserError where there is none."""
    if data.manifest.kind != "text" or not data.manifest.heldout:
        kind = "images" if data.manifest.kind != "text" else "which nothing is held out"
        raise UserError(f"--data: {data.path}: expected a data set of text with a held-out part, found one of {kind}")
    tokenizer = data.tokenizer()
    numbers = [data.number("heldout", index) for index in range(min(count, data.manifest.heldout))]
    return [tokenizer.decode(data.read_ids(number).tolist()) for number in numbers]


def _check_text(context: EvalContext) -> None:
    if context.options.data:
        _held_out_texts(DataSet(context.options.data), 1)
    elif not context.options.texts:
        context.needs_scorer("--texts")
    for path in context.options.texts:
        if not path.exists():
            raise UserError(f"{path}: expected a .txt or .jsonl file, or a folder of them, for --texts, found none")
    room, stride = context.pipe.exported.model.config.max_seq_len - 1, context.options.stride
    if stride is not None and not context.options.data and not context.options.texts:
        raise UserError("--stride: expected --texts or --data, whose texts are read in windows, found neither")
    if stride is not None and not 1 <= stride <= room:
        raise UserError(f"--stride: expected 1 to {room} tokens, found {stride}")


def _named_texts(context: EvalContext) -> dict[str, Callable[[], list[str]]]:
    """Return what reads the texts, by name: a data set's held-out part, files, or the scorer's held-out texts."""
    options = context.options
    if options.data:
        data = DataSet(options.data)
        return {data.name: partial(_held_out_texts, data, options.count)}
    if options.texts:
        return {path.stem: partial(read_texts, path) for path in options.texts}
    return {GLOSSES: lambda: list(context.needs_scorer("text").texts())}


def _text_names(name: str) -> tuple[str, str]:
    return f"perplexity of {name}", f"bits per byte of {name}"


def _score_text(context: EvalContext) -> MetricResult:
    tokenizer, result = context.pipe.exported.tokenizer, MetricResult([])
    bundled = not context.options.data and not context.options.texts
    for name, read in _named_texts(context).items():
        documents = read()
        texts = [text for text in documents if tokenizer.encode(text)]
        if not texts:
            raise UserError(f"{name}: expected documents with words, found none")
        if len(texts) < len(documents):
            empty = len(documents) - len(texts)
            logger.info(f"{name}: {empty} of {len(documents)} texts are left out, which are empty")
        label = "glosses:heldout" if bundled else f"{name}:{short_hash(texts)}"
        task = _text_task(context, name, texts, whole=bundled)
        records = context.make(task).records
        nll, tokens, sizes = ([record[key] for record in records] for key in ("nats", "tokens", "bytes"))
        total = _total(nll, tokens, sizes, len(texts))
        code = f"{context.version} {task.settings['windows']}, tokenizer {tokenizer.fingerprint}"
        data = f"{label}, {total.documents} documents, {total.tokens} tokens, {total.bytes} bytes"
        names, floor = _text_names(name), float(tokenizer.vocab_size)
        result.results += [
            Result.of(names[0], total.perplexity, "lower", code, data, floor=floor),
            Result.of(names[1], total.bits_per_byte, "lower", code, data),
        ]
        each = [math.exp(sum_nll / count) for sum_nll, count in zip(nll, tokens, strict=True)]
        result.examples += [
            Example(f"perplexity {each[n]:.1f}: {records[n]['text']}", group=title)
            for n, title in extremes(each, SHOWN_TEXTS, f"texts of {name}", "perplexity")
        ]
    return result


def _text_task(context: EvalContext, name: str, texts: Sequence[str], whole: bool) -> Task:
    """Return a task that scores texts: whole, EOS included, each within the context; or in windows, without EOS.

    An item is a text, or `PIECE` windows of one; then the text's bytes are shared out by tokens.
    """
    tokenizer = context.pipe.exported.tokenizer
    room = context.pipe.exported.model.config.max_seq_len - 1
    stride = context.options.stride or room
    encoded = [tokenizer.encode(text) for text in texts]
    pieces: list[tuple[int, list[Document]]] = []
    for n, ids in enumerate(encoded):
        documents = [Document([Text(ids)])] if whole else [_given(*window) for window in windows(ids, room, stride)]
        pieces += [(n, documents[start : start + PIECE]) for start in range(0, len(documents), PIECE)]

    def work(numbers: Sequence[int]) -> list[Made]:
        batch = [pieces[number] for number in numbers]
        scores = iter(score(context.pipe.exported, [d for _, documents in batch for d in documents], context.batch))
        made = []
        for n, documents in batch:
            nll = [next(scores).nll for _ in documents]
            tokens, size = sum(map(len, nll)), float(len(texts[n].encode()))
            beginning = texts[n]
            if not whole:
                size *= tokens / len(encoded[n])
                scored = documents[0].parts[-1]
                assert isinstance(scored, Text)
                beginning = tokenizer.decode(scored.ids[:60])
            made.append(Made({"text": beginning, "nats": sum(x.sum() for x in nll), "tokens": tokens, "bytes": size}))
        return made

    overlap = "blocked" if stride == room else f"sliding by {stride}"
    how = "whole documents, EOS counted" if whole else f"{overlap}, {room} tokens"
    settings = {"data": short_hash(list(texts)), "documents": len(texts), "windows": how}
    return Task(GLOSSES if whole else f"text-{name}", settings, len(pieces), work)


TEXT = Metric(
    "text",
    "perplexity and bits per byte on text it never read",
    _check_text,
    _score_text,
    lambda context: [number for name in _named_texts(context) for number in _text_names(name)],
    compared="Chance: every token of the vocabulary as likely as any other.",
)


# --- multiple choice --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A context and its endings; `choices[answer]` is the true one. Each ending begins with its space."""

    context: str
    choices: tuple[str, ...]
    answer: int


def continuation(tokenizer: Tokenizer, context: str, text: str) -> Document:
    """Return a document that scores `text` given `context`.

    The two are encoded together, so that tokens are cut as in running text. A token across the border is scored.
    """
    whole = tokenizer.encode(context + text)
    alone = tokenizer.encode(context)
    shared = next((n for n, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
    return _given(whole[:shared], whole[shared:])


def _score_choice(context: EvalContext) -> MetricResult:
    questions = context.needs_scorer("choice").questions(context.options.count)
    exported = context.pipe.exported

    def work(numbers: Sequence[int]) -> list[Made]:
        batch = [questions[n] for n in numbers]
        documents = [continuation(exported.tokenizer, q.context, text) for q in batch for text in q.choices]
        nll = [scores.nll.sum() for scores in score(exported, documents, context.batch)]
        return [Made({"nats": nll[at * CHOICES : (at + 1) * CHOICES]}) for at in range(len(batch))]

    data = short_hash([[q.context, *q.choices, q.answer] for q in questions])
    nll = np.array([r["nats"] for r in context.make(Task("choice", {"data": data}, len(questions), work)).records])
    sizes = np.array([[len(text.encode()) for text in q.choices] for q in questions])
    answers = np.array([q.answer for q in questions])
    label = f"glosses:heldout, {len(questions)} questions of {CHOICES} endings, {data}"
    results = []
    for name, scores, unit in (("acc", nll, ""), ("acc_norm", nll / sizes, " per byte")):
        code = f"{context.version}, log-probability{unit}"
        right = share(scores.argmin(1) == answers)
        results.append(Result.of(name, right, "higher", code, label, floor=1 / CHOICES, ceiling=1.0))
    chosen = (nll / sizes).argmin(1)
    title = first_of(len(questions), SHOWN_QUESTIONS, "questions")
    examples = [
        Example(q.context, marks=[(q.choices[q.answer], bool(at == q.answer), q.choices[at])], group=title)
        for q, at in zip(questions[:SHOWN_QUESTIONS], chosen, strict=False)
    ]
    return MetricResult(results, examples)


CHOICE = Metric(
    "choice",
    "the true ending of a definition among four",
    lambda context: context.needs_scorer("choice"),
    _score_choice,
    lambda context: ("acc", "acc_norm"),
    compared="Chance: one of the endings at random. Reference: every answer right.",
)


# --- lm-evaluation-harness --------------------------------------------------------------------------------------------


def harness_model(pipe: TransfusionPipeline, batch: int = 32) -> Any:
    """Return the model as an `lm_eval.api.model.LM`. Contexts that are too long lose their beginning."""
    from lm_eval.api.model import LM

    exported = pipe.exported
    room = exported.model.config.max_seq_len - 1  # BOS takes one

    class TransfusionLM(LM):
        """Log-likelihoods and greedy text of one model, `batch` requests at a time."""

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            documents = []
            for request in requests:
                parts = continuation(exported.tokenizer, *request.args).parts
                context, ending = (part.ids for part in parts if isinstance(part, Text))
                left = room - len(ending)  # the continuation stays whole if it fits
                documents.append(_given(context[-left:] if left > 0 else (), ending[:room]))
            return [(-float(s.nll.sum()), bool(s.is_argmax.all())) for s in score(exported, documents, batch)]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                documents = [_given(*w) for w in full_windows(exported.tokenizer.encode(request.args[0]), room)]
                sums.append(-sum(float(scores.nll.sum()) for scores in score(exported, documents, batch)))
            return sums

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(requests), batch):
                arguments = [request.args for request in requests[start : start + batch]]
                replies = pipe.replies([self.request(*pair) for pair in arguments])
                for reply, (_, settings) in zip(replies, arguments, strict=True):
                    text, stops = reply.text, settings.get("until") or ()
                    for stop in [stops] if isinstance(stops, str) else stops:
                        text = text.split(stop)[0] if stop else text
                    texts.append(text)
            return texts

        def request(self, context: str, settings: dict[str, Any]) -> Any:
            most, ids = int(settings.get("max_gen_toks", MAX_TOKENS)), exported.tokenizer.encode(context)
            kept = min(
                len(ids), max(room - most, room // 2)
            )  # a context keeps half of the room, however much is asked for
            return replace(
                pipe.request([]),
                document=Document([Text(ids[len(ids) - kept :])], closed=False),
                draw="never",
                max_tokens=min(most, room - kept),
                temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
            )

        @property
        def tokenizer_name(self) -> str:
            return f"transfuse-{exported.tokenizer.fingerprint}"

    return TransfusionLM()


def full_windows(tokens: Tokens, room: int) -> list[tuple[Tokens, Tokens]]:
    """Return (context, tokens to score): blocks of `room`, the last one with as much context as fits."""
    cut = list(windows(tokens, room, room))
    start = room * (len(cut) - 1)
    return [*cut[:-1], (tokens[max(0, len(tokens) - room) : start], cut[-1][1])]


def _task_manager(context: EvalContext) -> Any:
    """Return the harness's tasks and those of `--tasks-folder`; it downloads nothing from now on."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from lm_eval.tasks import TaskManager

    folder = context.options.tasks_folder
    return TaskManager(include_path=None if folder is None else str(folder))


def _check_harness(context: EvalContext) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"harness: expected the package lm_eval, found none; {install_command('eval')}")
    folder = context.options.tasks_folder
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder: expected a folder of lm-evaluation-harness's task files, found no {folder}")
    known = set(_task_manager(context).all_tasks)
    for task in context.options.tasks or LLAMA_SUITE:
        if task not in known:
            raise UserError(f"--tasks: expected tasks of lm-evaluation-harness, or files for them, found {task}")


def _score_harness(context: EvalContext) -> MetricResult:
    """Return both accuracies where a task has both: the paper does not say whether it divides by length."""
    import lm_eval

    tasks = list(context.options.tasks or LLAMA_SUITE)
    logger.info(f"harness: {', '.join(tasks)}")
    try:
        output = lm_eval.simple_evaluate(
            model=harness_model(context.pipe, context.batch),
            tasks=tasks,
            num_fewshot=0,
            task_manager=_task_manager(context),
            bootstrap_iters=0,
            log_samples=True,
        )
    except (OSError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"harness: expected the tasks' data sets on this machine, found none ({reason})") from None
    code = f"lm_eval {lm_eval.__version__}, {context.version}, 0-shot"
    results = []
    by_name: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for task in tasks:
        scores, samples = output["results"][task], output["samples"][task]
        digest = short_hash([str(sample["doc"]) for sample in samples])
        data = f"{task} version {output['versions'].get(task)}, {len(samples)} questions, {digest}"
        for name in [name for name in by_name if f"{name},none" in scores]:
            right = share([sample[name] for sample in samples])
            by_name[name].append(right.value)
            results.append(Result.of(f"{task} {name}", right, "higher", code, data, ceiling=1.0))
    for name, values in by_name.items():
        if values:
            mean = float(np.mean(values))
            results.append(Result(f"mean {name}", mean, None, None, len(values), "higher", code, ", ".join(tasks)))
    return MetricResult(results)


def _harness_names(context: EvalContext) -> list[str]:
    """Return both names of each task: only the task's file knows which it has."""
    tasks = (*(context.options.tasks or LLAMA_SUITE), "mean")
    return [f"{task} {name}" for task in tasks for name in ("acc", "acc_norm")]


HARNESS = Metric(
    "harness",
    "the Llama suite through lm-evaluation-harness",
    _check_harness,
    _score_harness,
    _harness_names,
    compared="Reference: every answer right.",
)
