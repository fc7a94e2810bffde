"""Edits: does the drawing change what the instruction names, and nothing else?

The model sees an image and an instruction, and draws. Edits of emoji scenes have exact targets, so four numbers follow:

    object right           the drawing has the target's nouns, each as often
    instruction obeyed     what the instruction names is as in the target: a colour, or a thing's place and size
    both
    rest untouched         PSNR in dB of the drawing to the target, where source and target are equal

Chance is the unchanged source; the reference is the target. The first three are also given with the detector's errors
taken out, measured on targets and on wrong sources. The paper (section 4.4) gives no number to compare with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from transfuse.errors import UserError
from transfuse.evaluation.confidence import CORRECTED, bootstrap, corrected, share
from transfuse.evaluation.context import EvalContext, Example, Metric, MetricResult, Result, first_of
from transfuse.evaluation.generate import content_hash, short_hash
from transfuse.evaluation.image_quality import drawing_task
from transfuse.evaluation.reconstruction import BEST_PSNR, RANGE

from .detector import Detect, Seen
from .editing import Edit, edit
from .palette import background_of
from .scenes import Scene, World, WorldConfig
from .scorer import scene_scorer

SEED_OFFSET = 5_000_011
"""Keeps edited scenes apart from the scenes of training."""
SPREAD = 1
"""Pixels by which the changed region is widened, because edges are antialiased."""
LEAST = 0.05
"""Smallest share of an image that must stay equal for "rest untouched"."""
NEAR = 0.15
"""Most a thing may be off its place, as a share of the frame."""
SIDE_OFF = 0.25
"""Most a thing's side may be off, as a share of it."""
SHOWN = 24
JUDGED = ("object right", "instruction obeyed", "object right and instruction obeyed")
REST = "rest untouched, masked PSNR in dB"
NAMES = (*(name + more for name in JUDGED for more in ("", CORRECTED)), REST)


@dataclass(frozen=True, eq=False)
class Edits:
    """Edits with their images before and after, uint8 `[edit, row, column, 3]`."""

    edits: list[Edit]
    sources: np.ndarray
    targets: np.ndarray


def world_edits(config: WorldConfig, count: int) -> Edits:
    """Return `count` edits of scenes apart from training: a function of its arguments."""
    world = World(replace(config, split="train", seed=config.seed + SEED_OFFSET))
    edits = [edit(world.scene(index), world, index) for index in range(count)]
    sources, targets = (np.stack([world.render(getattr(e, name)) for e in edits]) for name in ("source", "target"))
    return Edits(edits, sources, targets)


def things_right(scene: Scene, seen: Sequence[Seen]) -> bool:
    """Return whether the detected nouns are the scene's, each as often."""
    return Counter(thing.noun for thing in seen) == _nouns(scene)


def _nouns(scene: Scene) -> Counter[str]:
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
    return all(_at(thing.noun, place, seen) for thing in new for place in thing.places)


def _at(noun: str, place: Any, seen: Sequence[Seen]) -> bool:
    """Return whether a noun was detected at a place, with about its size."""
    x, y = place.centre
    return any(
        thing.noun == noun
        and max(abs(thing.x - x), abs(thing.y - y)) <= NEAR
        and abs(thing.side - place.side) <= SIDE_OFF * place.side
        for thing in seen
    )


def untouched_psnr(drawn: np.ndarray, source: np.ndarray, target: np.ndarray) -> float | None:
    """Return the PSNR of a drawing to the target where source and target are equal, all uint8 `[row, column, 3]`.

    None where too little of the image stays equal, as with a new background.
    """
    changed = (source != target).any(-1)
    for _ in range(SPREAD):
        wide = np.pad(changed, 1)
        changed = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    if (~changed).mean() < LEAST:
        return None
    squared = np.square(drawn.astype(np.float64) - target)[~changed].mean()
    return BEST_PSNR if squared == 0 else float(min(BEST_PSNR, 10 * np.log10(RANGE**2 / squared)))


@dataclass(frozen=True, eq=False)
class JudgedEdits:
    """Verdicts bool `[edit]`, and decibels of the edits that leave a rest."""

    things: np.ndarray
    obeyed: np.ndarray
    rest: np.ndarray

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The verdicts by the names of `JUDGED`."""
        return self.things, self.obeyed, self.things & self.obeyed


def judge(edits: Edits, images: np.ndarray, detector: Detect) -> JudgedEdits:
    """Judge drawings `[edit, row, column, 3]` of the edits."""
    seen = detector(images)
    rest = [untouched_psnr(*three) for three in zip(images, edits.sources, edits.targets, strict=True)]
    return JudgedEdits(
        np.array([things_right(change.target, things) for change, things in zip(edits.edits, seen, strict=True)]),
        np.array([obeyed(*three) for three in zip(edits.edits, seen, images, strict=True)]),
        np.array([value for value in rest if value is not None]),
    )


# --- the metric -------------------------------------------------------------------------------------------------------


def _check(context: EvalContext) -> None:
    scene_scorer(context, "editing")
    candidates = context.drawing.candidates
    if candidates > 1:
        raise UserError(f"editing: --candidates: expected 1, as edits have no others, found {candidates}")


def _score(context: EvalContext) -> MetricResult:
    scorer = scene_scorer(context, "editing")
    config = replace(scorer.world, size=context.pipe.exported.image_size)
    edits = world_edits(config, context.options.count)
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
    drawn, unchanged, exact = (judge(edits, part, detector) for part in (images, edits.sources, edits.targets))
    implementation = f"{context.version}, detector@{detector.digest}"
    # A source never obeys the instruction, but it may have the right nouns: those are no wrong examples.
    differ = np.array([_nouns(change.source) != _nouns(change.target) for change in edits.edits])
    every = np.ones(len(words), bool)
    results = []
    columns = zip(JUDGED, drawn.columns, unchanged.columns, exact.columns, (differ, every, every), strict=True)
    for name, right, floor, ceiling, wrong in columns:
        bounds = {"floor": float(floor.mean()), "ceiling": float(ceiling.mean())}
        results.append(Result.of(name, share(right), "higher", implementation, label, **bounds))
        fixed = corrected((right, ceiling, floor[wrong]))
        results.append(Result.of(name + CORRECTED, fixed, "higher", implementation, label, floor=0.0, ceiling=1.0))
    if len(drawn.rest):
        results.append(Result.of(REST, bootstrap(drawn.rest), "higher", context.version, label, ceiling=BEST_PSNR))
    title = first_of(len(words), SHOWN, "edits")
    examples = [
        Example(
            words[n],
            [(edits.sources[n], "before"), (images[n], "drawn"), (edits.targets[n], "exact")],
            [("object right", bool(drawn.things[n]), ""), ("instruction obeyed", bool(drawn.obeyed[n]), "")],
            title,
        )
        for n in range(min(SHOWN, len(words)))
    ]
    return MetricResult(results, examples)


EDITING = Metric(
    "editing",
    "edits by instruction, with exact targets",
    _check,
    _score,
    lambda context: NAMES,
    True,
    "Chance: the source, unchanged. Reference: the exact target, by the same judge. Where its errors are taken out the "
    "two are 0 and 1.",
)
