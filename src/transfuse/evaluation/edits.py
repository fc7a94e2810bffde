"""Does it change what it is told to change, and nothing else? On edits of the bundled world, whose targets are exact.

The model is shown a picture and an instruction and draws. Four numbers:

    object right           the nouns in the drawing, and how often each, are those of the target
    instruction obeyed     what the instruction is about is as in the target: a colour, or one thing's place and size
    both
    rest untouched         PSNR in dB of the drawing to the target, where source and target are equal

Beside them what the source scores, unchanged (chance: an editor that does nothing), and the target (reference). The
first three once more with the judge's own errors taken out: what it says of targets, which are right, and of sources
that are wrong.
The paper shows edits and gives no number (section 4.4): these are not comparable with anything in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from emoji_scenes import Edit, Scene, World, WorldConfig, background_of, edit

from ..errors import UserError
from .bench import EvalContext, Metric
from .confidence import CORRECTED, bootstrap, corrected, share
from .detector import Detect, Seen
from .drawing import pictures_task
from .generate import Task, content_hash, short_hash
from .reconstruction import BEST_PSNR, RANGE
from .result import Example, MetricResult, Result, first_of

SEED_OFFSET = 5_000_011
SPREAD = 1
"""pixels that the changed region is widened by: edges are antialiased"""
LEAST = 0.05
"""share of a picture that must stay equal for "the rest" to be asked about"""
NEAR = 0.15
"""of the frame, that a thing may be off its place"""
SIDE_OFF = 0.25
"""share of its side that a thing may be larger or smaller"""
SHOWN = 24
JUDGED = ("object right", "instruction obeyed", "object right and instruction obeyed")
REST = "rest untouched, masked PSNR in dB"
NAMES = (*(name + more for name in JUDGED for more in ("", CORRECTED)), REST)


@dataclass(frozen=True, eq=False)
class Edits:
    """Edits with their pictures before and after, uint8 `[edit, row, column, 3]`."""

    edits: list[Edit]
    sources: np.ndarray
    targets: np.ndarray


def world_edits(config: WorldConfig, count: int) -> Edits:
    """`count` edits of scenes of the world, apart from the scenes of training: a function of its arguments."""
    world = World(replace(config, split="train", seed=config.seed + SEED_OFFSET))
    made = [edit(world.scene(index), world, index) for index in range(count)]
    before, after = (np.stack([world.render(getattr(one, name)) for one in made]) for name in ("source", "target"))
    return Edits(made, before, after)


def things_right(scene: Scene, seen: Sequence[Seen]) -> bool:
    """Whether what was seen is what the scene shows, each noun as often."""
    return Counter(one.noun for one in seen) == _nouns(scene)


def _nouns(scene: Scene) -> Counter[str]:
    return Counter({thing.noun: thing.count for thing in scene.things})


def obeyed(change: Edit, seen: Sequence[Seen], image: np.ndarray) -> bool:
    """Whether what the instruction is about is as in the target. Where nothing else changed, the rest is not asked."""
    if change.kind == "background":
        return background_of(image) == change.target.background
    gone = {thing.noun for thing in change.source.things} - {thing.noun for thing in change.target.things}
    if any(one.noun in gone for one in seen):
        return False
    new = [thing for thing in change.target.things if thing not in change.source.things]
    if change.kind == "resize":
        old = next(thing for thing in change.source.things if thing not in change.target.things)
        return _resized(new[0].noun, old.places[0].side, new[0].places[0].side, seen)
    return all(_there(thing.noun, place, seen) for thing in new for place in thing.places)


def _resized(noun: str, before: float, after: float, seen: Sequence[Seen]) -> bool:
    """Whether its side is nearer, as a ratio, to what it should be than to what it was."""
    sides = [one.side for one in seen if one.noun == noun]
    return bool(sides) and abs(np.log(sides[0] / after)) < abs(np.log(sides[0] / before))


def _there(noun: str, place: Any, seen: Sequence[Seen]) -> bool:
    x, y = place.centre
    return any(
        one.noun == noun
        and max(abs(one.x - x), abs(one.y - y)) <= NEAR
        and abs(one.side - place.side) <= SIDE_OFF * place.side
        for one in seen
    )


def untouched_psnr(drawn: np.ndarray, source: np.ndarray, target: np.ndarray) -> float | None:
    """PSNR of a drawing to the target, where source and target are equal, all uint8 `[row, column, 3]`.

    None where too little of the picture stays equal, as with another background.
    """
    changed = (source != target).any(-1)
    for _ in range(SPREAD):
        wide = np.pad(changed, 1)
        changed = wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
    if (~changed).mean() < LEAST:
        return None
    squared = np.square(drawn.astype(np.float64) - target)[~changed].mean()
    return BEST_PSNR if squared == 0 else float(min(BEST_PSNR, 10 * np.log10(RANGE**2 / squared)))


# --- as a measure -----------------------------------------------------------------------------------------------------


def _task(bench: EvalContext, edits: Edits, label: str) -> Task:
    return pictures_task(
        bench,
        "edits",
        label,
        len(edits.edits),
        lambda n: [PIL.Image.fromarray(edits.sources[n]), edits.edits[n].instruction],
        lambda n: {"instruction": edits.edits[n].instruction, "kind": edits.edits[n].kind},
    )


@dataclass(frozen=True, eq=False)
class _Judged:
    """bool `[edit]`, bool `[edit]`, and decibels of those edits that leave a rest."""

    things: np.ndarray
    obeyed: np.ndarray
    rest: np.ndarray


def judge(edits: Edits, images: np.ndarray, detector: Detect) -> _Judged:
    """Judge drawings `[edit, row, column, 3]` of the edits."""
    seen = detector(images)
    rest = [untouched_psnr(*three) for three in zip(images, edits.sources, edits.targets, strict=True)]
    return _Judged(
        np.array([things_right(one.target, some) for one, some in zip(edits.edits, seen, strict=True)]),
        np.array([obeyed(one, some, image) for one, some, image in zip(edits.edits, seen, images, strict=True)]),
        np.array([value for value in rest if value is not None]),
    )


def _score(bench: EvalContext) -> MetricResult:
    config = replace(bench.world, size=bench.pipe.exported.image_size)
    edits = world_edits(config, bench.options.count)
    words = [one.instruction for one in edits.edits]
    label = f"world edits:{config.size}, {len(words)} edits, ids {short_hash([repr(one) for one in edits.edits])}"
    label += f", pictures {content_hash(image.tobytes() for image in (*edits.sources, *edits.targets))}"
    images = bench.make(_task(bench, edits, label)).images()
    detector = bench.detector()
    found, nothing, best = (judge(edits, some, detector) for some in (images, edits.sources, edits.targets))
    said = f"{bench.version}, detector@{detector.digest}"
    results = []
    chosen: tuple[Callable[[_Judged], np.ndarray], ...] = (
        lambda judged: judged.things,
        lambda judged: judged.obeyed,
        lambda judged: judged.things & judged.obeyed,
    )
    # A source never does what is asked; its things may be right all the same.
    others = np.array([_nouns(one.source) != _nouns(one.target) for one in edits.edits])
    every = np.ones(len(words), bool)
    wrong = dict(zip(JUDGED, (others, every, every), strict=True))
    for name, choose in zip(JUDGED, chosen, strict=True):
        bounds = {"floor": float(choose(nothing).mean()), "ceiling": float(choose(best).mean())}
        results.append(Result.of(name, share(choose(found)), "higher", said, label, **bounds))
        fixed = corrected((choose(found), choose(best), choose(nothing)[wrong[name]]))
        results.append(Result.of(name + CORRECTED, fixed, "higher", said, label, floor=0.0, ceiling=1.0))
    if len(found.rest):
        results.append(Result.of(REST, bootstrap(found.rest), "higher", bench.version, label, ceiling=BEST_PSNR))
    exhibits = [
        Example(
            words[n],
            [(edits.sources[n], "before"), (images[n], "drawn"), (edits.targets[n], "exact")],
            [("object right", bool(found.things[n]), ""), ("instruction obeyed", bool(found.obeyed[n]), "")],
            first_of(len(words), SHOWN, "edits"),
        )
        for n in range(min(SHOWN, len(words)))
    ]
    return MetricResult(results, exhibits)


ABOUT = "edits by instruction, with exact targets"


def _check(bench: EvalContext) -> None:
    if bench.drawing.candidates > 1:
        raise UserError(f"editing: --candidates: expected 1, as edits have no others, found {bench.drawing.candidates}")


COMPARED = (
    "Chance: the source, unchanged. Reference: the exact target, by the same judge. Where its errors are taken out the "
    "two are 0 and 1."
)
EDITING = Metric("editing", ABOUT, _check, _score, lambda bench: NAMES, True, COMPARED)
