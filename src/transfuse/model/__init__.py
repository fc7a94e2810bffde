"""The networks: wiring in `transfusion`, parts in `layers`, `attention` and `image_adapter`."""

from .attention import Attend, Grouped, dense, flexible, for_batch
from .config import SIZES, ModelConfig, RopeScaling
from .image_adapter import group_by_shape, stack_group
from .transfusion import Output, Transfusion

__all__ = [
    "SIZES", "Attend", "Grouped", "ModelConfig", "Output", "RopeScaling", "Transfusion", "dense", "flexible",
    "for_batch", "group_by_shape", "stack_group",
]  # fmt: skip
