"""The bundled world: endless pictures of well-known things with exact words about them.

    from emoji_scenes import World, WorldConfig, caption, edit, held_out, questions

    world = World(WorldConfig(size=64, nouns=24))     # the 24 nouns easiest to tell apart
    scene = world.scene(7)                            # always the same scene for 7
    image = world.render(scene)                       # uint8 [64, 64, 3]
    caption(scene, 7)                                 # "a crab to the left of a balloon on a red background"
    change = edit(scene, world, 7)                    # change.instruction, world.render(change.target)
    questions(scene, 7)                               # [Question("What is shown?", "a crab and a balloon"), ...]

    unseen = World(WorldConfig(size=64, nouns=24, split="heldout"))
    held_out(unseen.scene(0))                         # True: a combination that training never shows

Drawings come from icon sets under the Apache-2.0 and MIT licences, definitions from WordNet: see NOTICE.
"""

from __future__ import annotations

from .editing import Edit, EditKind, edit
from .glosses import glosses
from .language import Question, caption, colours_in, nouns_in, questions
from .layout import Place
from .nouns import DISTINCT, NOUNS, Noun
from .palette import PALETTE, background_of
from .scenes import Scene, Thing, World, WorldConfig, held_out, held_out_background, held_out_pair
from .sprites import STYLES

__all__ = [
    "DISTINCT",
    "NOUNS",
    "PALETTE",
    "STYLES",
    "Edit",
    "EditKind",
    "Noun",
    "Place",
    "Question",
    "Scene",
    "Thing",
    "World",
    "WorldConfig",
    "background_of",
    "caption",
    "colours_in",
    "edit",
    "glosses",
    "held_out",
    "held_out_background",
    "held_out_pair",
    "nouns_in",
    "questions",
]
