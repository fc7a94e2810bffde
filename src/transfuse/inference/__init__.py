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

MODULE_OF = {
    "Conversation": "conversation", "Engine": "engine", "Reply": "pipeline", "Request": "sequence_state",
    "Start": "sequence_state", "TokenScores": "scoring", "TransfusionPipeline": "pipeline", "score": "scoring",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in MODULE_OF:
        return getattr(import_module(f".{MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
