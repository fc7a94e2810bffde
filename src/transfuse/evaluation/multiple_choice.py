"""Ranked choice: which of four endings does the model find likeliest? A task that comes with the package.

The beginning of a definition it never read, and its second half among those of three other words: of like length, so
that length does not tell. Right by the sum of log-probabilities ("acc"), and by the same per byte ("acc_norm"), as in
the tasks of the Llama suite (Transfusion section 4.1), which `harness` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emoji_scenes import glosses
from emoji_scenes.draws import Draws

from ..inference import foretell
from ..sequence import Document, Text, Tokenizer
from .bench import EvalContext, Metric
from .confidence import share
from .generate import Made, Task, short_hash
from .result import Example, MetricResult, Result, first_of

CHOICES = 4
NEIGHBOURS = 12
"""endings nearest in length, of which the wrong ones are drawn"""
SHORTEST = 6
"""words of a definition that is cut in two"""
SHOWN = 12
NAMES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Question:
    """choices[answer] is the true ending; each begins with its space."""

    context: str
    choices: tuple[str, ...]
    answer: int


def definition_questions(count: int, seed: int = 0) -> list[Question]:
    """`count` questions of held-out definitions, or as many as there are: a function of its arguments."""
    halves = []
    for line in glosses("heldout"):
        words = line.split()
        if len(words) >= SHORTEST + 1:
            cut = 1 + len(words) // 2
            halves.append((" ".join(words[:cut]), " " + " ".join(words[cut:])))
    by_length = sorted(range(len(halves)), key=lambda n: (len(halves[n][1]), n))
    place = {number: at for at, number in enumerate(by_length)}
    found = []
    for number in range(min(count, len(halves))):
        draws = Draws("choice", seed, number)
        start = max(0, min(place[number] - NEIGHBOURS // 2, len(halves) - NEIGHBOURS - 1))
        context, ending = halves[number]
        near = [halves[n][1] for n in by_length[start : start + NEIGHBOURS + 1] if halves[n][1] != ending]
        wrong: list[str] = []
        while len(wrong) < CHOICES - 1:
            picked = draws.pick(near)
            wrong += [picked] if picked not in wrong else []
        answer = draws.below(CHOICES)
        found.append(Question(context, (*wrong[:answer], ending, *wrong[answer:]), answer))
    return found


def continuation(tokenizer: Tokenizer, context: str, text: str) -> Document:
    """A document in which `text` is foretold from `context`. The two are encoded together, so that a token may not
    be cut otherwise than in running text; one that lies across the border counts as foretold."""
    whole = tokenizer.encode(context + text)
    alone = tokenizer.encode(context)
    known = next((n for n, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), len(alone))
    return Document([Text(whole[:known], predict=False), Text(whole[known:])], closed=False)


def _score(bench: EvalContext) -> MetricResult:
    questions = definition_questions(bench.options.count)
    exported = bench.pipe.exported

    def work(numbers: Sequence[int]) -> list[Made]:
        asked = [questions[n] for n in numbers]
        documents = [continuation(exported.tokenizer, q.context, text) for q in asked for text in q.choices]
        nats = [one.nats.sum() for one in foretell(exported, documents, bench.batch)]
        return [Made({"nats": nats[at * CHOICES : (at + 1) * CHOICES]}) for at in range(len(asked))]

    data = short_hash([[q.context, *q.choices, q.answer] for q in questions])
    task = Task("choice", {"data": data}, len(questions), work)
    nats = np.array([record["nats"] for record in bench.make(task).records])
    sizes = np.array([[len(text.encode()) for text in q.choices] for q in questions])
    answers = np.array([q.answer for q in questions])
    label = f"glosses:heldout, {len(questions)} questions of {CHOICES} endings, {data}"
    results = []
    for name, scores, per in zip(NAMES, (nats, nats / sizes), ("", " per byte"), strict=True):
        right = scores.argmin(1) == answers
        said = f"{bench.version}, log-probability{per}"
        results.append(Result.of(name, share(right), "higher", said, label, floor=1 / CHOICES, ceiling=1.0))
    chosen = (nats / sizes).argmin(1)
    exhibits = [
        Example(
            q.context,
            marks=[(q.choices[q.answer], bool(at == q.answer), q.choices[at])],
            group=first_of(len(questions), SHOWN, "questions"),
        )
        for q, at in zip(questions[:SHOWN], chosen, strict=False)
    ]
    return MetricResult(results, exhibits)


ABOUT = "the true ending of a definition among four"
COMPARED = "Chance: one of the endings at random. Reference: every answer right."
CHOICE = Metric("choice", ABOUT, lambda bench: None, _score, lambda bench: NAMES, compared=COMPARED)
