"""Sequences: documents, their layout, the attention mask, and batches. All other packages build on these contracts."""

from .batch import FILL, Batch, Images, collate, concatenate, shapes_of, stacked
from .document import Document, Image, Part, Text, images_alone, unconditional
from .layout import Layout, SequenceFormat, Span, count_positions, layout_document
from .mask import ImageAttention, Visible, visible
from .tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Document",
    "FILL",
    "Image",
    "ImageAttention",
    "Images",
    "Layout",
    "Part",
    "SequenceFormat",
    "Span",
    "Text",
    "Tokenizer",
    "Visible",
    "collate",
    "concatenate",
    "count_positions",
    "images_alone",
    "layout_document",
    "shapes_of",
    "stacked",
    "unconditional",
    "visible",
]
