"""The format of a mixed sequence, defined once (Transfusion section 3): documents, their positions, who sees whom.

    Document([Text(ids of "a red crab"), Image(latent)])         draw: the caption comes first
    Document([Image(latent, max_timestep=500), Text(ids)])       caption: the image comes first, its noise is capped
    Document([Text(ids)], closed=False)                          a prompt: no end-of-sequence, the model continues

`layout_document` adds special tokens, masks and positions. `[Text("a crab"), Image(2x2 patches)]` becomes:

    position       0    1    2     3    4   5   6   7   8    9
    input_ids     BOS   a   crab  BOI   .   .   .   .  EOI  EOS
    position_ids   0    1    2     3    4   5   6   7   8    9       restarts in each document
    image         -1   -1   -1    -1    0   0   0   0  -1   -1
    loss_mask      x    x    x     -    -   -   -   -   x    -       the next token is predicted from here
    visible       0:1  0:2  0:3   0:4  0:8 0:8 0:8 0:8 0:9  0:10     the keys this position attends to

BOI is a target like any token: the model itself decides when to draw. Nothing is predicted from BOI or from patches;
the sampler inserts EOI, so it is never a target. Patches run row by row, left to right.

With `SequenceFormat.positions = "2d"` a patch has three rotary positions, as in M-RoPE (Qwen2-VL, arXiv 2409.12191,
section 2.1): its image's place in the sequence, its row, and its column. The three of any token are equal.

    in sequence    0    1    2     3    4   4   4   4   8    9
    row            0    1    2     3  4.5 4.5 6.5 6.5   8    9       an image takes as many positions as it has patches,
    column         0    1    2     3  4.5 6.5 4.5 6.5   8    9       but at most 16: `IMAGE_SPAN`

With `SequenceFormat.clean_copy` an image that is learned and has more after it stands twice, as in BAGEL (arXiv
2505.14683): clean in its place, for what follows, and noised at the document's end, seen by itself alone.
`[Text("a crab"), Image(2x2 patches), Text("on red")]` becomes, with the noised patches written as n:

    position       0    1    2     3    4   5   6   7   8    9   10   11    12   13   14   15
    input_ids     BOS   a   crab  BOI   .   .   .   .  EOI   on  red  EOS    n    n    n    n
    position_ids   0    1    2     3    4   5   6   7   8    9   10   11     4    5    6    7
    visible       0:1  0:2  0:3   0:4  0:8 0:8 0:8 0:8 0:9 0:10 0:11 0:12  0:4 and 12:16, each of them

In a Chameleon (arXiv 2405.09818) an image is a run of codes, and they are tokens like any other: `input_ids` holds
`first_code` plus the code, and each is predicted from the position before it, the first from BOI.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

ImageAttention = Literal["bidirectional", "causal"]
Positions = Literal["raster", "2d"]

IMAGE_SPAN = 16
"""rotary positions that the longer side of an image spans, whatever its resolution, if it has as many patches"""

Images = torch.Tensor | Sequence[torch.Tensor]
"""One tensor per image, or one stacked tensor if all have the same shape: splitting hundreds of small tensors and
stacking them again would stall a GPU."""


def stacked(tensors: Sequence[torch.Tensor]) -> Images:
    """Stack tensors of one shape and device; return others as a tuple."""
    alike = len({(tensor.shape, tensor.device) for tensor in tensors}) == 1
    return torch.stack(list(tensors)) if alike else tuple(tensors)


def shapes_of(images: Images) -> list[torch.Size]:
    """Return the shape of each image."""
    return [images.shape[1:]] * len(images) if isinstance(images, torch.Tensor) else [image.shape for image in images]


@dataclass(frozen=True)
class Text:
    """A run of token ids. `predict`: the next-token loss includes them."""

    ids: tuple[int, ...]
    predict: bool = True


@dataclass(frozen=True, eq=False)
class Image:
    """An image, as an autoencoder's latent.

    latent        `[channel, row, column]`, float; rows and columns must be multiples of the patch size. Or the codes of
                  a VQ autoencoder, int64 `[row, column]`: each becomes a token (Chameleon).
    target        True: the image loss includes it (it is noised, or its codes are predicted). False: clean context.
    max_timestep  the largest timestep drawn for it in training (Transfusion section 4.3.4); None: no cap.
    pixels        uint8 `[row, column, 3]` of an image that is encoded later: its latent is a shape on the meta device.
    content       (top, bottom, left, right) of what is not padding in its latent or codes: only that is in the loss.
                  None: all of it.
    predict       the next-token loss includes the BOI before it; False for images that somebody else shows.
    """

    latent: torch.Tensor
    target: bool = True
    max_timestep: int | None = None
    pixels: torch.Tensor | None = None
    content: tuple[int, int, int, int] | None = None
    predict: bool = True

    def __post_init__(self) -> None:
        if self.max_timestep is not None and self.max_timestep < 1:
            raise ValueError(f"image: max_timestep: expected at least 1, found {self.max_timestep}")

    @property
    def is_codes(self) -> bool:
        """True for a VQ autoencoder's codes, False for a latent."""
        return not self.latent.is_floating_point()


