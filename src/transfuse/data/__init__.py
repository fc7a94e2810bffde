"""Data: sources of documents, their mixture, the loader; data sets on disk. The bundled world is in `data.world`."""

from .dataset import DamagedError, DataSet
from .faults import FaultLog
from .loader import Finish, StepLoader, unchanged
from .mixing import Ingredient, Mixture
from .remote import Cache
from .rows import Rows
from .sources import (
    EditConfig,
    PairConfig,
    SceneEdits,
    ScenePairs,
    Source,
    Texts,
    interleaved_document,
    pair_document,
)
from .stored import StoredPictures, StoredTexts

__all__ = [
    "Cache",
    "DamagedError",
    "DataSet",
    "EditConfig",
    "FaultLog",
    "Ingredient",
    "Mixture",
    "PairConfig",
    "Rows",
    "SceneEdits",
    "ScenePairs",
    "Source",
    "Finish",
    "StepLoader",
    "unchanged",
    "StoredPictures",
    "StoredTexts",
    "Texts",
    "interleaved_document",
    "pair_document",
]
