"""Scenes of the bundled world as a source: as many captioned pictures as asked for, made on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...errors import UserError
from ...io import sha256
from ..bundled import SPRITE_FILE, World, WorldConfig, caption
from . import PER_PART, Fault, Part, Raw


class WorldReader:
    """Scene 0 and on, of the part of the world that is for training."""

    text_only = False

    def __init__(self, count: int, size: int) -> None:
        if count < 1:
            raise UserError("world: expected how many documents to make (--count N), found none; it never ends")
        self.size, self.total = size, count

    def contents(self) -> dict[str, str]:
        """The drawings of things; count and size are settings of the build."""
        return {SPRITE_FILE.name: sha256(SPRITE_FILE)}

    def parts(self) -> Iterable[Part]:
        for start in range(0, self.total, PER_PART):
            numbers = range(start, min(start + PER_PART, self.total))
            yield Part(numbers, len(numbers))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        world = World(WorldConfig(size=self.size))
        for number in part.what:
            scene = world.scene(number)
            yield Raw(f"scene-{number}", (world.render(scene), caption(scene, number)), pair=True)
