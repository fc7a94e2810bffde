"""The networks. Wiring in `transfusion`, parts in `layers`, `attention`, `transformer` and `patches`."""

from .attention import Attend, Grouped, dense, flexible, for_batch
from .config import SIZES, ModelConfig
from .layers import pack
from .patches import by_shape, those
from .transfusion import Output, Read, Transfusion

__all__ = [
    "SIZES",
    "Attend",
    "Grouped",
    "ModelConfig",
    "Output",
    "Read",
    "Transfusion",
    "by_shape",
    "dense",
    "flexible",
    "for_batch",
    "pack",
    "those",
]
