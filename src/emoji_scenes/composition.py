"""Composition: GenEval's six tasks (Ghosh et al. 2023) on emoji scenes.

    single object    the thing is present
    two objects      both things are present
    counting         the thing is present exactly as often as the prompt says
    colours          the thing is present and the background has the colour (things here have fixed colours)
    position         both are present, one left of, right of, above or below the other
    attributes       both are present, and the large one is clearly larger than the small one

The background's colour alone is scored on the same drawings, and the mean over tasks is GenEval's overall score. Each
task uses combinations from training and held-out ones, separately. The judge is a detector with errors, so its verdicts
on real images (reference) and on real images of other prompts (chance) are given. "Corrected" is the share that would
be right without its errors, `(share - chance) / (reference - chance)` (Rogan & Gladen 1978), and so is its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from transfuse.errors import UserError
from transfuse.evaluation.confidence import CORRECTED, Estimate, corrected, share
from transfuse.evaluation.context import EvalContext, Example, Metric, MetricResult, Result, first_of
from transfuse.evaluation.generate import short_hash
from transfuse.evaluation.image_quality import draw_prompts

from .detector import Detect, Detector, Seen
from .language import caption
from .palette import background_of
from .scenes import Scene, World, WorldConfig
from .scorer import scene_scorer

LARGER = 1.25
"""Ratio of sides from which a thing is clearly larger; large things are 1.6 times small ones or more."""
SEED_OFFSET = 3_000_017
"""Keeps the scenes of training combinations apart from the scenes of training."""
TRIED = 80
"""Scenes searched per scene wanted; the rarest task, attributes, suits about one in forty."""
JUDGED = 60
"""Fewest real images per task on which the detector's errors are measured."""
SPLITS = {"train": "seen", "heldout": "held out"}
SHOWN = 4
"""Drawings shown per task and split."""

Verdict = Callable[[Scene, Sequence[Seen], np.ndarray], bool]
"""Whether an image uint8 `[row, column, 3]`, with what was seen in it, shows the scene."""


def _present(seen: Sequence[Seen], noun: str) -> list[Seen]:
    return [thing for thing in seen if thing.noun == noun]


