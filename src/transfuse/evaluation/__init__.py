"""Evaluation: what a model can do, in numbers with intervals, beside what is possible and what chance gives."""

from .interval import Measured, agreement_by_chance, bootstrap, share
from .recogniser import Recogniser, keep_recogniser, recogniser_identity, train_recogniser
from .scenes import CaptionResult, DrawingResult, caption_accuracy, draw_accuracy, held_out_scenes
from .text import TextResult, perplexity

__all__ = [
    "CaptionResult",
    "DrawingResult",
    "Measured",
    "Recogniser",
    "TextResult",
    "agreement_by_chance",
    "bootstrap",
    "caption_accuracy",
    "draw_accuracy",
    "held_out_scenes",
    "keep_recogniser",
    "perplexity",
    "recogniser_identity",
    "share",
    "train_recogniser",
]
