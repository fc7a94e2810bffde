"""Many documents, one sequence: the batch a model sees.

A batch is *flat*: documents follow one another in a single run of positions, and no document sees another. There is no
padding between them; each attention backend regroups the run as it needs. The run as a whole may be padded at its end
by one document without targets, because matrix kernels are prepared for each size they meet. Packed and unpacked give
the same loss and gradients, because positions restart and the mask stops at each document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .layout import (
    Document,
    Image,
    ImageAttention,
    Images,
    Layout,
    SequenceFormat,
    Span,
    Text,
    gaps,
    join_positions,
    layout_document,
    stacked,
    visible,
)

FILL = 64
"""batches are padded to a multiple of this many positions, so that matrix kernels meet few sizes"""


def concatenate(layouts: Sequence[Layout]) -> Layout:
    """Join layouts end to end: documents, images and spans are renumbered, `position_ids` restart."""
    if not layouts:
        raise ValueError("concatenate: expected at least one layout, found none")
    spans: list[Span] = []
    document, image = [], []
    offset = documents = 0
    for layout in layouts:
        document.append(layout.document + documents)
        image.append(np.where(layout.image >= 0, layout.image + len(spans), -1))
        first = len(spans)
        spans.extend(
            replace(
                span,
                start=span.start + offset,
                end=span.end + offset,
                copy_of=None if span.copy_of is None else span.copy_of + first,
            )
            for span in layout.spans
        )
        offset += len(layout)
        documents += len(layout.samples)
    return Layout(
        input_ids=np.concatenate([layout.input_ids for layout in layouts]),
        position_ids=join_positions([layout.position_ids for layout in layouts]),
        document=np.concatenate(document),
        image=np.concatenate(image),
        loss_mask=np.concatenate([layout.loss_mask for layout in layouts]),
        spans=tuple(spans),
        samples=tuple(sample for layout in layouts for sample in layout.samples),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """A flat run of documents as tensors, ready for the model. N positions, I images, P patches, M text targets."""

    input_ids: torch.Tensor  # [N], int64
    position_ids: torch.Tensor  # rotary positions: [N], int64, or [N, 3], float32 (`Layout`)
    kv_start: torch.Tensor  # [N], kv_end [N]: the keys each position sees, as in `visible`
    kv_end: torch.Tensor
    documents: tuple[int, ...]  # length of each document, in order, the padding included; they sum to N
    samples: tuple[int, ...]  # each document's number in the data set, without the padding
    patches: torch.Tensor  # [P], positions of the patches (or codes), image after image, row by row
    loss_positions: torch.Tensor  # [M], positions whose next token is predicted
    targets: torch.Tensor  # [M], that token
    is_image_token: torch.Tensor  # [M], bool: which targets are image codes
    image_targets: int  # number of images with a loss, diffusion or codes
    latents: Images  # a clean `[channel, row, column]` per image; sizes may differ; empty where images are codes
    denoise: torch.Tensor  # [I], bool: which images are targets of the diffusion loss
    max_timestep: torch.Tensor  # [I], the largest timestep drawn for each; 0 means no cap
    noise_ids: tuple[tuple[int, int], ...]  # (sample, index in its document) per image: with the seed, fixes the noise
    pixels: Images = ()  # uint8 `[row, column, 3]` of each image, not copy, that is encoded later (a shape as latent)
    timesteps: torch.Tensor | None = None  # [I], where they have been drawn already
    noise: Images = ()  # likewise, a `[channel, row, column]` per image
    features: torch.Tensor | None = None  # [P, D] of the patches' clean images, which a network is to be aligned with
    content: tuple[tuple[int, int, int, int] | None, ...] = ()  # of each latent, if some are padded
    sources: tuple[tuple[str, int], ...] = ()  # (name, positions) of each named source of documents
    n_padding: int = 0  # positions at the end that pad the run; part of N
    gaps: torch.Tensor | None = None  # [2, N]: each position does not see the keys gaps[0] to gaps[1], as in `gaps`
    copies: tuple[tuple[int, int], ...] = ()  # (noised copy, its clean original), as numbers of images

    @property
    def positions(self) -> int:
        """The length of the run, padding included."""
        return len(self.input_ids)

    @property
    def quantities(self) -> dict[str, int]:
        """The counts a run reports: positions without padding, those of noised copies, text targets, image targets."""
        copied = {} if self.gaps is None else {"copied_positions": int((self.gaps[0] < self.gaps[1]).sum())}
        return {
            "positions": self.positions - self.n_padding,
            **copied,
            "text_targets": len(self.targets) - int(self.is_image_token.sum()),
            "images": self.image_targets,
            **{f"positions of {name}": count for name, count in self.sources},
        }

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; the masks and timesteps that the host reads stay on the CPU."""

        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):  # on the meta device: the shape of an image that is encoded later
                return value if value.is_meta else value.to(device, non_blocking=True)
            return tuple(move(image) for image in value)

        on_host, per_image = ("is_image_token", "denoise", "max_timestep", "timesteps"), ("latents", "pixels", "noise")
        fields = {name: value for name, value in vars(self).items() if name not in on_host}
        tensors = {name: x for name, x in fields.items() if name in per_image or isinstance(x, torch.Tensor)}
        return replace(self, **{name: move(value) for name, value in tensors.items()})


