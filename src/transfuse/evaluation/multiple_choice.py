"""Multiple choice by likelihood: which of four endings is most probable under the model?

The questions come from the data set's scorer. A question is right by the sum of log-probabilities ("acc") and by the
same per byte ("acc_norm"), as in the tasks of the Llama suite (Transfusion section 4.1), which `harness` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..inference import score
from ..sequence import Document, Text, Tokenizer
from .confidence import share
from .context import EvalContext, Example, Metric, MetricResult, Result, first_of
from .generate import Made, Task, short_hash

CHOICES = 4
SHOWN = 12
NAMES = ("acc", "acc_norm")


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
    return Document([Text(whole[:shared], predict=False), Text(whole[shared:])], closed=False)


def _score(context: EvalContext) -> MetricResult:
    questions = context.needs_scorer("choice").questions(context.options.count)
    exported = context.pipe.exported

    def work(numbers: Sequence[int]) -> list[Made]:
        batch = [questions[n] for n in numbers]
        documents = [continuation(exported.tokenizer, q.context, text) for q in batch for text in q.choices]
        nll = [scores.nll.sum() for scores in score(exported, documents, context.batch)]
        return [Made({"nats": nll[at * CHOICES : (at + 1) * CHOICES]}) for at in range(len(batch))]

    data = short_hash([[q.context, *q.choices, q.answer] for q in questions])
    task = Task("choice", {"data": data}, len(questions), work)
    nll = np.array([record["nats"] for record in context.make(task).records])
    sizes = np.array([[len(text.encode()) for text in q.choices] for q in questions])
    answers = np.array([q.answer for q in questions])
    label = f"glosses:heldout, {len(questions)} questions of {CHOICES} endings, {data}"
    results = []
    for name, scores, unit in zip(NAMES, (nll, nll / sizes), ("", " per byte"), strict=True):
        right = share(scores.argmin(1) == answers)
        implementation = f"{context.version}, log-probability{unit}"
        results.append(Result.of(name, right, "higher", implementation, label, floor=1 / CHOICES, ceiling=1.0))
    chosen = (nll / sizes).argmin(1)
    title = first_of(len(questions), SHOWN, "questions")
    examples = [
        Example(q.context, marks=[(q.choices[q.answer], bool(at == q.answer), q.choices[at])], group=title)
        for q, at in zip(questions[:SHOWN], chosen, strict=False)
    ]
    return MetricResult(results, examples)


CHOICE = Metric(
    "choice",
    "the true ending of a definition among four",
    lambda context: context.needs_scorer("choice"),
    _score,
    lambda context: NAMES,
    compared="Chance: one of the endings at random. Reference: every answer right.",
)
