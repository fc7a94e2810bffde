"""How well a model foretells text it never read: perplexity per token, and bits per byte.

Every text is a document of its own: BOS, text, EOS, laid out by the grammar that training uses. Perplexity depends on
the tokenizer; bits per byte do not, so they compare models of different vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..console import progress
from ..errors import UserError
from ..export import Exported
from ..model import for_batch
from ..sequence import Document, Text, collate
from .interval import Measured, bootstrap


@dataclass(frozen=True)
class TextResult:
    """perplexity: e to the mean nats per token, EOS among them; bits_per_byte: all bits over the texts' UTF-8 bytes."""

    perplexity: Measured
    bits_per_byte: Measured
    documents: int
    tokens: int
    bytes: int


@torch.inference_mode()
def perplexity(exported: Exported, texts: Sequence[str], batch: int = 32) -> TextResult:
    """Measure texts (definitions, captions, anything), `batch` documents at a time.

    Raises UserError for no texts, an empty one, or one longer than the model's context.
    """
    if not texts or not all(texts):
        raise UserError("perplexity: texts: expected at least one and none empty, found none or an empty one")
    model, grammar = exported.model, exported.model.config.grammar(exported.tokenizer)
    device = next(model.parameters()).device
    nats: list[float] = []
    tokens: list[int] = []
    with progress("perplexity", len(texts)) as bar:
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            documents = [Document([Text(exported.tokenizer.encode(text))]) for text in some]
            packed = collate(documents, grammar, model.config.image_attention).to(device)
            if max(packed.documents) > model.config.context:
                raise UserError(
                    f"perplexity: text: expected at most {model.config.context} positions, "
                    f"found {max(packed.documents)}"
                )
            logits = model(packed.tokens, packed.rotary, for_batch(packed, model.compute), packed.predict).logits
            losses = F.cross_entropy(logits.float(), packed.targets, reduction="none").double().cpu()
            counts = [length - 1 for length in packed.documents]  # every token but BOS is foretold
            nats += [part.sum().item() for part in losses.split(counts)]
            tokens += counts
            bar.advance(len(some))
    sizes = [len(text.encode()) for text in texts]
    mean, bits = bootstrap(nats, tokens), bootstrap([n / math.log(2) for n in nats], sizes)
    exponential = Measured(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.count)
    return TextResult(exponential, bits, len(texts), sum(tokens), sum(sizes))
