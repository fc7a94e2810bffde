"""The metrics that emoji scenes bring to `transfuse evaluate`: composition and edits, judged by a detector.

**Composition**: GenEval's six tasks (Ghosh et al. 2023) on emoji scenes.

    single object    the thing is present
    two objects      both things are present
    counting         the thing is present exactly as often as the prompt says
    colours          the thing is present and the background has the colour (things here have fixed colours)
    position         both are present, one left of, right of, above or below the other
    attributes       both are present, and the large one is clearly larger than the small one

The background's colour alone is scored on the same drawings, and the mean over tasks is GenEval's overall score. Each
task uses combinations from training and held-out ones, separately.

**Editing**: the model sees an image and an instruction, and draws. Edits of emoji scenes have exact targets:

    object right           the drawing has the target's nouns, each as often
    instruction obeyed     what the instruction names is as in the target: a colour, or a thing's place and size
    both
    rest untouched         PSNR in dB of the drawing to the target, where source and target are equal

The detector errs, so its verdicts on real images (reference) and on wrong ones (chance: real images of other prompts,
the unchanged source) are given. "Corrected" is the share that would be right without its errors, `(share - chance) /
(reference - chance)` (Rogan & Gladen 1978), and so is its interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from transfuse.errors import UserError
from transfuse.evaluation.confidence import CORRECTED, Estimate, bootstrap, corrected, share
from transfuse.evaluation.context import EvalContext, Example, Metric, MetricResult, Result, first_of
from transfuse.evaluation.drawings import draw_prompts, drawing_task
from transfuse.evaluation.generate import content_hash, short_hash
from transfuse.evaluation.reconstruction import BEST_PSNR, RANGE

from .editing import Edit, edit
from .language import caption
from .layout import Place
from .nouns import background_of
from .scene_detector import Detect, SceneDetector, Seen
from .scenes import Scene, World, WorldConfig
from .scorer import scene_scorer

LARGER = 1.25  # ratio of sides from which a thing is clearly larger; large things are 1.6 times small ones or more
TASK_SEED_OFFSET, EDIT_SEED_OFFSET = 3_000_017, 5_000_011
"""Keep the scenes of tasks and of edits apart from the scenes of training."""
TRIED = 80  # scenes searched per scene wanted; the rarest task, attributes, suits about one in forty
FEWEST_JUDGED = 60  # fewest real images per task on which the detector's errors are measured
SPLITS = {"train": "seen", "heldout": "held out"}
TASK_EXAMPLES, EDIT_EXAMPLES = 6, 32  # drawings shown per task and split (72 in all), and of edits
LEAST_REST = 0.05  # smallest share of an image that must stay equal for "rest untouched"
NEAR, SIDE_OFF = 0.15, 0.25
"""Most a thing may be off its place, as a share of the frame, and off its side, as a share of it."""
EDIT_SCORES = ("object right", "instruction obeyed", "object right and instruction obeyed")
REST = "rest untouched, masked PSNR in dB"

# --- composition ------------------------------------------------------------------------------------------------------


TASKS: dict[str, Callable[[Scene], bool]] = {
    "single object": lambda scene: scene.kind == "one",
    "two objects": lambda scene: scene.kind == "pair",
    "counting": lambda scene: scene.kind == "copies",
    "colours": lambda scene: scene.kind == "one",
    "position": lambda scene: scene.kind == "pair" and scene.relation != "next to",
    "attributes": lambda scene: scene.kind == "pair" and {t.size for t in scene.things} == {"large", "small"},
}
"""The scenes that suit each task."""


def is_right(task: str, scene: Scene, seen: Sequence[Seen], image: np.ndarray) -> bool:
    """Return whether an image uint8 `[row, column, 3]`, with what was seen in it, is right for a task.

    Of several detections of a noun, places and sizes are those of the most confident one.
    """
    by_noun = {thing.noun: [detection for detection in seen if detection.noun == thing.noun] for thing in scene.things}
    if task == "counting":
        return all(len(by_noun[thing.noun]) == thing.count for thing in scene.things)
    if not all(by_noun.values()):
        return False
    if task == "colours":
        return background_of(image) == scene.background
    if task == "position":  # along the direction in which the two differ most
        first, second = (by_noun[thing.noun][0] for thing in scene.things)
        across, down = first.x - second.x, first.y - second.y
        if abs(across) > abs(down):
            return scene.relation == ("left of" if across < 0 else "right of")
        return scene.relation == ("above" if down < 0 else "below")
    if task == "attributes":
        large, small = sorted(scene.things, key=lambda thing: thing.size != "large")
        return by_noun[large.noun][0].side >= LARGER * by_noun[small.noun][0].side
    return True


@dataclass(frozen=True, eq=False)
class TaskScenes:
    """The scenes of a task, their prompts, and the real images uint8 `[image, row, column, 3]`."""

    task: str
    split: str
    scenes: list[Scene]
    prompts: list[str]
    real: np.ndarray

    @property
    def others(self) -> np.ndarray:
        """The real image of another prompt for each: good scenes that ignore the prompt."""
        return np.roll(self.real, max(1, len(self.real) // 2), axis=0)

    def judge(self, images: np.ndarray, detector: Detect) -> tuple[np.ndarray, list[list[Seen]]]:
        """Judge images of the first prompts: bool `[image]`, and what was seen in each."""
        seen = detector(images)
        triples = zip(self.scenes[: len(images)], seen, images, strict=True)
        return np.array([is_right(self.task, *triple) for triple in triples]), seen


def task_scenes(config: WorldConfig, split: Any, count: int, names: Collection[str] = TASKS) -> list[TaskScenes]:
    """Return `count` scenes of each named task, of combinations shown in training ("train") or not ("heldout").

    Uses the nouns, styles and colours of `config` in scenes of every kind; single things keep its sizes.
    Raises UserError where too few scenes suit a task.
    """
    seed = config.seed + TASK_SEED_OFFSET
    world = World(replace(config, split=split, kinds=None, max_objects=3, max_count=4, seed=seed))
    candidates = [world.scene(index) for index in range(TRIED * count)]
    tasks = []
    for number, (task, suits) in enumerate(TASKS.items()):
        if task not in names:
            continue
        # "single object" and "colours" suit the same scenes: each takes every other one.
        suited = [(n, scene) for n, scene in enumerate(candidates) if n % 2 == number % 2 and suits(scene)][:count]
        if len(suited) < count:
            raise UserError(f"composition: {task}: expected {count} scenes of the world, found {len(suited)}")
        prompts, scenes = [caption(scene, index) for index, scene in suited], [scene for _, scene in suited]
        tasks.append(TaskScenes(task, split, scenes, prompts, np.stack([world.render(scene) for scene in scenes])))
    return tasks


def _tasks_of(context: EvalContext, split: str) -> tuple[int, list[TaskScenes]]:
    """Return the number of prompts drawn per task, and the tasks; the detector judges more real images than that."""
    each = max(2, context.options.count // len(TASKS))
    config = replace(scene_scorer(context, "composition").world, size=context.pipe.exported.image_size)
    return each, task_scenes(config, split, max(each, FEWEST_JUDGED))


def _composition_numbers(context: EvalContext) -> list[str]:
    names = []
    for split in SPLITS.values():
        names += [f"{task}, {split}{more}" for task in TASKS for more in ("", CORRECTED)]
        names += [f"background, {split}", f"overall, {split}", f"overall, {split}{CORRECTED}"]
    return names


def _score_composition(context: EvalContext) -> MetricResult:
    detector = scene_scorer(context, "composition").detector(context.folder, context.options.judge_steps)
    result = MetricResult([])
    for split, name in SPLITS.items():
        each, tasks = _tasks_of(context, split)
        prompts = [prompt for task in tasks for prompt in task.prompts[:each]]
        ids = [f"{task.task}:{n}" for task in tasks for n in range(each)]
        size = context.pipe.exported.image_size
        label = f"world:{split}:{size}, {len(ids)} prompts, ids {short_hash([ids, prompts])}"
        drawn = draw_prompts(context, f"composition-{split}", label, ids, prompts)
        _judge_split(result, name, label, context.version, tasks, np.split(drawn.images(), len(tasks)), detector)
    mistakes = sorted(((pair, n) for pair, n in detector.confusion.items() if pair[0] != pair[1]), key=lambda m: -m[1])
    rows: list[list[Any]] = [["what it is", "taken for", "times", "of"]]
    for (truth, taken), times in mistakes:
        total = sum(n for (other, _), n in detector.confusion.items() if other == truth)
        rows.append([truth, taken, times, "" if truth == "nothing" else total])
    result.tables["the detector's confusion, on scenes of its own"] = rows
    return result


def _judge_split(
    result: MetricResult,
    name: str,
    label: str,
    version: str,
    tasks: Sequence[TaskScenes],
    drawn: Sequence[np.ndarray],
    detector: SceneDetector,
) -> None:
    """Add the results of one split: each task, the background, and the mean over tasks."""
    accuracy = f"{100 * detector.accuracy['named']:.1f} % of things found and rightly named"
    judged = f"{version}, detector@{detector.digest} ({accuracy})"

    def add(title: str, value: Estimate, floor: float, ceiling: float, implementation: str = judged) -> None:
        bounds = {"floor": float(floor), "ceiling": float(ceiling)}
        result.results.append(Result.of(title, value, "higher", implementation, label, **bounds))

    by_task: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for task, images in zip(tasks, drawn, strict=True):
        right, seen = task.judge(images, detector)
        real, other = (task.judge(part, detector)[0] for part in (task.real, task.others))
        by_task.append((right, real, other))
        title = f"{task.task}, {name}"
        add(title, share(right), other.mean(), real.mean())
        add(f"{title}{CORRECTED}", corrected(by_task[-1]), 0.0, 1.0)
        group = first_of(len(right), TASK_EXAMPLES, f"drawings of {title}")
        for n in range(min(TASK_EXAMPLES, len(right))):
            things = [f"{thing.noun} ({thing.x:.2f}, {thing.y:.2f}, side {thing.side:.2f})" for thing in seen[n]]
            mark = (task.task, bool(right[n]), ", ".join(things) or "nothing")
            pictures = [(images[n], "drawn"), (task.real[n], "real")]
            result.examples.append(Example(task.prompts[n], pictures, [mark], group))
    backgrounds = []  # these need no detector
    for parts in (drawn, [task.real for task in tasks], [task.others for task in tasks]):
        pairs = [pair for task, part in zip(tasks, parts, strict=True) for pair in zip(task.scenes, part, strict=False)]
        backgrounds.append(np.array([background_of(image) == scene.background for scene, image in pairs]))
    add(f"background, {name}", share(backgrounds[0]), backgrounds[2].mean(), backgrounds[1].mean(), version)
    floor, ceiling = (np.mean([part[at].mean() for part in by_task]) for at in (2, 1))
    add(f"overall, {name}", _overall([right for right, _, _ in by_task]), floor, ceiling)
    add(f"overall, {name}{CORRECTED}", corrected(*by_task), 0.0, 1.0)


def _overall(tasks: Sequence[np.ndarray]) -> Estimate:
    """Return the mean of the tasks' shares, with the interval of independent tasks."""
    value = float(np.mean([right.mean() for right in tasks]))
    # Half an item on each side gives a task whose verdicts all agree a variance too.
    shares = [(right.sum() + 0.5) / (len(right) + 1) for right in tasks]
    variance = sum(p * (1 - p) / len(right) for p, right in zip(shares, tasks, strict=True)) / len(tasks) ** 2
    margin = 1.96 * float(np.sqrt(variance))
    count = sum(len(right) for right in tasks)
    return Estimate(value, max(0.0, value - margin), min(1.0, value + margin), count)