def _all_present(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return all(_present(seen, thing.noun) for thing in scene.things)


def _counts_right(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return all(len(_present(seen, thing.noun)) == thing.count for thing in scene.things)


def _colour_right(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    return _all_present(scene, seen, image) and background_of(image) == scene.background


def _position_right(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    """Compare the most confident detections of both nouns, along the direction in which they differ most."""
    first, second = ([*_present(seen, thing.noun), None][0] for thing in scene.things)
    if first is None or second is None:
        return False
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return scene.relation == ("left of" if across < 0 else "right of")
    return scene.relation == ("above" if down < 0 else "below")


def _sizes_right(scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    large, small = sorted(scene.things, key=lambda thing: thing.size != "large")
    sides = [[detection.side for detection in _present(seen, thing.noun)][:1] for thing in (large, small)]
    return all(sides) and sides[0][0] >= LARGER * sides[1][0]


@dataclass(frozen=True)
class Ask:
    """A task: the scenes that suit it, and when an image is right."""

    name: str
    suits: Callable[[Scene], bool]
    right: Verdict


def _large_and_small(scene: Scene) -> bool:
    return scene.kind == "pair" and {thing.size for thing in scene.things} == {"large", "small"}


ASKS: tuple[Ask, ...] = (
    Ask("single object", lambda scene: scene.kind == "one", _all_present),
    Ask("two objects", lambda scene: scene.kind == "pair", _all_present),
    Ask("counting", lambda scene: scene.kind == "copies", _counts_right),
    Ask("colours", lambda scene: scene.kind == "one", _colour_right),
    Ask("position", lambda scene: scene.kind == "pair" and scene.relation != "next to", _position_right),
    Ask("attributes", _large_and_small, _sizes_right),
)


@dataclass(frozen=True, eq=False)
class Asked:
    """The scenes of a task, their prompts, and the real images uint8 `[image, row, column, 3]`."""

    ask: Ask
    split: str
    scenes: list[Scene]
    prompts: list[str]
    real: np.ndarray


def composed(config: WorldConfig, split: Any, count: int) -> list[Asked]:
    """Return `count` scenes of each task, of combinations shown in training ("train") or not ("heldout").

    Uses the nouns, styles and colours of `config` in scenes of every kind; single things keep its sizes.
    Raises UserError where too few scenes suit a task.
    """
    wide = replace(config, split=split, kinds=None, max_objects=3, max_count=4, seed=config.seed + SEED_OFFSET)
    world = World(wide)
    candidates = [world.scene(index) for index in range(TRIED * count)]
    tasks = []
    for number, ask in enumerate(ASKS):
        # "single object" and "colours" suit the same scenes: each takes every other one.
        suited = [(n, scene) for n, scene in enumerate(candidates) if n % 2 == number % 2 and ask.suits(scene)][:count]
        if len(suited) < count:
            raise UserError(f"composition: {ask.name}: expected {count} scenes of the world, found {len(suited)}")
        prompts = [caption(scene, index) for index, scene in suited]
        scenes = [scene for _, scene in suited]
        tasks.append(Asked(ask, split, scenes, prompts, np.stack([world.render(scene) for scene in scenes])))
    return tasks


def verdicts(task: Asked, images: np.ndarray, detector: Detect) -> tuple[np.ndarray, list[list[Seen]]]:
    """Judge images of the first prompts: bool `[image]`, and what was seen in each."""
    seen = detector(images)
    triples = zip(task.scenes[: len(images)], seen, images, strict=True)
    return np.array([task.ask.right(scene, things, image) for scene, things, image in triples]), seen


def other_pictures(task: Asked) -> np.ndarray:
    """Return for each prompt the real image of another: good scenes that ignore the prompt."""
    return np.roll(task.real, max(1, len(task.real) // 2), axis=0)


# --- the metric -------------------------------------------------------------------------------------------------------


def _tasks(context: EvalContext, split: str) -> tuple[int, list[Asked]]:
    """Return the number of prompts drawn per task, and the tasks; the detector judges more real images than that."""
    each = max(2, context.options.count // len(ASKS))
    config = replace(scene_scorer(context, "composition").world, size=context.pipe.exported.image_size)
    return each, composed(config, split, max(each, JUDGED))


def _check(context: EvalContext) -> None:
    for split in SPLITS:
        _tasks(context, split)


def _numbers(context: EvalContext) -> list[str]:
    names = []
    for split in SPLITS.values():
        names += [f"{ask.name}, {split}{more}" for ask in ASKS for more in ("", CORRECTED)]
        names += [f"background, {split}", f"overall, {split}", f"overall, {split}{CORRECTED}"]
    return names


def _score(context: EvalContext) -> MetricResult:
    detector = scene_scorer(context, "composition").detector(context.folder, context.options.judge_steps)
    result = MetricResult([])
    for split, name in SPLITS.items():
        each, tasks = _tasks(context, split)
        prompts = [prompt for task in tasks for prompt in task.prompts[:each]]
        ids = [f"{task.ask.name}:{n}" for task in tasks for n in range(each)]
        size = context.pipe.exported.image_size
        label = f"world:{split}:{size}, {len(ids)} prompts, ids {short_hash([ids, prompts])}"
        drawn = draw_prompts(context, f"composition-{split}", label, ids, prompts)
        images = np.split(drawn.images(), len(tasks))
        _judge_split(result, name, label, context.version, tasks, images, detector)
    result.tables["the detector's confusion, on scenes of its own"] = _confusion(detector)
    return result


def _judge_split(
    result: MetricResult,
    name: str,
    label: str,
    version: str,
    tasks: Sequence[Asked],
    drawn: Sequence[np.ndarray],
    detector: Detector,
) -> None:
    """Add the results of one split: each task, the background, and the mean over tasks."""
    accuracy = f"{100 * detector.accuracy['named']:.1f} % of things found and rightly named"
    judged = f"{version}, detector@{detector.digest} ({accuracy})"

    def add(title: str, value: Estimate, floor: float, ceiling: float, implementation: str = judged) -> None:
        bounds = {"floor": float(floor), "ceiling": float(ceiling)}
        result.results.append(Result.of(title, value, "higher", implementation, label, **bounds))

    by_task: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for task, images in zip(tasks, drawn, strict=True):
        right, seen = verdicts(task, images, detector)
        real, other = verdicts(task, task.real, detector)[0], verdicts(task, other_pictures(task), detector)[0]
        by_task.append((right, real, other))
        title = f"{task.ask.name}, {name}"
        add(title, share(right), other.mean(), real.mean())
        add(f"{title}{CORRECTED}", corrected(by_task[-1]), 0.0, 1.0)
        group = first_of(len(right), SHOWN, f"drawings of {title}")
        for n in range(min(SHOWN, len(right))):
            pictures = [(images[n], "drawn"), (task.real[n], "real")]
            mark = (task.ask.name, bool(right[n]), _described(seen[n]))
            result.exhibits.append(Example(task.prompts[n], pictures, [mark], group))
    sets = (drawn, [task.real for task in tasks], map(other_pictures, tasks))
    grounds = [_backgrounds_right(tasks, images) for images in sets]
    add(f"background, {name}", share(grounds[0]), grounds[2].mean(), grounds[1].mean(), version)
    floor, ceiling = (np.mean([part[at].mean() for part in by_task]) for at in (2, 1))
    add(f"overall, {name}", _overall([right for right, _, _ in by_task]), floor, ceiling)
    add(f"overall, {name}{CORRECTED}", corrected(*by_task), 0.0, 1.0)


def _backgrounds_right(tasks: Sequence[Asked], images: Iterable[np.ndarray]) -> np.ndarray:
    """Return bool `[image]` over all tasks; the background needs no detector."""
    pairs = [pair for task, part in zip(tasks, images, strict=True) for pair in zip(task.scenes, part, strict=False)]
    return np.array([background_of(image) == scene.background for scene, image in pairs])


def _overall(tasks: Sequence[np.ndarray]) -> Estimate:
    """Return the mean of the tasks' shares, with the interval of independent tasks."""
    value = float(np.mean([right.mean() for right in tasks]))
    # Half an item on each side gives a task whose verdicts all agree a variance too.
    shares = [(right.sum() + 0.5) / (len(right) + 1) for right in tasks]
    variance = sum(p * (1 - p) / len(right) for p, right in zip(shares, tasks, strict=True)) / len(tasks) ** 2
    margin = 1.96 * float(np.sqrt(variance))
    count = sum(len(right) for right in tasks)
    return Estimate(value, max(0.0, value - margin), min(1.0, value + margin), count)


def _described(seen: Sequence[Seen]) -> str:
    return (
        ", ".join(f"{thing.noun} ({thing.x:.2f}, {thing.y:.2f}, side {thing.side:.2f})" for thing in seen) or "nothing"
    )


def _confusion(detector: Detector) -> list[list[Any]]:
    """Return the detector's mistakes, the most frequent first, under a header."""
    mistakes = sorted(((pair, n) for pair, n in detector.confusion.items() if pair[0] != pair[1]), key=lambda m: -m[1])
    rows: list[list[Any]] = [["what it is", "taken for", "times", "of"]]
    for (truth, taken), times in mistakes:
        total = sum(n for (other, _), n in detector.confusion.items() if other == truth)
        rows.append([truth, taken, times, "" if truth == "nothing" else total])
    return rows


COMPOSITION = Metric(
    "composition",
    "GenEval's six tasks on the bundled world",
    _check,
    _score,
    _numbers,
    True,
    "Chance: the judge's verdict on real pictures of other prompts. Reference: its verdict on the real pictures, which "
    "a model can pass where the judge errs. Where its errors are taken out the two are 0 and 1.",
)
