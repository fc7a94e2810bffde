"""Does a drawing show what was composed? GenEval's six tasks (Ghosh et al. 2023), asked of the bundled world.

    single object    the thing is there
    two objects      both things are there
    counting         it is there as often as was said, no more
    colours          the thing is there and the background has the colour (things here have colours of their own)
    position         both are there, the one left of, right of, above or below the other
    attributes       both are there, and the one that was called large is clearly larger than the small one

Beside them, of the same drawings: the background's colour alone.

The overall score is the mean of the tasks, as GenEval has it. Each task is asked of combinations that training shows
and of held-out ones, apart. The judge is a detector with errors of its own, so its verdict on the real pictures stands
beside (the reference), and on real pictures of other prompts (chance). "Corrected" is the share that would be right if
the judge made no errors, `(share - chance) / (reference - chance)` (Rogan & Gladen 1978); its interval holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from emoji_scenes import Scene, World, WorldConfig, background_of, caption

from ..errors import UserError
from .bench import EvalContext, Metric
from .confidence import CORRECTED, Estimate, corrected, share
from .detector import Detect, Detector, Seen
from .drawing import draw_task
from .generate import short_hash
from .result import Example, MetricResult, Result, first_of

LARGER = 1.25
"""a side that is so many times another is clearly larger; large things of the world are 1.6 times small ones or more"""
SEED_OFFSET = 3_000_017
"""keeps scenes of combinations seen in training apart from the scenes of training"""
TRIED = 80
"""scenes looked through for each that is wanted of a task; the rarest, attributes, is one in about forty"""
JUDGED = 60
"""real pictures of each task, or more, on which the judge's own errors are measured"""
SPLITS = {"train": "seen", "heldout": "held out"}
SHOWN = 4
"""drawings shown of each task and split"""


def _present(seen: Sequence[Seen], noun: str) -> list[Seen]:
    return [one for one in seen if one.noun == noun]


