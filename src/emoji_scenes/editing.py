"""Instructions that change a scene in one way, with the scene before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from transfuse.rng import Draws

from .language import RELATION_PHRASES, article, phrase
from .layout import SIDES, UNITS, Place, Relation, Size, draw_side, draw_start
from .nouns import NOUNS
from .scenes import Scene, Thing, World, held_out

EditKind = Literal["background", "replace", "remove", "add", "resize"]


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction and the scenes before and after; `target` is `source` with nothing else changed."""

    kind: EditKind
    source: Scene
    instruction: str
    target: Scene


def edit(scene: Scene, world: World, index: int = 0, kind: EditKind | None = None) -> Edit:
    """Return a change to a scene, drawn by (the world's seed, index); of a given kind, or of any that suits the scene.

    A training world's targets show nothing that is held out. Raises ValueError if the kind does not suit the scene:
    nothing to spare for "remove", no room for "add" or "resize".
    """
    draws = Draws("edit", world.config.seed, world.config.split, index)
    kinds = [kind] if kind else list(get_args(EditKind))
    while kinds:
        chosen = kinds.pop(draws.below(len(kinds)))
        for _ in range(24):
            change = _MAKERS[chosen](scene, world, draws)
            if change is not None and (world.config.split == "heldout" or not held_out(change[1])):
                return Edit(chosen, scene, *change)
    raise ValueError(f"edit kind: expected one that suits a scene of kind {scene.kind!r}, found {kind or 'none'}")


def _the(thing: Thing) -> str:
    return f"the {NOUNS[thing.noun].counted(thing.count)}"


def _background(scene: Scene, world: World, draws: Draws) -> tuple[str, Scene] | None:
    """Choose another background, on which everything can still be seen."""
    seen = [c for c in world.backgrounds if all(world.sees(t.noun, t.style, c) for t in scene.things)]
    options = [colour for colour in seen if colour != scene.background]
    if not options:
        return None
    colour = draws.pick(options)
    wording = (
        f"make the background {colour}",
        f"change the background to {colour}",
        f"use {article(colour)} {colour} background",
        f"turn the {scene.background} background {colour}",
    )
    return draws.pick(wording), replace(scene, background=colour)


def _new_noun(scene: Scene, world: World, draws: Draws) -> tuple[str, str] | None:
    """Draw a noun that is not in the scene and a style seen on its background; None if the draw was unlucky."""
    noun = draws.pick(world.nouns)
    styles = world.styles_on.get((noun, scene.background), ())
    if not styles or noun in {thing.noun for thing in scene.things}:
        return None
    return noun, draws.pick(styles)


def _replace(scene: Scene, world: World, draws: Draws) -> tuple[str, Scene] | None:
    """Put another noun in the same place."""
    at = draws.below(len(scene.things))
    old, noun_and_style = scene.things[at], _new_noun(scene, world, draws)
    if noun_and_style is None:
        return None
    new = replace(old, noun=noun_and_style[0], style=noun_and_style[1])
    a_new = NOUNS[new.noun].a if new.count == 1 else NOUNS[new.noun].plural
    wording = (
        f"replace {_the(old)} with {a_new}",
        f"change {_the(old)} into {a_new}",
        f"turn {_the(old)} into {a_new}",
        f"swap {_the(old)} for {a_new}",
    )
    things = (*scene.things[:at], new, *scene.things[at + 1 :])
    return draws.pick(wording), replace(scene, things=things)


def _remove(scene: Scene, world: World, draws: Draws) -> tuple[str, Scene] | None:
    """Take away one thing with all its copies; the rest stays where it is."""
    if len(scene.things) < 2:
        return None
    at = draws.below(len(scene.things))
    gone = _the(scene.things[at])
    wording = (f"remove {gone}", f"take {gone} away", f"delete {gone}", f"erase {gone}")
    things = (*scene.things[:at], *scene.things[at + 1 :])
    return draws.pick(wording), replace(scene, things=things, relation=None)


def _add(scene: Scene, world: World, draws: Draws) -> tuple[str, Scene] | None:
    """Add a thing where there is room; with a single thing in the scene, name their relation."""
    noun_and_style = _new_noun(scene, world, draws)
    taken = [spot for thing in scene.things for spot in thing.places]
    if noun_and_style is None or len(scene.things) >= 3 or len(taken) >= 4:
        return None
    size: Size = draws.pick(("small", "medium", "medium"))
    side = draw_side(size, draws, most=128)
    spots = (Place.of_units(draw_start(side, draws), draw_start(side, draws), side) for _ in range(24))
    spot = next((s for s in spots if all(s.apart(other) for other in taken)), None)
    if spot is None:
        return None
    new = Thing(*noun_and_style, 1, size, (spot,))
    if scene.kind == "one":
        relation = _relation(spot, taken[0])
        if relation is None:
            return None
        instruction = f"add {phrase(new)} {RELATION_PHRASES[relation][0]} {_the(scene.things[0])}"
        return instruction, Scene((new, *scene.things), scene.background, relation)
    wording = (f"add {phrase(new)}", f"put {phrase(new)} in the free space", f"draw {phrase(new)} as well")
    return draws.pick(wording), replace(scene, things=(*scene.things, new), relation=None)


def _relation(new: Place, old: Place) -> Relation | None:
    """Return the relation of one square to another: clear of it on one side and level with it; None if unclear."""
    (new_x, new_y), (old_x, old_y) = new.centre, old.centre
    if abs(new_y - old_y) <= 0.2 and not (new.x < old.x + old.side and old.x < new.x + new.side):
        return "left of" if new_x < old_x else "right of"
    if abs(new_x - old_x) <= 0.2 and not (new.y < old.y + old.side and old.y < new.y + new.side):
        return "above" if new_y < old_y else "below"
    return None


def _resize(scene: Scene, world: World, draws: Draws) -> tuple[str, Scene] | None:
    """Make one thing small or large around the same centre, where there is room."""
    at = draws.below(len(scene.things))
    old = scene.things[at]
    others = [spot for i, thing in enumerate(scene.things) if i != at for spot in thing.places]
    size: Size = draws.pick(("small", "large"))
    if old.count > 1 or old.size == size:
        return None
    side = draw_side(size, draws, most=SIDES["large"][0] + 40)
    x, y = (round(centre * UNITS) - side // 2 for centre in old.places[0].centre)
    spot = Place.of_units(x, y, side)
    if not spot.inside() or not all(spot.apart(other) for other in others):
        return None
    word, verb = {"small": ("smaller", "shrink"), "large": ("larger", "enlarge")}[size]
    wording = (f"make {_the(old)} {word}", f"make {_the(old)} {size}", f"{verb} {_the(old)}")
    things = (*scene.things[:at], replace(old, size=size, places=(spot,)), *scene.things[at + 1 :])
    return draws.pick(wording), replace(scene, things=things, position=None)


_MAKERS = {"background": _background, "replace": _replace, "remove": _remove, "add": _add, "resize": _resize}
