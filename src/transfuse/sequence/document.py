"""Documents: what a training sample, a prompt or a conversation is before it becomes positions.

    Document([Text(ids of "a red crab"), Image(latent)])         draw: the caption comes first
    Document([Image(latent, max_timestep=500), Text(ids)])       caption: the image comes first, its noise is capped
    Document([Text(ids)], closed=False)                          a prompt: no end-of-sequence, the model goes on

A document says nothing about special tokens, masks or positions: `layout.lay_out` does, once, for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Text:
    """A run of token ids. `predict` says whether they are learned (the next-token loss falls on them)."""

    ids: tuple[int, ...]
    predict: bool = True


@dataclass(frozen=True, eq=False)
class Image:
    """A picture, as the latent an autoencoder gives.

    latent        `[channel, row, column]`, float, to be cut into patches: rows and columns must be multiples of the
                  patch size. Or codes of a VQ autoencoder, int64 `[row, column]`: each becomes a token (Chameleon).
    target        True: it is learned, by the diffusion loss (and noised for it) or as tokens. False: context, clean.
    max_timestep  the largest timestep drawn for it in training (Transfusion section 4.3.4); None: no cap.
    pixels        uint8 `[row, column, 3]` of a picture not encoded yet: its latent is on the meta device, a shape.
    """

    latent: torch.Tensor
    target: bool = True
    max_timestep: int | None = None
    pixels: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.max_timestep is not None and self.max_timestep < 1:
            raise ValueError(f"image: max_timestep: expected at least 1, found {self.max_timestep}")

    @property
    def coded(self) -> bool:
        """Whether it is made of codes."""
        return not self.latent.is_floating_point()


Part = Text | Image


@dataclass(frozen=True)
class Document:
    """An ordered list of parts.

    sample   the data set's own number for it; with the run's seed it fixes the noise its images receive.
    closed   True: it ends with the end-of-sequence token. False: it is a prompt and stays open.
    predict  False: no text of it is learned, not even the markers (the caption-dropped sample of guidance).
    """

    parts: Sequence[Part]
    sample: int = 0
    closed: bool = True
    predict: bool = True
    source: str = field(default="", compare=False)

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]


def unconditional(document: Document) -> Document:
    """The same document with everything before its last image taken away, and none of its text learned.

    Training's caption drop and sampling's null branch are both this function, so the two can not drift apart:
    what guidance subtracts is exactly what the model was shown without a caption.
    """
    images = document.images
    if not images:
        raise ValueError("unconditional(document): expected a document with an image, found text only")
    return replace(document, parts=[images[-1]], predict=False)


def images_alone(document: Document) -> Document:
    """The same document with all text before its last image taken away, and none of what is left learned.

    What the middle branch of guidance by images sees (Chameleon; InstructPix2Pix), in training and in sampling.
    """
    images = document.images
    if not images:
        raise ValueError("images_alone(document): expected a document with an image, found text only")
    return replace(document, parts=images, predict=False)