Part = Text | Image


@dataclass(frozen=True)
class Document:
    """A training sample, a prompt or a conversation: an ordered list of parts.

    sample   its number in the data set; with the run's seed it fixes the noise its images receive.
    closed   True: it ends with the end-of-sequence token. False: it is a prompt and stays open.
    predict  False: no token is a target, not even the markers (the caption-dropped sample of guidance).
    source   name of the data set it comes from.
    first    id that begins it in place of BOS, as in a chat template; None: BOS.
    """

    parts: Sequence[Part]
    sample: int = 0
    closed: bool = True
    predict: bool = True
    source: str = field(default="", compare=False)
    first: int | None = None

    @property
    def images(self) -> list[Image]:
        """The image parts, in order."""
        return [part for part in self.parts if isinstance(part, Image)]


def unconditional(document: Document) -> Document:
    """Return the document without anything before its last image, and without text targets.

    Both training's caption drop and sampling's unconditional branch call this function, so guidance subtracts exactly
    what the model was trained on.

    Raises ValueError for a document without an image.
    """
    if not document.images:
        raise ValueError("unconditional(document): expected a document with an image, found text only")
    return replace(document, parts=document.images[-1:], predict=False, first=None)


def images_alone(document: Document) -> Document:
    """Return the document's images up to the last one, without text and without text targets.

    This is the middle branch of image guidance (Chameleon; InstructPix2Pix), in training and in sampling.

    Raises ValueError for a document without an image.
    """
    if not document.images:
        raise ValueError("images_alone(document): expected a document with an image, found text only")
    return replace(document, parts=document.images, predict=False, first=None)


