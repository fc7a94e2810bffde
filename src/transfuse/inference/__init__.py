"""Inference: a cache, an engine that writes and draws, and a pipeline for people.

Importing this package, or `events`, imports no torch; the rest is imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .events import Done, Event, Failed, ImageEnd, ImageProgress, ImageStart, TextDelta

if TYPE_CHECKING:
    from .conversation import Conversation
    from .engine import Engine
    from .pipeline import Reply, TransfusionPipeline
    from .scoring import TokenScores, score
    from .sequence_state import Request, Start

__all__ = [
    "Conversation", "Done", "Engine", "Event", "Failed", "ImageEnd", "ImageProgress", "ImageStart", "Reply", "Request",
    "Start", "TextDelta", "TokenScores", "TransfusionPipeline", "score",
]  # fmt: skip

LAZY = {
    "engine": ("Engine",),
    "conversation": ("Conversation",),
    "pipeline": ("Reply", "TransfusionPipeline"),
    "scoring": ("TokenScores", "score"),
    "sequence_state": ("Request", "Start"),
}


def __getattr__(name: str) -> Any:
    for module, names in LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
