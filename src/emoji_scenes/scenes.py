"""Scenes: what is shown, where, and on what colour; as a pure function of a sample's index.

A scene says nothing about pixels. `World.scene(index)` makes one, `World.render(scene)` draws it at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transfuse.rng import Draws, stable_hash

from .layout import Place, Relation, Size, copies, group, pair, single
from .nouns import DISTINCT, NOUNS, PALETTE, STYLES, sprites

Kind = Literal["one", "copies", "pair", "group"]
Split = Literal["train", "heldout"]

KIND_SHARES: dict[Kind, int] = {"one": 40, "copies": 18, "pair": 27, "group": 15}
"""Frequency of each kind of scene, in hundredths."""
PAIRS_PER_HELD_OUT = 10  # one unordered pair of nouns in this many is held out


@dataclass(frozen=True, slots=True)
class Thing:
    """Copies of one noun in one style and size; `places` has one square for each of the `count` copies."""

    noun: str
    style: str
    count: int
    size: Size
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A full description of a picture, whatever its size in pixels.

    relation   holds between the two things, in order: things[0] is "left of" things[1]
    position   "top left", "top", "middle", ... where one thing was put in a nameable place
    """

    things: tuple[Thing, ...]
    background: str
    relation: Relation | None = None
    position: str | None = None

    @property
    def kind(self) -> Kind:
        """ "one" thing, "copies" of one thing, a "pair" with a relation, or a "group" without."""
        if len(self.things) == 1:
            return "one" if self.things[0].count == 1 else "copies"
        return "pair" if self.relation else "group"


