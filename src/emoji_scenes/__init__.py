"""Endless pictures of well-known things with exact words about them; `README.md` has examples.

Drawings come from icon sets under the Apache-2.0 and MIT licences, definitions from WordNet: see NOTICE.
"""

from __future__ import annotations

from .editing import Edit, EditKind, edit
from .language import Question, caption, colours_in, glosses, nouns_in, questions
from .layout import Place
from .nouns import DISTINCT, NOUNS, PALETTE, STYLES, Noun, background_of
from .scenes import Scene, Thing, World, WorldConfig, held_out, held_out_background, held_out_pair

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