def _single(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return all(_present(seen, thing.noun) for thing in scene.things)


def _counted(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return all(len(_present(seen, thing.noun)) == thing.count for thing in scene.things)


def _coloured(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return _single(scene, seen, image) and background_of(image) == scene.background


def _placed(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    """The surest of each noun counts. Clear of each other along the direction, which is the larger difference."""
    first, second = ([*_present(seen, thing.noun), None][0] for thing in scene.things)
    if first is None or second is None:
        return False
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return scene.relation == ("left of" if across < 0 else "right of")
    return scene.relation == ("above" if down < 0 else "below")


def _sized(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    large, small = sorted(scene.things, key=lambda thing: thing.size != "large")
    sides = [[one.side for one in _present(seen, thing.noun)][:1] for thing in (large, small)]
    return all(sides) and sides[0][0] >= LARGER * sides[1][0]


@dataclass(frozen=True)
class Ask:
    """A task: which scenes suit it, and when a picture is right."""

    name: str
    suits: Callable[[Scene], bool]
    right: Callable[[Scene, Sequence[Seen], np.ndarray], bool]


def _sizes(scene: Scene) -> set[str]:
    return {thing.size for thing in scene.things}


ASKS: tuple[Ask, ...] = (
    Ask("single object", lambda scene: scene.kind == "one", _single),
    Ask("two objects", lambda scene: scene.kind == "pair", _single),
    Ask("counting", lambda scene: scene.kind == "copies", _counted),
    Ask("colours", lambda scene: scene.kind == "one", _coloured),
    Ask("position", lambda scene: scene.kind == "pair" and scene.relation != "next to", _placed),
    Ask("attributes", lambda scene: scene.kind == "pair" and _sizes(scene) == {"large", "small"}, _sized),
)


@dataclass(frozen=True, eq=False)
class Asked:
    """A task's scenes, what was asked for in words, and the real pictures uint8 `[row, column, 3]`."""

    ask: Ask
    split: str
    scenes: list[Scene]
    prompts: list[str]
    real: np.ndarray


def composed(config: WorldConfig, split: Any, count: int) -> list[Asked]:
    """`count` scenes of each task, of combinations that training shows ("train") or not ("heldout").

    The world's nouns, styles and colours in scenes of every kind, whatever kinds that world itself shows; single things
    keep its sizes. Raises UserError where so many are not found.
    """
    wide = replace(config, split=split, kinds=None, max_objects=3, max_count=4, seed=config.seed + SEED_OFFSET)
    world = World(wide)
    drawn = [world.scene(index) for index in range(TRIED * count)]
    found = []
    for number, ask in enumerate(ASKS):
        # Single objects and colours ask about the same kind of scene: each takes others.
        suited = [(index, scene) for index, scene in enumerate(drawn) if index % 2 == number % 2 and ask.suits(scene)]
        chosen = suited[:count]
        if len(chosen) < count:
            raise UserError(f"composition: {ask.name}: expected {count} scenes of the world, found {len(chosen)}")
        prompts = [caption(scene, index) for index, scene in chosen]
        scenes = [scene for _, scene in chosen]
        found.append(Asked(ask, split, scenes, prompts, np.stack([world.render(scene) for scene in scenes])))
    return found


def verdicts(asked: Asked, images: np.ndarray, detector: Detect) -> tuple[np.ndarray, list[list[Seen]]]:
    """Which of the pictures, of its first prompts, are right, bool `[picture]`, and what was seen in each."""
    seen = detector(images)
    triples = zip(asked.scenes[: len(images)], seen, images, strict=True)
    return np.array([asked.ask.right(scene, some, image) for scene, some, image in triples]), seen


def other_pictures(asked: Asked) -> np.ndarray:
    """For each prompt the real picture of another: what a painter of good scenes who ignores the prompt would draw."""
    return np.roll(asked.real, max(1, len(asked.real) // 2), axis=0)


# --- as a measure -----------------------------------------------------------------------------------------------------


def _asked(bench: EvalContext, split: str) -> tuple[int, list[Asked]]:
    """How many prompts of each task are drawn, and the scenes, of which the judge sees more."""
    each = max(2, bench.options.count // len(ASKS))
    config = replace(bench.world, size=bench.pipe.exported.image_size)
    return each, composed(config, split, max(each, JUDGED))


def _check(bench: EvalContext) -> None:
    for split in SPLITS:
        _asked(bench, split)


def _numbers(bench: EvalContext) -> list[str]:
    return [
        title
        for name in SPLITS.values()
        for title in (
            *(f"{ask.name}, {name}{more}" for ask in ASKS for more in ("", CORRECTED)),
            f"background, {name}",
            f"overall, {name}",
            f"overall, {name}{CORRECTED}",
        )
    ]


def _score(bench: EvalContext) -> MetricResult:
    detector = bench.detector()
    findings = MetricResult([])
    for split, name in SPLITS.items():
        each, asked = _asked(bench, split)
        prompts = [prompt for one in asked for prompt in one.prompts[:each]]
        ids = [f"{one.ask.name}:{n}" for one in asked for n in range(len(one.prompts[:each]))]
        label = f"world:{split}:{bench.pipe.exported.image_size}, {len(ids)} prompts, ids {short_hash([ids, prompts])}"
        drawn = bench.make(draw_task(bench, f"composition-{split}", label, ids, prompts))
        _judge(findings, bench, name, label, asked, np.split(drawn.images(), len(asked)), detector)
    findings.tables["the detector's confusion, on scenes of its own"] = _confusion(detector)
    return findings


def _judge(
    findings: MetricResult,
    bench: EvalContext,
    name: str,
    label: str,
    asked: Sequence[Asked],
    drawn: Sequence[np.ndarray],
    detector: Detector,
) -> None:
    """Add the results of one split, task by task, and over all tasks."""
    said = f"{bench.version}, {_judge_said(detector)}"
    by_task: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for one, some in zip(asked, drawn, strict=True):
        right, seen = verdicts(one, some, detector)
        real, other = verdicts(one, one.real, detector)[0], verdicts(one, other_pictures(one), detector)[0]
        by_task.append((right, real, other))
        bounds: dict[str, Any] = {"floor": float(other.mean()), "ceiling": float(real.mean())}
        title = f"{one.ask.name}, {name}"
        findings.results.append(Result.of(title, share(right), "higher", said, label, **bounds))
        fixed = corrected(by_task[-1])
        findings.results.append(Result.of(f"{title}{CORRECTED}", fixed, "higher", said, label, floor=0.0, ceiling=1.0))
        findings.exhibits += [
            Example(
                one.prompts[n],
                [(some[n], "drawn"), (one.real[n], "real")],
                [_mark(one, n, right, seen)],
                first_of(len(right), SHOWN, f"drawings of {title}"),
            )
            for n in range(min(SHOWN, len(right)))
        ]
    grounds = [_grounds(asked, images) for images in (drawn, [one.real for one in asked], map(other_pictures, asked))]
    bounds = {"ceiling": float(grounds[1].mean()), "floor": float(grounds[2].mean())}
    findings.results.append(
        Result.of(f"background, {name}", share(grounds[0]), "higher", bench.version, label, **bounds)
    )
    overall = _overall([right for right, _, _ in by_task])
    bounds = {key: float(np.mean([part[at].mean() for part in by_task])) for key, at in (("ceiling", 1), ("floor", 2))}
    findings.results.append(Result.of(f"overall, {name}", overall, "higher", said, label, **bounds))
    fixed = corrected(*by_task)
    findings.results.append(
        Result.of(f"overall, {name}{CORRECTED}", fixed, "higher", said, label, floor=0.0, ceiling=1.0)
    )


def _grounds(asked: Sequence[Asked], images: Iterable[np.ndarray]) -> np.ndarray:
    """Whether the background has its colour, bool `[picture]`, of the pictures of all tasks. No judge is needed."""
    pairs = [pair for one, some in zip(asked, images, strict=True) for pair in zip(one.scenes, some, strict=False)]
    return np.array([background_of(image) == scene.background for scene, image in pairs])


def _overall(tasks: Sequence[np.ndarray]) -> Estimate:
    """The mean of the tasks' shares, with the interval of independent tasks."""
    value = float(np.mean([right.mean() for right in tasks]))
    # A task in which all agree still has a variance: that of half an item on each side.
    shares = [(right.sum() + 0.5) / (len(right) + 1) for right in tasks]
    variance = sum(p * (1 - p) / len(right) for p, right in zip(shares, tasks, strict=True)) / len(tasks) ** 2
    margin = 1.96 * float(np.sqrt(variance))
    count = sum(len(right) for right in tasks)
    return Estimate(value, max(0.0, value - margin), min(1.0, value + margin), count)


def _mark(one: Asked, n: int, right: np.ndarray, seen: list[list[Seen]]) -> tuple[str, bool, str]:
    found = ", ".join(f"{some.noun} ({some.x:.2f}, {some.y:.2f}, side {some.side:.2f})" for some in seen[n])
    return one.ask.name, bool(right[n]), found or "nothing"


def _judge_said(detector: Detector) -> str:
    return f"detector@{detector.digest} ({100 * detector.accuracy['named']:.1f} % of things found and rightly named)"


def _confusion(detector: Detector) -> list[list[Any]]:
    """Mistakes, the most frequent first, after the head."""
    mistakes = sorted(((pair, n) for pair, n in detector.confusion.items() if pair[0] != pair[1]), key=lambda m: -m[1])
    rows: list[list[Any]] = [["what it is", "taken for", "times", "of"]]
    for (truth, taken), times in mistakes:
        total = sum(n for (other, _), n in detector.confusion.items() if other == truth)
        rows.append([truth, taken, times, "" if truth == "nothing" else total])
    return rows


ABOUT = "GenEval's six tasks on the bundled world"
COMPARED = (
    "Chance: the judge's verdict on real pictures of other prompts. Reference: its verdict on the real pictures, which "
    "a model can pass where the judge errs. Where its errors are taken out the two are 0 and 1."
)
COMPOSITION = Metric("composition", ABOUT, _check, _score, _numbers, True, COMPARED)
