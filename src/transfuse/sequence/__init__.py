"""Sequences: documents, their layout, the attention mask, and batches. All other packages build on these contracts."""

from .batch import FILL, Batch, collate, concatenate
from .layout import (
    Document,
    Image,
    ImageAttention,
    Images,
    Layout,
    Part,
    Positions,
    SequenceFormat,
    Text,
    count_positions,
    gaps,
    images_alone,
    join_positions,
    layout_document,
    shapes_of,
    stacked,
    unconditional,
    visible,
)  # fmt: skip
from .tokenizer import Tokenizer

__all__ = [
    "FILL", "Batch", "Document", "Image", "ImageAttention", "Images", "Layout", "Part", "Positions", "SequenceFormat",
    "Text", "Tokenizer", "collate", "concatenate", "count_positions", "gaps", "images_alone",
    "join_positions", "layout_document", "shapes_of", "stacked", "unconditional", "visible",
]  # fmt: skip
