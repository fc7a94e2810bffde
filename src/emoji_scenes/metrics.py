"""The metrics that emoji scenes bring to `transfuse evaluate`, by name."""

from __future__ import annotations

from transfuse.evaluation.context import Metric

from .composition import COMPOSITION
from .edit_scores import EDITING

METRICS: dict[str, Metric] = {metric.name: metric for metric in (COMPOSITION, EDITING)}
