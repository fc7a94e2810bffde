"""The grammar of a mixed sequence, written once (Transfusion section 3).

A document `[Text("a crab"), Image(2x2 patches)]` becomes these positions:

    position       0    1    2     3    4   5   6   7   8    9
    input_ids     BOS   a   crab  BOI   .   .   .   .  EOI  EOS
    position_ids   0    1    2     3    4   5   6   7   8    9       restarts in each document
    image         -1   -1   -1    -1    0   0   0   0  -1   -1
    loss_mask      x    x    x     -    -   -   -   -   x    -       the next token is predicted from here
    visible       0:1  0:2  0:3   0:4  0:8 0:8 0:8 0:8 0:9  0:10     the keys this position attends to

BOI is a target like any token: the model itself decides when to draw. Nothing is predicted from BOI or from patches;
the sampler inserts EOI, so it is never a target. Patches run row by row, left to right.

In a Chameleon (arXiv 2405.09818) an image is a run of codes, and they are tokens like any other: `input_ids` holds
`first_code` plus the code, and each is predicted from the position before it, the first from BOI. The rest is the same,
EOI included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .document import Document, Image, Text


@dataclass(frozen=True)
class SequenceFormat:
    """The format of mixed sequences.

    bos, eos, boi, eoi   ids of the four special tokens
    patch_size           side of a patch, in latent elements
    first_code           token id of code 0 where images are codes; None where they are patches
    """

    bos: int
    eos: int
    boi: int
    eoi: int
    patch_size: int
    first_code: int | None = None

    def grid(self, image: Image) -> tuple[int, int]:
        """Return an image's rows and columns of patches.

        Raises ValueError for a latent that does not divide into patches, and for codes in place of a latent or the
        reverse.
        """
        shape = tuple(image.latent.shape)
        if image.is_codes != (self.first_code is not None) or len(shape) != (2 if image.is_codes else 3):
            expected = "latent [channel, row, column] of floats" if self.first_code is None else "codes [row, column]"
            raise ValueError(f"image: expected {expected}, found {image.latent.dtype} {shape}")
        height, width = image.latent.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise ValueError(
                f"image latent: expected rows and columns in multiples of the patch size {self.patch_size}, "
                f"found {height}x{width}"
            )
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class Span:
    """An image's place in a layout: its patches occupy positions `start` to `start + rows * columns`."""

    start: int
    rows: int
    columns: int
    image: Image

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def end(self) -> int:
        return self.start + self.patches


@dataclass(frozen=True)
class Layout:
    """One or more documents, position by position. All arrays are `[position]`.

    input_ids      token id; 0 at patches, where it has no meaning; `first_code` and up at codes
    position_ids   position for the rotary embedding, from 0 in each document
    document       index of the document
    image          index of the image, -1 for text
    loss_mask      True where the next token is predicted
    spans          one per image, in order
    samples        one per document: its number in the data set
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    document: np.ndarray
    image: np.ndarray
    loss_mask: np.ndarray
    spans: tuple[Span, ...]
    samples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


def count_positions(tokens: np.ndarray, patches: Iterable[int]) -> np.ndarray:
    """Return the lengths of closed documents with `tokens` text tokens and images of `patches` patches each."""
    return 2 + tokens + sum(2 + count for count in patches)


def layout_document(document: Document, fmt: SequenceFormat) -> Layout:
    """Lay out one document. An empty text part adds nothing; an empty document is BOS (and EOS, if closed).

    An open document that ends in an image ends with that image's EOI.

    Raises ValueError for a latent that does not divide into patches.
    """
    ids: list[int] = [fmt.bos]
    learned: list[bool] = [False]  # learned[p]: the token at p is a target
    image_at: list[int] = [-1]
    spans: list[Span] = []
    for part in document.parts:
        if isinstance(part, Text):
            ids.extend(part.ids)
            learned.extend([part.predict and document.predict] * len(part.ids))
            image_at.extend([-1] * len(part.ids))
        else:
            rows, columns = fmt.grid(part)
            span = Span(len(ids) + 1, rows, columns, part)
            codes = [0] * span.patches
            if fmt.first_code is not None:
                codes = (part.latent.flatten() + fmt.first_code).tolist()
            ids.extend([fmt.boi, *codes, fmt.eoi])
            learned.extend([document.predict, *[part.is_codes and part.target] * span.patches, False])
            image_at.extend([-1, *[len(spans)] * span.patches, -1])
            spans.append(span)
    if document.closed:
        ids.append(fmt.eos)
        learned.append(document.predict)
        image_at.append(-1)
    length = len(ids)
    loss_mask = np.zeros(length, dtype=bool)
    # EOI and patches are never targets, so nothing is predicted from a patch, or from BOI before one.
    loss_mask[:-1] = learned[1:]
    return Layout(
        input_ids=np.asarray(ids, dtype=np.int64),
        position_ids=np.arange(length, dtype=np.int64),
        document=np.zeros(length, dtype=np.int64),
        image=np.asarray(image_at, dtype=np.int64),
        loss_mask=loss_mask,
        spans=tuple(spans),
        samples=(document.sample,),
    )
