"""The grammar of a mixed sequence, written once (Transfusion section 3).

A document `[Text("a crab"), Image(2x2 patches)]` becomes these positions:

    position   0    1    2     3    4   5   6   7   8    9
    token     BOS   a   crab  BOI   .   .   .   .  EOI  EOS
    rotary     0    1    2     3    4   5   6   7   8    9       restarts in each document
    image     -1   -1   -1    -1    0   0   0   0  -1   -1
    predict    x    x    x     -    -   -   -   -   x    -       the *next* token is learned from here
    visible   0:1  0:2  0:3   0:4  0:8 0:8 0:8 0:8 0:9  0:10     the keys this position sees

BOI is a target like any token: the model itself decides when to draw. From BOI and from patches nothing is predicted;
EOI is put there by the sampler, so it is never a target. Patches run row by row, left to right.

In a Chameleon (arXiv 2405.09818) an image is codes, and they are tokens like any other: `token` holds `first_code` plus
the code, and each is predicted from the position before it, the first from BOI. All else stays the same, EOI included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .document import Document, Image, Text


@dataclass(frozen=True)
class Grammar:
    """What `lay_out` must know: the ids of the four special tokens, the side of a patch in latent elements, and the id
    of code 0 where images are codes (None where they are patches)."""

    bos: int
    eos: int
    boi: int
    eoi: int
    patch_size: int
    first_code: int | None = None

    def grid(self, image: Image) -> tuple[int, int]:
        """Rows and columns of patches. Raises ValueError where the latent does not divide into patches, or where codes
        were expected and a latent was found, or the other way round."""
        shape = tuple(image.latent.shape)
        if image.coded != (self.first_code is not None) or len(shape) != (2 if image.coded else 3):
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
    """Where an image lies: its patches are positions `start` to `start + rows * columns`."""

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
    """A document, position by position. All arrays are `[position]`.

    token     token id; 0 at patches, where it means nothing; `first_code` and up at codes
    rotary    position number for the rotary embedding, from 0 in each document
    document  number of the document
    image     number of the image, -1 for text
    predict   whether the next token is predicted from here
    spans     one per image, in order
    samples   one per document: the data set's number
    """

    token: np.ndarray
    rotary: np.ndarray
    document: np.ndarray
    image: np.ndarray
    predict: np.ndarray
    spans: tuple[Span, ...]
    samples: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.token)


def positions(tokens: np.ndarray, patches: Iterable[int]) -> np.ndarray:
    """How many positions `lay_out` gives closed documents of so many tokens of text, with images of so many patches."""
    return 2 + tokens + sum(2 + count for count in patches)


def lay_out(document: Document, grammar: Grammar) -> Layout:
    """Lay one document out. An empty text part adds nothing; an empty document is BOS (and EOS, if closed).

    An open document that ends in an image ends with that image's EOI. Raises ValueError for a latent that does not
    divide into patches.
    """
    token: list[int] = [grammar.bos]
    learned: list[bool] = [False]  # learned[p]: the token at p is a target
    image_at: list[int] = [-1]
    spans: list[Span] = []
    for part in document.parts:
        if isinstance(part, Text):
            token.extend(part.ids)
            learned.extend([part.predict and document.predict] * len(part.ids))
            image_at.extend([-1] * len(part.ids))
        else:
            rows, columns = grammar.grid(part)
            span = Span(len(token) + 1, rows, columns, part)
            codes = [0] * span.patches
            if grammar.first_code is not None:
                codes = (part.latent.flatten() + grammar.first_code).tolist()
            token.extend([grammar.boi, *codes, grammar.eoi])
            learned.extend([document.predict, *[part.coded and part.target] * span.patches, False])
            image_at.extend([-1, *[len(spans)] * span.patches, -1])
            spans.append(span)
    if document.closed:
        token.append(grammar.eos)
        learned.append(document.predict)
        image_at.append(-1)
    length = len(token)
    predict = np.zeros(length, dtype=bool)
    # EOI and patches are never targets, so nothing is predicted from a patch, or from BOI before one.
    predict[:-1] = learned[1:]
    return Layout(
        token=np.asarray(token, dtype=np.int64),
        rotary=np.arange(length, dtype=np.int64),
        document=np.zeros(length, dtype=np.int64),
        image=np.asarray(image_at, dtype=np.int64),
        predict=predict,
        spans=tuple(spans),
        samples=(document.sample,),
    )
