"""Token scores: the negative log-likelihood of text after other text or after an image.

score(exported, [Document([Text(ids)])])[0].nll                   # of every token, in nats
sum(score(exported, [Document([image, Text(ids)], closed=False)])[0].nll[-len(ids):])
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

MAX_LOGITS = 1 << 26  # logits computed at once: 256 MB in float32


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of a document's predicted tokens, BOI included, in order."""

    nll: np.ndarray  # negative log-likelihood in nats, float64 `[token]`
    is_argmax: np.ndarray  # bool `[token]`: the token was the most probable one


@torch.inference_mode()
def score(exported: Exported, documents: Sequence[Document], batch: int = 32) -> list[TokenScores]:
    """Return the scores of documents, at most `batch` at a time. Text with `predict=False` and images are context.

    Raises UserError for a document longer than the model's max_seq_len.
    """
    model, fmt = exported.model, exported.model.config.sequence_format(exported.tokenizer)
    device = next(model.parameters()).device
    scores: list[TokenScores] = []
    for group in _batches(documents, batch, MAX_LOGITS // model.config.vocab_size):
        packed = collate(group, fmt, model.config.image_attention).to(device)
        if max(packed.documents) > model.config.max_seq_len:
            raise UserError(
                f"text: expected at most {model.config.max_seq_len} positions, found {max(packed.documents)}"
            )
        attend = for_batch(packed, model.compute_dtype, model.config)
        clean = torch.zeros(len(packed.max_timestep), dtype=torch.int64, device=device)
        images = packed.patches, packed.latents, clean
        separate = device.type == "cpu"  # as in the engine
        logits = model(
            packed.input_ids, packed.position_ids, attend, packed.loss_positions, *images, separate=separate
        ).logits.float()
        nll = F.cross_entropy(logits, packed.targets, reduction="none").cpu().double().numpy()
        is_argmax = (logits.argmax(-1) == packed.targets).cpu().numpy()
        ends = np.searchsorted(packed.loss_positions.cpu().numpy(), np.cumsum(packed.documents)[: len(group) - 1])
        pairs = zip(np.split(nll, ends), np.split(is_argmax, ends), strict=True)
        scores += [TokenScores(*pair) for pair in pairs]
    return scores


def _batches(documents: Sequence[Document], batch: int, most: int) -> Iterator[list[Document]]:
    """Yield groups of documents in order, with at most `most` predicted tokens unless a group is a single document."""
    group: list[Document] = []
    predicted = 0
    for document in documents:
        own = sum(len(part.ids) for part in document.parts if isinstance(part, Text) and part.predict) + document.closed
        if group and (len(group) == batch or predicted + own > most):
            yield group
            group, predicted = [], 0
        group.append(document)
        predicted += own
    if group:
        yield group