def collate(
    documents: Sequence[Document],
    fmt: SequenceFormat,
    image_attention: ImageAttention = "bidirectional",
    multiple: int = 1,
    padding_image: torch.Tensor | None = None,
) -> Batch:
    """Lay out and pack documents; a document without targets pads the run to a multiple of `multiple` positions.

    If no document has an image, `padding_image` is laid out after them, without a loss: a sharded network must run its
    image adapter on every rank.

    Raises ValueError for no documents or a latent that does not divide into patches.
    """
    layouts = [layout_document(document, fmt) for document in documents]
    length = sum(len(layout) for layout in layouts)
    n_padding = -length % multiple
    if padding_image is not None and not any(document.images for document in documents):
        alone = Document([Image(padding_image, target=False)], sample=-1, closed=False, predict=False)
        unseen = layout_document(alone, fmt)
        layouts.append(unseen)
        # Inside the padding if it fits, or else up to the next multiple of FILL: a whole `multiple` may be a row.
        n_padding = n_padding - len(unseen) if n_padding >= len(unseen) else -(length + len(unseen)) % FILL
    if n_padding:
        filler = Document([Text((fmt.eos,) * (n_padding - 1))], sample=-1, closed=False, predict=False)
        layouts.append(layout_document(filler, fmt))
    packed = concatenate(layouts)
    kv_start, kv_end = visible(packed, image_attention)
    loss_positions = np.flatnonzero(packed.loss_mask)
    noise_ids = [
        (layout.samples[0], number if span.copy_of is None else span.copy_of)
        for layout in layouts
        for number, span in enumerate(layout.spans)
        if not span.image.is_codes
    ]
    images = [span.image for span in packed.spans if not span.image.is_codes]
    sources: dict[str, int] = {}
    for document, layout in zip(documents, layouts, strict=False):  # padding has none
        if document.source:
            sources[document.source] = sources.get(document.source, 0) + len(layout)
    return Batch(
        input_ids=torch.from_numpy(packed.input_ids),
        position_ids=torch.from_numpy(packed.position_ids),
        kv_start=torch.from_numpy(kv_start),
        kv_end=torch.from_numpy(kv_end),
        documents=tuple(len(layout) for layout in layouts),
        samples=packed.samples[: len(documents)],
        patches=torch.from_numpy(np.flatnonzero(packed.image >= 0)),
        loss_positions=torch.from_numpy(loss_positions),
        targets=torch.from_numpy(packed.input_ids[loss_positions + 1]),
        is_image_token=torch.from_numpy(packed.image[loss_positions + 1] >= 0),
        image_targets=sum(span.image.target for span in packed.spans),
        latents=stacked([image.latent for image in images]),
        denoise=torch.tensor([image.target for image in images], dtype=torch.bool),
        max_timestep=torch.tensor([image.max_timestep or 0 for image in images], dtype=torch.int64),
        noise_ids=tuple(noise_ids),
        pixels=stacked(
            [span.image.pixels for span in packed.spans if span.image.pixels is not None and span.copy_of is None]
        ),
        content=tuple(image.content for image in images) if any(image.content for image in images) else (),
        sources=tuple(sorted(sources.items())),
        n_padding=sum(len(layout) for layout in layouts[len(documents) :]),
        gaps=torch.from_numpy(np.stack(gaps(packed))) if fmt.clean_copy else None,
        copies=tuple((copy, span.copy_of) for copy, span in enumerate(packed.spans) if span.copy_of is not None),
    )
