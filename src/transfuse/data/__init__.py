"""Data: sources of documents, their mixture, the loader; data sets on disk. `data.bundled` has the bundled data set."""

from .dataset import CorruptSample, CorruptSampleError, DataSet
from .loader import CorruptLog, Finish, StepLoader, unchanged
from .mixture import Mixture, MixtureComponent
from .packing import Packer
from .remote import Cache
from .scenes import EditConfig, SceneDialogues, SceneEdits, ScenePairs
from .sources import (
    PairConfig,
    Source,
    StoredDialogues,
    StoredImages,
    StoredTexts,
    Texts,
    has_dialogues,
    interleaved_document,
    pair_document,
)

__all__ = [
    "Cache",
    "CorruptLog",
    "CorruptSample",
    "CorruptSampleError",
    "DataSet",
    "EditConfig",
    "Finish",
    "Mixture",
    "MixtureComponent",
    "Packer",
    "PairConfig",
    "SceneDialogues",
    "StoredDialogues",
    "has_dialogues",
    "SceneEdits",
    "ScenePairs",
    "Source",
    "StepLoader",
    "StoredImages",
    "StoredTexts",
    "Texts",
    "interleaved_document",
    "pair_document",
    "unchanged",
]
