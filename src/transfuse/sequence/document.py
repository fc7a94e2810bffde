"""Documents: training samples, prompts and conversations, before they become positions.

    Document([Text(ids of "a red crab"), Image(latent)])         draw: the caption comes first
    Document([Image(latent, max_timestep=500), Text(ids)])       caption: the image comes first, its noise is capped
    Document([Text(ids)], closed=False)                          a prompt: no end-of-sequence, the model continues

A document has no special tokens, masks or positions: `layout.layout_document` adds them, for every caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


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
    """

    latent: torch.Tensor
    target: bool = True
    max_timestep: int | None = None
    pixels: torch.Tensor | None = None

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
    """An ordered list of parts.

    sample   its number in the data set; with the run's seed it fixes the noise its images receive.
    closed   True: it ends with the end-of-sequence token. False: it is a prompt and stays open.
    predict  False: no token is a target, not even the markers (the caption-dropped sample of guidance).
    source   name of the data set it comes from.
    """

    parts: Sequence[Part]
    sample: int = 0
    closed: bool = True
    predict: bool = True
    source: str = field(default="", compare=False)

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
    images = document.images
    if not images:
        raise ValueError("unconditional(document): expected a document with an image, found text only")
    return replace(document, parts=[images[-1]], predict=False)


def images_alone(document: Document) -> Document:
    """Return the document's images up to the last one, without text and without text targets.

    This is the middle branch of image guidance (Chameleon; InstructPix2Pix), in training and in sampling.

    Raises ValueError for a document without an image.
    """
    images = document.images
    if not images:
        raise ValueError("images_alone(document): expected a document with an image, found text only")
    return replace(document, parts=images, predict=False)
