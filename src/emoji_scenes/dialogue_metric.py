"""The metric `dialogues` of `transfuse evaluate`: held-out conversations, in which the model hears its own replies.

A turn is right if it does what was asked for, by an exact rule:

    draw       an image comes, with the things asked for, each as often, on the background that was named
    change     an image comes; by the scores of edits its objects are right and the instruction is obeyed
    question   words alone, which give the exact answer
    unknown    words alone, which say that it cannot
    other      words alone, one of the replies to greetings, thanks or farewells, or what it can do, with things it has

Images are judged by the scene detector, whose verdicts on the real scenes are the reference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, permutations

import numpy as np

from transfuse.evaluation.confidence import share
from transfuse.evaluation.context import EvalContext, Example, Metric, MetricResult, Result, first_of
from transfuse.evaluation.generate import short_hash
from transfuse.inference import Reply
from transfuse.inference.conversation import Turns, fitting

from .dialogues import CAN, SMALL_TALK, Turn, dialogue
from .language import colours_in, listed, nouns_in
from .metrics import nouns_of, obeyed
from .nouns import background_of
from .scene_detector import Seen
from .scenes import World
from .scorer import scene_scorer

KINDS = ("draw", "change", "question", "unknown", "other")
SHOWN = 10  # conversations shown whole, the first ones in order
TURNS = (6, 10)  # fewest and most turns of a conversation
ABLE = re.compile(re.escape(CAN).replace(re.escape("{known}"), "[A-Za-z ,-]+"))
CANNOT = re.compile(r"\b(can ?not|can\'t|never|sorry|unable|don\'t know)\b", re.IGNORECASE)


def is_right(turn: Turn, words: str, image: np.ndarray | None, seen: Sequence[Seen]) -> bool:
    """Return whether a reply of words and at most one image uint8 `[row, column, 3]` is right for a turn."""
    if (image is None) != (turn.scene is None):
        return False
    if turn.scene is not None and image is not None:
        if Counter(thing.noun for thing in seen) != nouns_of(turn.scene):
            return False
        if turn.change is not None:
            return obeyed(turn.change, seen, image)
        named = colours_in(turn.request) or colours_in(words)
        return not named or background_of(image) in named
    words = words.strip()
    if turn.kind == "question":
        plain = re.sub(r"[^a-z ]", "", words.lower()).split()
        # The things of an image may be listed in any order.
        orders = permutations(re.split(", | and ", turn.answer.lower()))
        answers = [re.sub(r"[^a-z ]", "", listed(list(order))).split() for order in orders]
        matches = (plain[at : at + len(answer)] == answer for answer in answers for at in range(len(plain)))
        return any(matches) and len(plain) < 12
    if turn.kind == "unknown":
        return bool(CANNOT.search(words))
    if turn.kind == "ability":
        return bool(ABLE.fullmatch(words)) and bool(nouns_in(words))
    return words in SMALL_TALK[turn.kind][1]


def replay(context: EvalContext, dialogues: Sequence[Sequence[Turn]], world: World) -> list[list[Reply]]:
    """Return the model's reply to every turn, after the turns before it with its own replies; all dialogues at once.

    As in a `Conversation`, the oldest turns are forgotten where all would not fit.
    """
    pipe, drawing = context.pipe, context.drawing
    heard: list[Turns] = [[] for _ in dialogues]
    replies: list[list[Reply]] = [[] for _ in dialogues]
    for step in range(max(map(len, dialogues))):
        going = [number for number, turns in enumerate(dialogues) if step < len(turns)]
        messages, requests = [], []
        for number in going:
            turn = dialogues[number][step]
            shown = [] if turn.shown is None else [world.render(turn.shown)]
            messages.append(pipe.message("user", [*shown, turn.request]))
            request = pipe.request([], drawing.steps, drawing.guidance_scale, drawing.sampler)
            document, _ = fitting(pipe, [], heard[number], messages[-1])
            requests.append(replace(request, document=document, seed=drawing.seed + 1000 * number + step))
        for number, message, reply in zip(going, messages, pipe.replies(requests), strict=True):
            heard[number].append((message, pipe.message("assistant", reply.parts)))
            replies[number].append(reply)
    return replies


def _score(context: EvalContext) -> MetricResult:
    scorer = scene_scorer(context, "dialogues")
    config = replace(scorer.world, size=context.pipe.exported.image_size, split="heldout")
    world = World(config)
    dialogues = [dialogue(world, index, TURNS) for index in range(context.options.count)]
    detector = scorer.detector(context.folder, context.options.judge_steps)
    label = f"world dialogues:{config.size}, {len(dialogues)}, ids {short_hash([repr(turns) for turns in dialogues])}"
    implementation = f"{context.version}, detector@{detector.digest}"
    verdicts: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    real: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    examples: list[Example] = []
    for number, (turns, replies) in enumerate(zip(dialogues, replay(context, dialogues, world), strict=True)):
        for turn, reply in zip(turns, replies, strict=True):
            kind = turn.kind if turn.kind in KINDS else "other"
            image = np.asarray(reply.images[0]) if reply.images else None
            right = is_right(turn, reply.text, image, [] if image is None else detector(image[None])[0])
            verdicts[kind].append(right)
            exact = None if turn.scene is None else world.render(turn.scene)
            exactly = [] if exact is None else detector(exact[None])[0]
            real[kind].append(is_right(turn, turn.reply, exact, exactly))
            if number < SHOWN:
                pictures = [] if turn.shown is None else [(world.render(turn.shown), "shown")]
                pictures += [] if image is None else [(image, "drawn")]
                pictures += [] if exact is None else [(exact, "as asked for")]
                group = first_of(len(dialogues), SHOWN, "conversations")
                examples.append(
                    Example(f"{turn.request} -> {reply.text.strip()}", pictures, [(turn.kind, right, "")], group)
                )
    every = [("turns right", [*chain(*verdicts.values())], [*chain(*real.values())])]
    every += [(f"turns right: {kind}", verdicts[kind], real[kind]) for kind in KINDS if verdicts[kind]]
    results = [
        Result.of(name, share(np.array(right)), "higher", implementation, label, ceiling=float(np.mean(reference)))
        for name, right, reference in every
    ]
    return MetricResult(results, examples)


DIALOGUES = Metric(
    "dialogues",
    "held-out conversations, turn by turn, after the model's own replies",
    lambda context: scene_scorer(context, "dialogues"),
    _score,
    lambda context: ["turns right", *(f"turns right: {kind}" for kind in KINDS)],
    True,
    "Reference: the exact replies and the real scenes, by the same judge.",
)
