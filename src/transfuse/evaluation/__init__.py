"""Evaluation: what a model can do, in numbers with intervals, next to chance and to a reference.

context = EvalContext(pipe, "a model", folder, scorer)       # scorer: what a data set brings, or None
for result in evaluate(context, named(["quick"])): ...
"""

from .confidence import Estimate, agreement_by_chance, bootstrap, share
from .context import Drawing, EvalConfig, EvalContext, Example, Metric, MetricResult, Result, Scorer, model_hash
from .registry import SUITES, all_metrics, check, check_paper, evaluate, named, numbers
from .text import perplexity

__all__ = [
    "SUITES", "Drawing", "Estimate", "EvalConfig", "EvalContext", "Example", "Metric", "MetricResult", "Result",
    "Scorer", "agreement_by_chance", "all_metrics", "bootstrap", "check", "check_paper", "evaluate", "model_hash",
    "named", "numbers", "perplexity", "share",
]  # fmt: skip
