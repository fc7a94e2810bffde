"""Scenes: what is shown, where, and on what colour; as a pure function of a sample's index.

A scene says nothing about pixels. ``World.scene(index)`` makes one, ``World.render(scene)`` draws it at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from transfuse.draws import Draws, stable_hash

from .layout import Place, Size, copies, group, pair, single
from .nouns import DISTINCT, NOUNS
from .palette import PALETTE
from .sprites import STYLES, sprites

Relation = Literal["left of", "right of", "above", "below", "next to"]
Kind = Literal["one", "copies", "pair", "group"]
Split = Literal["train", "heldout"]

#: How often each kind of scene comes, in hundredths.
KIND_SHARES: dict[Kind, int] = {"one": 40, "copies": 18, "pair": 27, "group": 15}
#: One unordered pair of nouns in this many is held out.
PAIRS_PER_HELD_OUT = 10


@dataclass(frozen=True, slots=True)
class Thing:
    """``count`` copies of one noun in one style and size; ``places`` has one square for each copy."""

    noun: str
    style: str
    count: int
    size: Size
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A full description of a picture, whatever its size in pixels.

    ``relation`` holds between the two things, in order: things[0] is "left of" things[1]. ``position`` ("top left",
    "top", "middle", ...) is set when one thing was put in a nameable place.
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

    ``size``: pixels a side. ``nouns``: those to use; None for all, a number for that many of the easiest to tell apart
    at 32 pixels. ``max_objects``: most different things in a scene. ``max_count``: most copies of one thing; there are
    never more than four drawings in all. ``styles``, ``backgrounds``: None for all. ``kinds``: of scenes, in their
    usual shares; None for all. ``split``: "train" never shows a held-out combination, "heldout" always shows one.
    ``seed``: another seed, other scenes; the held-out set stays.

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
        _whole("size", self.size, 16, 1024)
        _whole("max_objects", self.max_objects, 1, 3)
        _whole("max_count", self.max_count, 1, 4)
        if isinstance(self.nouns, int):
            _whole("nouns", self.nouns, 1, len(NOUNS))
        known = {"nouns": NOUNS, "styles": STYLES, "backgrounds": PALETTE}
        for field, names in {**known, "sizes": get_args(Size), "kinds": get_args(Kind)}.items():
            value = getattr(self, field)
            if value is not None and not isinstance(value, int):
                object.__setattr__(self, field, _names(field, value, tuple(names)))
        if self.split not in get_args(Split):
            raise ValueError(f"WorldConfig.split: expected 'train' or 'heldout', found {self.split!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"WorldConfig.seed: expected a whole number, found {self.seed!r}")

    @property
    def noun_names(self) -> tuple[str, ...]:
        """The nouns in use, by name."""
        if isinstance(self.nouns, int):
            ordered = DISTINCT + tuple(noun for noun in NOUNS if noun not in DISTINCT)
            return ordered[: self.nouns]
        return tuple(NOUNS) if self.nouns is None else self.nouns


def _whole(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"WorldConfig.{field}: expected a whole number from {low} to {high}, found {value!r}")


def _names(field: str, value: object, known: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(f"WorldConfig.{field}: expected one or more names, found {value!r}")
    for name in value:
        if name not in known:
            hint = ", ".join(known) if len(known) < 20 else f"one of the {len(known)} in emoji_scenes.NOUNS"
            raise ValueError(f"WorldConfig.{field}: expected {hint}, found {name!r}")
    if len(set(value)) < len(value):
        raise ValueError(f"WorldConfig.{field}: expected each name once, found {value!r}")
    return tuple(value)


@cache
def held_out_background(noun: str) -> str:
    """The one background colour that training never shows this noun on.

    Fixed for ever by the noun's name: of the colours it can be seen on, the one whose hash comes first.
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
    """Scenes without end. ``scene(index)`` depends on the configuration and the index alone, not on earlier calls.

    A noun is shown only on backgrounds it can be seen on, by one rule (``palette.visible_on``): in the chosen style at
    least 60 % of its pixels differ from the background by at least 100 in RGB distance.
    """

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config = config or WorldConfig()
        self.nouns = config.noun_names
        self._sprites = sprites()
        styles, colours = config.styles or STYLES, config.backgrounds or tuple(PALETTE)
        self.backgrounds = colours
        #: (noun, background) -> the styles in which the noun can be seen there.
        self._styles = {
            (noun, colour): seen
            for noun in self.nouns
            for colour in colours
            if (seen := tuple(s for s in self._sprites.styles_of[noun] if s in styles and self.sees(noun, s, colour)))
        }
        self._backgrounds = {noun: tuple(c for c in colours if (noun, c) in self._styles) for noun in self.nouns}
        self._trained = {n: tuple(c for c in cs if c != held_out_background(n)) for n, cs in self._backgrounds.items()}
        self._check()

    def __reduce__(self) -> tuple[type[World], tuple[WorldConfig]]:
        """Workers get the configuration and load the sprites themselves: a sent copy of those would cost megabytes."""
        return World, (self.config,)

    def sees(self, noun: str, style: str, background: str) -> bool:
        """Return whether a noun drawn in a style can be seen on a background."""
        return background in self._sprites.seen_on[noun, style]

    def styles_on(self, noun: str, background: str) -> tuple[str, ...]:
        """The styles, of those in use, in which a noun can be seen on a background."""
        return self._styles.get((noun, background), ())

    def allows(self, scene: Scene) -> bool:
        """Return whether this world's split may show the scene: training shows nothing that is held out."""
        return self.config.split == "heldout" or not held_out(scene)

    def scene(self, index: int) -> Scene:
        """The scene of a sample index (0 and up): a pure function of the index and the configuration."""
        draws = Draws("scene", self.config.seed, self.config.split, index)
        kind = self._kind(draws)
        if self.config.split == "heldout":
            return self._held_out_scene(kind, draws)
        for _ in range(32):
            scene = self._make(kind, self._pick_nouns(kind, draws), None, draws)
            if scene is not None and not held_out(scene):
                return scene
        # So few nouns or colours that no such scene came up: one thing alone is always possible.
        chosen = draws.pick(self._shown)
        made = self._make("one", [chosen], draws.pick(self._trained[chosen]), draws)
        assert made is not None
        return made

    def render(self, scene: Scene, size: int | None = None) -> NDArray[np.uint8]:
        """The picture: uint8 [size, size, 3]; ``size`` in pixels, the configuration's unless given."""
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

    def _check(self) -> None:
        """Refuses a configuration that cannot show what it promises."""
        usable = self._trained if self.config.split == "train" else self._backgrounds
        self._shown = tuple(noun for noun in self.nouns if usable[noun])
        self._shares = self._possible()
        if not self._shares:
            raise ValueError(
                f"WorldConfig.kinds: expected one that {self.config.max_objects} objects and {self.config.max_count} "
                f"copies at most allow, found {', '.join(self.config.kinds or ())}"
            )
        if self.config.split == "train" and len(self._shown) < len(self.nouns):
            lost = next(noun for noun in self.nouns if not usable[noun])
            raise ValueError(
                f"WorldConfig.backgrounds: expected one on which {lost!r} can be seen and which is not held out for it "
                f"({held_out_background(lost)}), found {self.config.backgrounds}"
            )
        self._held_nouns: tuple[str, ...] = ()
        self._held_pairs: tuple[tuple[str, str], ...] = ()
        if self.config.split == "heldout":
            self._held_nouns = tuple(n for n in self.nouns if held_out_background(n) in self._backgrounds[n])
            if self.config.max_objects > 1:
                pairs = combinations(self._shown, 2)
                self._held_pairs = tuple(p for p in pairs if held_out_pair(*p) and self._common(p))
            if not self._held_nouns and not self._held_pairs:
                raise ValueError(
                    "WorldConfig.split: expected nouns and backgrounds that form a held-out combination, "
                    f"found none among {len(self.nouns)} nouns and backgrounds {self.config.backgrounds or 'all'}"
                )

    def _possible(self) -> list[tuple[Kind, int]]:
        """Return the shares of the kinds that this configuration can show."""
        config = self.config
        several = config.max_objects > 1 and len(self._shown) > 1
        possible = {"one": True, "copies": config.max_count > 1, "pair": several, "group": several}
        wanted = config.kinds or get_args(Kind)
        return [(kind, share) for kind, share in KIND_SHARES.items() if possible[kind] and kind in wanted]

    def _kind(self, draws: Draws) -> Kind:
        ticket = draws.below(sum(share for _, share in self._shares))
        for kind, share in self._shares:
            ticket -= share
            if ticket < 0:
                return kind
        raise AssertionError("the shares cover every ticket")

    def _pick_nouns(self, kind: Kind, draws: Draws) -> list[str]:
        """Different nouns, as many as the kind needs and there are."""
        wanted = {"one": 1, "copies": 1, "pair": 2, "group": self._group_size(draws) if kind == "group" else 0}[kind]
        return self._add_nouns([], wanted, draws)

    def _group_size(self, draws: Draws) -> int:
        """Three things, or two (of which one then comes in copies, where copies are wanted)."""
        three = self.config.max_objects > 2 and len(self._shown) > 2
        return 3 if three and (self.config.max_count == 1 or draws.chance(0.6)) else 2

    def _add_nouns(self, nouns: list[str], wanted: int, draws: Draws) -> list[str]:
        nouns = list(nouns)
        while len(nouns) < wanted:
            noun = draws.pick(self._shown)
            if noun not in nouns:
                nouns.append(noun)
        return nouns

    def _common(self, nouns: tuple[str, ...] | list[str]) -> tuple[str, ...]:
        """The backgrounds on which all of these nouns can be seen."""
        return tuple(c for c in self._backgrounds[nouns[0]] if all((noun, c) in self._styles for noun in nouns[1:]))

    def _held_out_scene(self, kind: Kind, draws: Draws) -> Scene:
        """A scene built around a held-out combination drawn at random."""
        for _ in range(256):
            wanted = len(self._pick_nouns(kind, draws))
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
        made = self._make("one", [chosen], held_out_background(chosen), draws)
        assert made is not None
        return made

    def _make(self, kind: Kind, nouns: list[str], colour: str | None, draws: Draws) -> Scene | None:
        """A scene of these nouns on this background (or one drawn at random); None if they cannot all be seen."""
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
            Thing(noun, draws.pick(self._styles[noun, colour]), len(spots), size, spots)
            for noun, size, spots in zip(nouns, sizes, places, strict=True)
        )
        return Scene(things, colour, relation, position)
