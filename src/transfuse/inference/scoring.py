"""How likely a model finds words: behind other words, or behind a picture.

foretell(exported, [Document([Text(ids)])])[0].nats               # of every token
sum(foretell(exported, [Document([picture, Text(ids)], closed=False)])[0].nats[-len(ids):])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import UserError
from ..export import Exported
from ..model import for_batch
from ..sequence import Document, Text, collate

LOGITS = 1 << 26
"""most logits at once: 256 MB in float32"""


@dataclass(frozen=True, eq=False)
class Foretold:
    """Of the learned tokens of one document, BOI among them, in order: nats float64 `[token]`, and whether each was the
    likeliest."""

    nats: np.ndarray
    likeliest: np.ndarray


@torch.inference_mode()
def foretell(exported: Exported, documents: Sequence[Document], batch: int = 32) -> list[Foretold]:
    """What the model thinks of the words of documents, at most `batch` at a time. What is not learned is context, and
    so are pictures, clean.

    Raises UserError for one longer than the model's context.
    """
    model, grammar = exported.model, exported.model.config.sequence_format(exported.tokenizer)
    device = next(model.parameters()).device
    found: list[Foretold] = []
    for some in _batches(documents, batch, LOGITS // model.config.vocab_size):
        packed = collate(some, grammar, model.config.image_attention).to(device)
        if max(packed.documents) > model.config.max_seq_len:
            raise UserError(
                f"text: expected at most {model.config.max_seq_len} positions, found {max(packed.documents)}"
            )
        attend, clean = for_batch(packed, model.compute_dtype), torch.zeros_like(packed.max_timestep)
        seen = packed.patches, packed.latents, clean
        apart = device.type == "cpu"  # as the engine reads them
        logits = model(
            packed.input_ids, packed.position_ids, attend, packed.loss_positions, *seen, separate=apart
        ).logits.float()
        nats = F.cross_entropy(logits, packed.targets, reduction="none").double().cpu().numpy()
        likeliest = (logits.argmax(-1) == packed.targets).cpu().numpy()
        ends = np.searchsorted(packed.loss_positions.cpu().numpy(), np.cumsum(packed.documents)[: len(some) - 1])
        pairs = zip(np.split(nats, ends), np.split(likeliest, ends), strict=True)
        found += [Foretold(*pair) for pair in pairs]
    return found


def _learned(document: Document) -> int:
    return sum(len(part.ids) for part in document.parts if isinstance(part, Text) and part.predict) + document.closed


def _batches(documents: Sequence[Document], batch: int, most: int) -> Iterator[list[Document]]:
    """Runs of documents in order, none with more than `most` learned tokens unless it is alone."""
    some: list[Document] = []
    for document in documents:
        if some and (len(some) == batch or sum(map(_learned, some)) + _learned(document) > most):
            yield some
            some = []
        some.append(document)
    if some:
        yield some
