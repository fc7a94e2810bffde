"""Data: sources of documents, their mixture, the loader. The bundled world is in `data.world`."""

from .loader import StepLoader
from .mixing import Mixture
from .sources import PairConfig, ScenePairs, Source, Texts, pair_document

__all__ = ["Mixture", "PairConfig", "ScenePairs", "Source", "StepLoader", "Texts", "pair_document"]