@dataclass(frozen=True)
class WorldConfig:
    """The settings of a `World`.

    size          pixels per side
    nouns         names; None for all, a number for that many of the easiest to tell apart at 32 pixels
    max_objects   most different things in a scene
    max_count     most copies of one thing; there are never more than four drawings in all
    styles, backgrounds   None for all
    sizes         of things that are alone; None for all
    kinds         of scenes, in their usual shares; None for all
    split         "train" never shows a held-out combination, "heldout" always shows one
    seed          another seed, other scenes; the held-out set stays

    Raises ValueError, naming the field, for a value that cannot be used.
    """

    size: int = 32
    nouns: int | tuple[str, ...] | None = None
    max_objects: int = 3
    max_count: int = 4
    styles: tuple[str, ...] | None = None
    backgrounds: tuple[str, ...] | None = None
    sizes: tuple[Size, ...] | None = None
    kinds: tuple[Kind, ...] | None = None
    split: Split = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"size": (16, 1024), "max_objects": (1, 3), "max_count": (1, 4)}
        limits |= {"nouns": (1, len(NOUNS))} if isinstance(self.nouns, int) else {}
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"WorldConfig.{field}: expected a whole number from {low} to {high}, found {value!r}")
        known = {"nouns": tuple(NOUNS), "styles": STYLES, "backgrounds": tuple(PALETTE)}
        for field, names in {**known, "sizes": get_args(Size), "kinds": get_args(Kind)}.items():
            value = getattr(self, field)
            if value is None or isinstance(value, int):
                continue
            if not isinstance(value, tuple | list) or not value:
                raise ValueError(f"WorldConfig.{field}: expected one or more names, found {value!r}")
            for name in value:
                if name not in names:
                    hint = ", ".join(names) if len(names) < 20 else f"one of the {len(names)} in emoji_scenes.NOUNS"
                    raise ValueError(f"WorldConfig.{field}: expected {hint}, found {name!r}")
            if len(set(value)) < len(value):
                raise ValueError(f"WorldConfig.{field}: expected each name once, found {value!r}")
            object.__setattr__(self, field, tuple(value))
        if self.split not in get_args(Split):
            raise ValueError(f"WorldConfig.split: expected 'train' or 'heldout', found {self.split!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"WorldConfig.seed: expected a whole number, found {self.seed!r}")

    @property
    def noun_names(self) -> tuple[str, ...]:
        """The nouns in use, by name."""
        if isinstance(self.nouns, int):
            return (DISTINCT + tuple(noun for noun in NOUNS if noun not in DISTINCT))[: self.nouns]
        return tuple(NOUNS) if self.nouns is None else self.nouns


@cache
def held_out_background(noun: str) -> str:
    """Return the one background colour that training never shows this noun on, fixed for ever by the noun's name.

    Of the colours it can be seen on, it is the one whose hash comes first.
    """
    sheet = sprites()
    seen = [c for c in PALETTE if any(c in sheet.seen_on[noun, style] for style in sheet.styles_of[noun])]
    return min(seen, key=lambda colour: stable_hash(f"{noun} on {colour}"))


def held_out_pair(first: str, second: str) -> bool:
    """Return whether training never shows these two nouns together: one pair in ten, fixed for ever by the names."""
    low, high = sorted((first, second))
    return stable_hash(f"{low} with {high}") % PAIRS_PER_HELD_OUT == 0


def held_out(scene: Scene) -> bool:
    """Return whether the scene shows a noun on its held-out background, or a held-out pair of nouns."""
    nouns = [thing.noun for thing in scene.things]
    return any(held_out_background(noun) == scene.background for noun in nouns) or any(
        held_out_pair(first, second) for first, second in combinations(nouns, 2)
    )


class World:
    """Scenes without end. `scene(index)` depends on the configuration and the index alone, not on earlier calls.

    A noun is shown only on backgrounds it can be seen on, by one rule (`nouns.visible_on`): in the chosen style at
    least 60 % of its pixels differ from the background by at least 100 in RGB distance. Raises ValueError for a
    configuration that cannot show what it promises.
    """

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config = config or WorldConfig()
        self.nouns, self._sprites = config.noun_names, sprites()
        self.backgrounds = config.backgrounds or tuple(PALETTE)
        self.styles_on: dict[tuple[str, str], tuple[str, ...]] = {}
        """(noun, background) -> the styles, of those in use, in which the noun can be seen there, if there are any"""
        for noun in self.nouns:
            styles = [style for style in self._sprites.styles_of[noun] if style in (config.styles or STYLES)]
            for colour in self.backgrounds:
                if seen := tuple(style for style in styles if self.sees(noun, style, colour)):
                    self.styles_on[noun, colour] = seen
        self._seen_on = {n: tuple(c for c in self.backgrounds if (n, c) in self.styles_on) for n in self.nouns}
        self._trained_on = {n: tuple(c for c in cs if c != held_out_background(n)) for n, cs in self._seen_on.items()}
        usable = self._trained_on if config.split == "train" else self._seen_on
        self._shown = tuple(noun for noun in self.nouns if usable[noun])
        several = config.max_objects > 1 and len(self._shown) > 1
        possible = {"one": True, "copies": config.max_count > 1, "pair": several, "group": several}
        wanted = config.kinds or get_args(Kind)
        kinds = [kind for kind in KIND_SHARES if possible[kind] and kind in wanted]
        self._kinds = [kind for kind in kinds for _ in range(KIND_SHARES[kind])]
        self._held_nouns = tuple(n for n in self.nouns if held_out_background(n) in self._seen_on[n])
        pairs = combinations(self._shown, 2) if config.split == "heldout" and config.max_objects > 1 else ()
        self._held_pairs = tuple(both for both in pairs if held_out_pair(*both) and self._common(both))
        if not self._kinds:
            raise ValueError(
                f"WorldConfig.kinds: expected one that {config.max_objects} objects and {config.max_count} "
                f"copies at most allow, found {', '.join(config.kinds or ())}"
            )
        lost = [noun for noun in self.nouns if noun not in self._shown]
        if config.split == "train" and lost:
            raise ValueError(
                f"WorldConfig.backgrounds: expected one on which {lost[0]!r} can be seen and which is not held out for "
                f"it ({held_out_background(lost[0])}), found {config.backgrounds}"
            )
        if config.split == "heldout" and not self._held_nouns and not self._held_pairs:
            raise ValueError(
                "WorldConfig.split: expected nouns and backgrounds that form a held-out combination, "
                f"found none among {len(self.nouns)} nouns and backgrounds {config.backgrounds or 'all'}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, World) and other.config == self.config

    def __hash__(self) -> int:
        return hash(self.config)

    def __reduce__(self) -> tuple[type[World], tuple[WorldConfig]]:
        """Send workers the configuration alone; they load the sprites, which would cost megabytes to send."""
        return World, (self.config,)

    def sees(self, noun: str, style: str, background: str) -> bool:
        """Return whether a noun drawn in a style can be seen on a background."""
        return background in self._sprites.seen_on[noun, style]

    def scene(self, index: int) -> Scene:
        """Return the scene of a sample index (0 and up): a pure function of the index and the configuration."""
        draws = Draws("scene", self.config.seed, self.config.split, index)
        kind = draws.pick(self._kinds)
        if self.config.split == "heldout":
            return self._held_out_scene(kind, draws)
        for _ in range(32):
            scene = self._make(kind, self._add_nouns([], self._noun_count(kind, draws), draws), None, draws)
            if scene is not None and not held_out(scene):
                return scene
        # So few nouns or colours that no such scene came up: one thing alone is always possible.
        chosen = draws.pick(self._shown)
        alone = self._make("one", [chosen], draws.pick(self._trained_on[chosen]), draws)
        assert alone is not None
        return alone

    def render(self, scene: Scene, size: int | None = None) -> NDArray[np.uint8]:
        """Draw the picture, uint8 `[size, size, 3]`; `size` in pixels, the configuration's unless given."""
        size = size or self.config.size
        canvas = np.empty((size, size, 3), dtype=np.float32)
        canvas[:] = PALETTE[scene.background]
        for thing in scene.things:
            for place in thing.places:
                left, top, side = place.pixels(size)
                colour, rest = self._sprites.scaled(thing.noun, thing.style, side)
                patch = canvas[top : top + side, left : left + side]
                patch *= rest
                patch += colour
        canvas += 0.5
        return canvas.astype(np.uint8)

    def _noun_count(self, kind: Kind, draws: Draws) -> int:
        """Return how many different nouns a scene has; a group of two has copies of a noun, where those are wanted."""
        if kind != "group":
            return 2 if kind == "pair" else 1
        three = self.config.max_objects > 2 and len(self._shown) > 2
        return 3 if three and (self.config.max_count == 1 or draws.chance(0.6)) else 2

    def _add_nouns(self, nouns: list[str], wanted: int, draws: Draws) -> list[str]:
        """Append different nouns at random until there are as many as wanted."""
        while len(nouns) < wanted:
            noun = draws.pick(self._shown)
            if noun not in nouns:
                nouns.append(noun)
        return nouns

    def _common(self, nouns: Sequence[str]) -> tuple[str, ...]:
        """Return the backgrounds on which all of these nouns can be seen."""
        return tuple(c for c in self._seen_on[nouns[0]] if all((noun, c) in self.styles_on for noun in nouns[1:]))

    def _held_out_scene(self, kind: Kind, draws: Draws) -> Scene:
        """Return a scene built around a held-out combination drawn at random."""
        for _ in range(256):
            wanted = self._noun_count(kind, draws)
            self._add_nouns([], wanted, draws)  # the stream of draws is part of every kept result
            colour: str | None = None
            if self._held_pairs and ((wanted > 1 and draws.chance(0.5)) or not self._held_nouns):
                nouns = list(draws.pick(self._held_pairs))
                kind = kind if wanted > 1 else "pair"
                if draws.chance(0.5):
                    nouns.reverse()
            else:
                nouns = [draws.pick(self._held_nouns)]
                colour = held_out_background(nouns[0])
            scene = self._make(kind, self._add_nouns(nouns, wanted, draws), colour, draws)
            if scene is not None and held_out(scene):
                return scene
        chosen = draws.pick(self._held_nouns)  # only reached with very few nouns: one thing alone is always possible
        alone = self._make("one", [chosen], held_out_background(chosen), draws)
        assert alone is not None
        return alone

    def _make(self, kind: Kind, nouns: list[str], colour: str | None, draws: Draws) -> Scene | None:
        """Return a scene of these nouns on this background (None: one at random); None if not all can be seen."""
        common = self._common(nouns)
        if colour is None and common:
            colour = draws.pick(common)
        if colour not in common or colour is None:
            return None
        relation: Relation | None = None
        position: str | None = None
        counts = [1] * len(nouns)
        if kind == "one":
            sizes, places, position = single(draws, self.config.sizes or get_args(Size))
        elif kind == "copies":
            counts = [draws.between(2, self.config.max_count)]
            sizes, places = copies(counts[0], draws)
        elif kind == "pair":
            drawn: Relation = draws.pick(get_args(Relation))
            relation = drawn
            sizes, places = pair(drawn, draws)
        else:
            if len(nouns) == 2 and self.config.max_count > 1:
                counts[draws.below(2)] = draws.between(2, min(3, self.config.max_count))
            sizes, places = group(counts, draws)
        things = tuple(
            Thing(noun, draws.pick(self.styles_on[noun, colour]), len(spots), size, spots)
            for noun, size, spots in zip(nouns, sizes, places, strict=True)
        )
        return Scene(things, colour, relation, position)