@dataclass(frozen=True)
class SequenceFormat:
    """The format of mixed sequences.

    bos, eos, boi, eoi   ids of the four special tokens
    patch_size           side of a patch, in latent elements
    first_code           token id of code 0 where images are codes; None where they are patches
    positions            rotary positions of patches: "raster", one after another, or "2d", in sequence, row and column
    clean_copy           an image that is a target and has more after it stands clean in its place, and noised at the
                         document's end; False: it stands once, noised, and what follows sees it so

    Raises ValueError for a clean copy of codes, which are read as they are.
    """

    bos: int
    eos: int
    boi: int
    eoi: int
    patch_size: int
    first_code: int | None = None
    positions: Positions = "raster"
    clean_copy: bool = False

    def __post_init__(self) -> None:
        if self.clean_copy and self.first_code is not None:
            raise ValueError("clean_copy: expected False where images are codes, found True")

    def grid(self, image: Image) -> tuple[int, int]:
        """Return an image's rows and columns of patches.

        Raises ValueError for a latent that does not divide into patches, and for codes in place of a latent or the
        reverse.
        """
        shape = tuple(image.latent.shape)
        if image.is_codes != (self.first_code is not None) or len(shape) != (2 if image.is_codes else 3):
            expected = "latent [channel, row, column] of floats" if self.first_code is None else "codes [row, column]"
            raise ValueError(f"image: expected {expected}, found {image.latent.dtype} {shape}")
        height, width = shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise ValueError(
                f"image latent: expected rows and columns in multiples of the patch size {self.patch_size}, "
                f"found {height}x{width}"
            )
        return height // self.patch_size, width // self.patch_size

    def span(self, rows: int, columns: int) -> int:
        """Return the rotary positions that an image takes: the text after it resumes that many further on."""
        return rows * columns if self.positions == "raster" else min(rows * columns, IMAGE_SPAN)

    def patch_positions(self, first: int, rows: int, columns: int) -> np.ndarray:
        """Return the rotary positions of an image's patches, the first of which would be `first` if it were a token.

        "raster": int64 `[P]`. "2d": float32 `[P, 3]`, in sequence, row and column. The longer side takes the whole
        span, so a finer grid falls between the positions of a coarser one (position interpolation, arXiv 2306.15595);
        the shorter side is centred on it, at the same scale. An image of 16 x 16 patches has M-RoPE's own positions,
        and one of a single patch a token's.
        """
        if self.positions == "raster":
            return np.arange(first, first + rows * columns)
        span = self.span(rows, columns)
        step, middle = span / max(rows, columns), first + (span - 1) / 2
        row = middle + step * (np.arange(rows) - (rows - 1) / 2)
        column = middle + step * (np.arange(columns) - (columns - 1) / 2)
        grid = np.meshgrid(row, column, indexing="ij")
        return np.stack([np.full(rows * columns, first), *(side.ravel() for side in grid)], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Span:
    """An image's place in a layout: its patches occupy positions `start` to `end`, exclusive.

    copy_of: of a noised copy, the number of the span where the image stands clean, in its place; None: no copy.
    """

    start: int
    end: int
    image: Image
    copy_of: int | None = None


@dataclass(frozen=True)
class Layout:
    """One or more documents, position by position. All arrays are `[position]`.

    input_ids      token id; 0 at patches, where it has no meaning; `first_code` and up at codes
    position_ids   position for the rotary embedding, from 0 in each document; a noised copy has its original's.
                   int64, or float32 `[position, 3]` in a layout with images where `SequenceFormat.positions` is "2d"
    document       index of the document
    image          index of the image, -1 for text
    loss_mask      True where the next token is predicted
    spans          one per image, in order, noised copies after all others of their document
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

    @property
    def next_position(self) -> int:
        """The rotary position of a token that follows the layout."""
        return int(self.position_ids[-1].max()) + 1


def join_positions(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate rotary positions; where some are `[P, 3]`, those of tokens, `[N]`, are repeated on all three axes."""
    if any(piece.ndim == 2 for piece in pieces):
        pieces = [
            piece if piece.ndim == 2 else np.repeat(piece[:, None], 3, axis=1).astype(np.float32) for piece in pieces
        ]
    return np.concatenate(pieces)


def count_positions(tokens: np.ndarray, patches: Iterable[int]) -> np.ndarray:
    """Return the lengths of closed documents with `tokens` text tokens and images of `patches` patches each."""
    return 2 + tokens + sum(2 + count for count in patches)


def layout_document(document: Document, fmt: SequenceFormat) -> Layout:
    """Lay out one document. An empty text part adds nothing; an empty document is BOS (and EOS, if closed).

    An open document that ends in an image ends with that image's EOI.

    Raises ValueError for a latent that does not divide into patches.
    """
    ids: list[int] = [fmt.bos if document.first is None else document.first]
    learned: list[bool] = [False]  # learned[p]: the token at p is a target
    image_at: list[int] = [-1]
    spans: list[Span] = []
    copied: list[tuple[int, Image]] = []  # number of the span, and the image as it is noised
    filled = [place for place, part in enumerate(document.parts) if isinstance(part, Image) or part.ids]
    for place, part in enumerate(document.parts):
        if isinstance(part, Text):
            ids.extend(part.ids)
            learned.extend([part.predict and document.predict] * len(part.ids))
            image_at.extend([-1] * len(part.ids))
        else:
            rows, columns = fmt.grid(part)
            patches = rows * columns
            codes = [0] * patches if fmt.first_code is None else (part.latent.flatten() + fmt.first_code).tolist()
            if fmt.clean_copy and part.target and place < filled[-1]:
                copied.append((len(spans), part))
                part = replace(part, target=False)
            spans.append(Span(len(ids) + 1, len(ids) + 1 + patches, part))
            ids.extend([fmt.boi, *codes, fmt.eoi])
            predicted = np.full((rows, columns), part.is_codes and part.target)
            if part.is_codes and part.content is not None:
                top, bottom, left, right = part.content
                predicted[:top], predicted[bottom:], predicted[:, :left], predicted[:, right:] = (False,) * 4
            learned.extend([document.predict and part.predict, *predicted.flatten().tolist(), False])
            image_at.extend([-1, *[len(spans) - 1] * patches, -1])
    if document.closed:
        ids.append(fmt.eos)
        learned.append(document.predict)
        image_at.append(-1)
    # A run of tokens after each image resumes where the image's span ends.
    positions, end, resumed = [], 0, 0
    for span in spans:
        rows, columns = fmt.grid(span.image)
        first = resumed + span.start - end
        positions += [np.arange(resumed, first), fmt.patch_positions(first, rows, columns)]
        end, resumed = span.end, first + fmt.span(rows, columns)
    positions.append(np.arange(resumed, resumed + len(ids) - end))
    for original, image in copied:
        patches = spans[original].end - spans[original].start
        positions.append(positions[2 * original + 1])
        image_at.extend([len(spans)] * patches)
        spans.append(Span(len(ids), len(ids) + patches, image, copy_of=original))
        ids.extend([0] * patches)
        learned.extend([False] * patches)
    length = len(ids)
    loss_mask = np.zeros(length, dtype=bool)
    # EOI and patches are never targets, so nothing is predicted from a patch, or from BOI before one.
    loss_mask[:-1] = learned[1:]
    return Layout(
        input_ids=np.asarray(ids, dtype=np.int64),
        position_ids=join_positions(positions),
        document=np.zeros(length, dtype=np.int64),
        image=np.asarray(image_at, dtype=np.int64),
        loss_mask=loss_mask,
        spans=tuple(spans),
        samples=(document.sample,),
    )


def visible(layout: Layout, image_attention: ImageAttention = "bidirectional") -> tuple[np.ndarray, np.ndarray]:
    """Return `(start, end)`, int64 `[position]`: position p attends to the keys `start[p] <= key < end[p]`.

    A position sees its own document, where the key is not later or both are in the same image. An image is contiguous,
    so these keys are one interval, and every attention backend works from two integers per position; from two more,
    those of `gaps`, where a document has noised copies. `causal` (Transfusion, Table 5) has no look-ahead within an
    image.
    """
    begins = np.diff(layout.document, prepend=-1) != 0
    start = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    end = np.arange(len(layout)) + 1
    if image_attention == "bidirectional":
        for span in layout.spans:
            end[span.start : span.end] = span.end
    return start, end


def gaps(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return `(start, end)`, int64 `[position]`: of the keys that `visible` gives, p does not see those from `start[p]`
    up to `end[p]`.

    They are equal but for noised copies: those see what comes before their original, and themselves.
    """
    start, end = np.zeros((2, len(layout)), dtype=np.int64)
    for span in layout.spans:
        if span.copy_of is not None:
            start[span.start : span.end] = layout.spans[span.copy_of].start
            end[span.start : span.end] = span.start
    return start, end
