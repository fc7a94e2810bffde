"""Evaluation: what a model can do, in numbers with intervals, next to chance and to a reference."""

from .bench import EvalConfig, EvalContext, Metric, model_hash
from .confidence import Estimate, agreement_by_chance, bootstrap, share
from .open_set import OpenSetClassifier, bundled_classifier
from .recogniser import Recogniser, keep_recogniser, recogniser_identity, train_recogniser
from .registry import METRICS, SUITES, check, check_paper, evaluate, named, numbers
from .result import Drawing, Example, MetricResult, Result
from .scenes import CaptionResult, DrawingResult, caption_accuracy, draw_accuracy, held_out_scenes
from .text import TextResult, perplexity

__all__ = [
    "METRICS",
    "SUITES",
    "EvalContext",
    "Drawing",
    "Example",
    "MetricResult",
    "Metric",
    "EvalConfig",
    "Result",
    "check",
    "check_paper",
    "evaluate",
    "model_hash",
    "named",
    "numbers",
    "CaptionResult",
    "DrawingResult",
    "Estimate",
    "OpenSetClassifier",
    "Recogniser",
    "TextResult",
    "agreement_by_chance",
    "bootstrap",
    "bundled_classifier",
    "caption_accuracy",
    "draw_accuracy",
    "held_out_scenes",
    "keep_recogniser",
    "perplexity",
    "recogniser_identity",
    "share",
    "train_recogniser",
]
