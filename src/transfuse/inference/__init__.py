"""Inference: a cache, an engine that writes and draws, a pipeline for people."""

from .conversation import Conversation
from .engine import Engine
from .events import Done, Event, Failed, ImageEnd, ImageProgress, ImageStart, Request, Start, TextDelta
from .pipeline import Reply, TransfusionPipeline
from .scoring import TokenScores, score

__all__ = [
    "Conversation",
    "Done",
    "Engine",
    "Event",
    "Failed",
    "TokenScores",
    "ImageEnd",
    "ImageProgress",
    "ImageStart",
    "Reply",
    "Request",
    "Start",
    "TextDelta",
    "TransfusionPipeline",
    "score",
]
