"""The data set that comes with this distribution, by name: the only module of `transfuse` that imports `emoji_scenes`.

    from ..data.bundled import World, WorldConfig        # emoji_scenes is imported here, not with `transfuse.data`

Everything else works without `emoji_scenes`: training, evaluation and serving on data sets of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # read by type checkers alone, and so never used here
    from emoji_scenes import NOUNS, Edit, World, WorldConfig, caption, edit, glosses  # noqa: F401
    from emoji_scenes.accuracy import (  # noqa: F401
        CaptionResult,
        DrawingResult,
        caption_accuracy,
        draw_accuracy,
        held_out_scenes,
    )
    from emoji_scenes.dialogues import MOST_IMAGES, TEMPLATE, Turn, dialogue, vocabulary  # noqa: F401
    from emoji_scenes.nouns import SPRITE_FILE  # noqa: F401
    from emoji_scenes.scene_classifier import (  # noqa: F401
        CLASSIFIER_STEPS,
        SceneClassifier,
        bundled_classifier,
        keep_scene_classifier,
    )
    from emoji_scenes.scenes import Scene, Split  # noqa: F401
    from emoji_scenes.scorer import SceneScorer  # noqa: F401

MODULES = {
    "emoji_scenes": "NOUNS Edit World WorldConfig caption edit glosses",
    "emoji_scenes.accuracy": "CaptionResult DrawingResult caption_accuracy draw_accuracy held_out_scenes",
    "emoji_scenes.dialogues": "MOST_IMAGES TEMPLATE Turn dialogue vocabulary",
    "emoji_scenes.nouns": "SPRITE_FILE",
    "emoji_scenes.scene_classifier": "CLASSIFIER_STEPS SceneClassifier bundled_classifier keep_scene_classifier",
    "emoji_scenes.scenes": "Scene Split",
    "emoji_scenes.scorer": "SceneScorer",
}
"""the names that `transfuse` uses, by the module that defines them"""


def __getattr__(name: str) -> Any:
    """Import `emoji_scenes` when one of its names is first used."""
    for module, names in MODULES.items():
        if name in names.split():
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def data_set_metrics() -> Mapping[str, Any]:
    """Return the `evaluation.Metric`s that data sets bring, by name; none where `emoji_scenes` is not installed."""
    try:
        if find_spec("emoji_scenes") is None:
            return {}
    except ValueError:  # a blocked module: None in sys.modules
        return {}
    metrics: Mapping[str, Any] = import_module("emoji_scenes.metrics").METRICS
    dialogues = import_module("emoji_scenes.dialogue_metric").DIALOGUES
    return {**metrics, dialogues.name: dialogues}
