"""Many documents, one sequence: the batch a model sees.

A batch is *flat*: documents lie one after another in a single run of positions, and no document sees another. They are
not padded, so every position costs what it is worth; each attention backend regroups the run as it likes. The run as a
whole may be filled up with one idle document, because matrix kernels are prepared for each size they meet. Packed and
unpacked give the same loss and gradients, because positions restart and the mask stops at each document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .document import Document, Image, Text
from .layout import Grammar, Layout, Span, lay_out
from .mask import ImageAttention, visible

FILL = 64
"""batches are filled up to a multiple of this many positions: fewer sizes for matrix kernels to be prepared for"""


Images = torch.Tensor | Sequence[torch.Tensor]
"""One tensor for each image, or, where all are of one shape, one tensor whose rows they are: a GPU would wait while
hundreds of small ones are made of it and put together again."""


def concatenate(layouts: Sequence[Layout]) -> Layout:
    """Lay several layouts end to end: documents, images and spans are renumbered, rotary positions restart."""
    if not layouts:
        raise ValueError("concatenate: expected at least one layout, found none")
    spans: list[Span] = []
    document, image = [], []
    offset = documents = 0
    for layout in layouts:
        document.append(layout.document + documents)
        image.append(np.where(layout.image >= 0, layout.image + len(spans), -1))
        spans.extend(replace(span, start=span.start + offset) for span in layout.spans)
        offset += len(layout)
        documents += len(layout.samples)
    return Layout(
        token=np.concatenate([layout.token for layout in layouts]),
        rotary=np.concatenate([layout.rotary for layout in layouts]),
        document=np.concatenate(document),
        image=np.concatenate(image),
        predict=np.concatenate([layout.predict for layout in layouts]),
        spans=tuple(spans),
        samples=tuple(sample for layout in layouts for sample in layout.samples),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """A flat run of documents as tensors, ready for the model. N positions, I images, P patches, M predictions.

    tokens [N], rotary [N], start [N], end [N]   int64; `start` and `end` as in `mask.Visible`
    documents            length of each document, in order, the idle one included; they sum to N
    samples              the data set's number of each document, without the idle one
    patches [P]          positions of the patches, image after image, row by row
    predict [M], targets [M]   positions whose next token is learned, and that token
    coded [M] bool       which of the targets are codes of images
    image_targets        images that are learned, by either loss
    latents              one `[channel, row, column]` per image, clean; sizes may differ; none where images are codes
    denoise [I] bool     which images are targets of the diffusion loss
    max_timestep [I]     the largest timestep drawn for each; 0 means no cap
    sources              (name, positions) of each source of documents that has one
    keys                 (sample, number of the image in its document) per image: with the seed, they fix the noise
    pixels               uint8 `[row, column, 3]` of each image that is not encoded yet, in order; its latent is a shape
    timesteps [I], noise one `[channel, row, column]` per image, where an objective has drawn them already
    idle                 positions at the end that only fill the run up to a round number; part of N
    """

    tokens: torch.Tensor
    rotary: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    documents: tuple[int, ...]
    samples: tuple[int, ...]
    patches: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    coded: torch.Tensor
    image_targets: int
    latents: Images
    denoise: torch.Tensor
    max_timestep: torch.Tensor
    keys: tuple[tuple[int, int], ...]
    pixels: Images = ()
    timesteps: torch.Tensor | None = None
    noise: Images = ()
    sources: tuple[tuple[str, int], ...] = ()
    idle: int = 0

    @property
    def positions(self) -> int:
        return len(self.tokens)

    @property
    def quantities(self) -> dict[str, int]:
        """What a run counts: positions without the idle ones, also by source, text targets, images that are learned."""
        return {
            "positions": self.positions - self.idle,
            "text_targets": len(self.targets) - int(self.coded.sum()),
            "images": self.image_targets,
            **{f"positions of {name}": count for name, count in self.sources},
        }

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; what chooses among targets stays, for the host decides by it."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
            and name not in ("coded", "denoise", "max_timestep", "timesteps", *LISTED)
        }
        moved |= {name: _moved(getattr(self, name), device) for name in LISTED}
        return replace(self, **moved)


LISTED = ("latents", "pixels", "noise")
"""what a batch has one of per image"""


def stacked(tensors: Sequence[torch.Tensor]) -> Images:
    """One tensor of several of like shape; others stay apart."""
    alike = len({(tensor.shape, tensor.device) for tensor in tensors}) == 1
    return torch.stack(list(tensors)) if alike else tuple(tensors)


def shapes_of(images: Images) -> list[torch.Size]:
    return [images.shape[1:]] * len(images) if isinstance(images, torch.Tensor) else [image.shape for image in images]


def _moved(images: Images, device: torch.device | str) -> Images:
    if isinstance(images, torch.Tensor):
        return images if images.is_meta else images.to(device, non_blocking=True)
    return tuple(image if image.is_meta else image.to(device, non_blocking=True) for image in images)


def collate(
    documents: Sequence[Document],
    grammar: Grammar,
    image_attention: ImageAttention = "bidirectional",
    multiple: int = 1,
    idle_image: torch.Tensor | None = None,
) -> Batch:
    """Lay out and pack documents; an idle document fills the run up to a multiple of `multiple` positions.

    Where no document has an image to be denoised or shown, `idle_image` is laid out beside them, and nothing learned
    from it: a network that is sharded must run its patch layers on every rank.
    Raises ValueError for no documents or a latent that does not divide into patches.
    """
    layouts = [lay_out(document, grammar) for document in documents]
    length = sum(len(layout) for layout in layouts)
    idle = -length % multiple
    if idle_image is not None and not any(document.images for document in documents):
        unseen = lay_out(Document([Image(idle_image, target=False)], sample=-1, closed=False, predict=False), grammar)
        layouts.append(unseen)
        # Within what would be idle anyway, or else a little beyond it: a whole `multiple` may be a row.
        idle = idle - len(unseen) if idle >= len(unseen) else -(length + len(unseen)) % FILL
    if idle:
        filler = Document([Text((grammar.eos,) * (idle - 1))], sample=-1, closed=False, predict=False)
        layouts.append(lay_out(filler, grammar))
    packed = concatenate(layouts)
    see = visible(packed, image_attention)
    predict = np.flatnonzero(packed.predict)
    keys = [
        (layout.samples[0], number)
        for layout in layouts
        for number, span in enumerate(layout.spans)
        if not span.image.coded
    ]
    images = [span.image for span in packed.spans if not span.image.coded]
    sources: dict[str, int] = {}
    for document, layout in zip(documents, layouts, strict=False):  # the idle one has none
        if document.source:
            sources[document.source] = sources.get(document.source, 0) + len(layout)
    return Batch(
        tokens=torch.from_numpy(packed.token),
        rotary=torch.from_numpy(packed.rotary),
        start=torch.from_numpy(see.start),
        end=torch.from_numpy(see.end),
        documents=tuple(len(layout) for layout in layouts),
        samples=packed.samples[: len(documents)],
        patches=torch.from_numpy(np.flatnonzero((packed.image >= 0) & (grammar.first_code is None))),
        predict=torch.from_numpy(predict),
        targets=torch.from_numpy(packed.token[predict + 1]),
        coded=torch.from_numpy(packed.image[predict + 1] >= 0),
        image_targets=sum(span.image.target for span in packed.spans),
        latents=stacked([image.latent for image in images]),
        denoise=torch.tensor([image.target for image in images], dtype=torch.bool),
        max_timestep=torch.tensor([image.max_timestep or 0 for image in images], dtype=torch.int64),
        keys=tuple(keys),
        pixels=stacked([image.pixels for image in images if image.pixels is not None]),
        sources=tuple(sorted(sources.items())),
        idle=sum(len(layout) for layout in layouts[len(documents) :]),
    )
