"""The sequence: documents, their layout, what sees what, packing. Everything else builds on these contracts."""

from .document import Document, Image, Part, Text, images_alone, unconditional
from .layout import Grammar, Layout, Span, lay_out, positions
from .mask import ImageAttention, Visible, visible
from .packing import FILL, Batch, Images, collate, concatenate, shapes_of, stacked
from .tokenizer import Tokenizer

__all__ = [
    "positions",
    "Batch",
    "Document",
    "FILL",
    "Grammar",
    "Image",
    "ImageAttention",
    "Images",
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
    "shapes_of",
    "stacked",
    "unconditional",
    "visible",
]
