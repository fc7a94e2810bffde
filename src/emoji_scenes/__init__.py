"""Endless pictures of well-known things with exact words about them; `README.md` has examples.

Drawings come from icon sets under the Apache-2.0 and MIT licences, definitions from WordNet: see NOTICE.
"""

from __future__ import annotations

from .editing import Edit, edit
from .language import caption, colours_in, glosses, nouns_in, questions
from .nouns import DISTINCT, NOUNS, PALETTE, STYLES, background_of
from .scenes import Scene, World, WorldConfig, held_out, held_out_background, held_out_pair

__all__ = [
    "DISTINCT",
    "NOUNS",
    "PALETTE",
    "STYLES",
    "Edit",
    "Scene",
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
