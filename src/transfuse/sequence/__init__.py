"""The sequence: documents, their layout, what sees what, packing. Everything else builds on these contracts."""

from .document import Document, Image, Part, Text, images_alone, unconditional
from .layout import Grammar, Layout, Span, lay_out, positions
from .mask import ImageAttention, Visible, visible
from .packing import FILL, LISTED, Batch, collate, concatenate, stacked
from .tokenizer import Tokenizer

__all__ = [
    "positions",
    "Batch",
    "Document",
    "FILL",
    "Grammar",
    "Image",
    "ImageAttention",
    "LISTED",
    "Layout",
    "Part",
    "Span",
    "Text",
    "Tokenizer",
    "Visible",
    "collate",
    "concatenate",
    "images_alone",
    "lay_out",
    "stacked",
    "unconditional",
    "visible",
]