COMPOSITION = Metric(
    "composition",
    "GenEval's six tasks on the bundled world",
    lambda context: [_tasks_of(context, split) for split in SPLITS],
    _score_composition,
    _composition_numbers,
    True,
    "Chance: the judge's verdict on real pictures of other prompts. Reference: its verdict on the real pictures, which "
    "a model can pass where the judge errs. Where its errors are taken out the two are 0 and 1.",
)

# --- edits ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EditVerdicts:
    """Verdicts bool `[edit]`, and the decibels of the edits that leave a rest."""

    things: np.ndarray
    obeyed: np.ndarray
    rest: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The verdicts by the names of `EDIT_SCORES`."""
        return self.things, self.obeyed, self.things & self.obeyed


@dataclass(frozen=True, eq=False)
class SceneEdits:
    """Edits with their images before and after, uint8 `[edit, row, column, 3]`."""

    edits: list[Edit]
    sources: np.ndarray
    targets: np.ndarray

    def judge(self, images: np.ndarray, detector: Detect) -> EditVerdicts:
        """Judge drawings `[edit, row, column, 3]` of the edits."""
        seen = detector(images)
        counts = [Counter(thing.noun for thing in things) for things in seen]
        rest = [untouched_psnr(*three) for three in zip(images, self.sources, self.targets, strict=True)]
        return EditVerdicts(
            np.array([nouns_of(change.target) == count for change, count in zip(self.edits, counts, strict=True)]),
            np.array([obeyed(*three) for three in zip(self.edits, seen, images, strict=True)]),
            np.array([value for value in rest if value is not None]),
        )


def scene_edits(config: WorldConfig, count: int) -> SceneEdits:
    """Return `count` edits of scenes apart from training: a function of its arguments."""
    world = World(replace(config, split="train", seed=config.seed + EDIT_SEED_OFFSET))
    edits = [edit(world.scene(index), world, index) for index in range(count)]
    sources, targets = (np.stack([world.render(getattr(e, name)) for e in edits]) for name in ("source", "target"))
    return SceneEdits(edits, sources, targets)


def nouns_of(scene: Scene) -> Counter[str]:
    """Return how often each noun is in a scene."""
    return Counter({thing.noun: thing.count for thing in scene.things})


def obeyed(change: Edit, seen: Sequence[Seen], image: np.ndarray) -> bool:
    """Return whether what the instruction names is as in the target; the rest of the scene is ignored."""
    source, target = change.source.things, change.target.things
    if change.kind == "background":
        return background_of(image) == change.target.background
    removed = {thing.noun for thing in source} - {thing.noun for thing in target}
    if any(thing.noun in removed for thing in seen):
        return False
    new = [thing for thing in target if thing not in source]
    if change.kind == "resize":
        old = next(thing for thing in source if thing not in target)
        sides = [detection.side for detection in seen if detection.noun == new[0].noun]
        before, after = old.places[0].side, new[0].places[0].side
        # The side must be closer, as a ratio, to the target's than to the source's.
        return bool(sides) and abs(np.log(sides[0] / after)) < abs(np.log(sides[0] / before))

    def is_at(detection: Seen, noun: str, place: Place) -> bool:
        (x, y), side = place.centre, place.side
        off = max(abs(detection.x - x), abs(detection.y - y))
        return detection.noun == noun and off <= NEAR and abs(detection.side - side) <= SIDE_OFF * side

    return all(any(is_at(d, thing.noun, place) for d in seen) for thing in new for place in thing.places)


def untouched_psnr(drawn: np.ndarray, source: np.ndarray, target: np.ndarray) -> float | None:
    """Return the PSNR of a drawing to the target where source and target are equal, all uint8 `[row, column, 3]`.

    None where too little of the image stays equal, as with a new background.
    """
    wide = np.pad((source != target).any(-1), 1)
    # The changed region is widened by a pixel, because edges are antialiased.
    changed = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    if (~changed).mean() < LEAST_REST:
        return None
    squared = np.square(drawn.astype(np.float64) - target)[~changed].mean()
    return BEST_PSNR if squared == 0 else float(min(BEST_PSNR, 10 * np.log10(RANGE**2 / squared)))


def _check_editing(context: EvalContext) -> None:
    scene_scorer(context, "editing")
    candidates = context.drawing.candidates
    if candidates > 1:
        raise UserError(f"editing: --candidates: expected 1, as edits have no others, found {candidates}")


def _score_editing(context: EvalContext) -> MetricResult:
    scorer = scene_scorer(context, "editing")
    config = replace(scorer.world, size=context.pipe.exported.image_size)
    edits = scene_edits(config, context.options.count)
    words = [change.instruction for change in edits.edits]
    label = f"world edits:{config.size}, {len(words)} edits, ids {short_hash([repr(change) for change in edits.edits])}"
    label += f", pictures {content_hash(image.tobytes() for image in (*edits.sources, *edits.targets))}"
    task = drawing_task(
        context,
        "edits",
        label,
        len(words),
        lambda n: [PIL.Image.fromarray(edits.sources[n]), words[n]],
        lambda n: {"instruction": words[n], "kind": edits.edits[n].kind},
    )
    images = context.make(task).images()
    detector = scorer.detector(context.folder, context.options.judge_steps)
    drawn, unchanged, exact = (edits.judge(part, detector) for part in (images, edits.sources, edits.targets))
    implementation = f"{context.version}, detector@{detector.digest}"
    # A source never obeys the instruction, but it may have the right nouns: those are no wrong examples.
    differ = np.array([nouns_of(change.source) != nouns_of(change.target) for change in edits.edits])
    every = np.ones(len(words), bool)
    results = []
    columns = zip(EDIT_SCORES, drawn.columns, unchanged.columns, exact.columns, (differ, every, every), strict=True)
    for name, right, floor, ceiling, wrong in columns:
        bounds = {"floor": float(floor.mean()), "ceiling": float(ceiling.mean())}
        results.append(Result.of(name, share(right), "higher", implementation, label, **bounds))
        fixed = corrected((right, ceiling, floor[wrong]))
        results.append(Result.of(name + CORRECTED, fixed, "higher", implementation, label, floor=0.0, ceiling=1.0))
    if len(drawn.rest):
        results.append(Result.of(REST, bootstrap(drawn.rest), "higher", context.version, label, ceiling=BEST_PSNR))
    title = first_of(len(words), EDIT_EXAMPLES, "edits")
    examples = [
        Example(
            words[n],
            [(edits.sources[n], "before"), (images[n], "drawn"), (edits.targets[n], "exact")],
            [("object right", bool(drawn.things[n]), ""), ("instruction obeyed", bool(drawn.obeyed[n]), "")],
            title,
        )
        for n in range(min(EDIT_EXAMPLES, len(words)))
    ]
    return MetricResult(results, examples)


EDITING = Metric(
    "editing",
    "edits by instruction, with exact targets",
    _check_editing,
    _score_editing,
    lambda context: [*(name + more for name in EDIT_SCORES for more in ("", CORRECTED)), REST],
    True,
    "Chance: the source, unchanged. Reference: the exact target, by the same judge. Where its errors are taken out the "
    "two are 0 and 1.",
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in (COMPOSITION, EDITING)}
