"""Memory of one GPU, piece by piece, by how a run is spread over GPUs (`model.activations`: what a forward pass keeps).

weights, gradients, moments, EMA   4, 4, 8 and 4 bytes a parameter, float32; a shard of them where there are shards
gathered      weights in the dtype they are multiplied in, and what turns their gradients back (`_gathered`)
activations   what the forward pass keeps, what the backward pass computes again, its gradients of activations
logits        the largest chunk of them in float32, its softmax and its gradient, as far as these need more than the
              backward pass needs later, when they are gone

The total is their sum: the most there is at once, within 10 % of what is measured, casts that are gone early included.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

from ..model import ModelConfig, Transfusion
from ..model.activations import Checkpointing, Load, forward_bytes, step_bytes
from ..training.loss import MAX_LOGITS


@dataclass(frozen=True)
class Spread:
    """`replicate` copies of the network, each in `shard` parts, on replicate x shard GPUs."""

    name: str
    replicate: int = 1
    shard: int = 1

    @property
    def gpus(self) -> int:
        return self.replicate * self.shard


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    moments: int
    ema: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(self.pieces.values())

    @property
    def pieces(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Units:
    """Parameters: in all, of one block, of what is outside the blocks, and of the embedding, which no product reads."""

    total: int
    block: int
    root: int
    embedding: int


@lru_cache(maxsize=64)
def units(config: ModelConfig) -> Units:
    model = Transfusion.on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.transformer.blocks[0].parameters())
    return Units(total, block, total - config.n_layers * block, model.embedding.weight.numel())


def memory(config: ModelConfig, load: Load, spread: Spread, checkpointing: Checkpointing, element: int = 2) -> Memory:
    """Of a step whose micro-batch on this GPU is `load`; `element`: bytes of the dtype that is computed in."""
    part = -(-units(config).total // spread.shard)
    most = step_bytes(config, load, element, checkpointing)
    later = most - forward_bytes(config, load, element, checkpointing)
    return Memory(
        weights=4 * part,
        gradients=4 * part,
        moments=8 * part,
        ema=4 * part,
        gathered=_gathered(config, spread, checkpointing, element),
        activations=most,
        logits=max(0, 12 * min(MAX_LOGITS, load.predictions * config.vocab_size) - later),
    )


def _gathered(config: ModelConfig, spread: Spread, checkpointing: Checkpointing, element: int) -> int:
    """Bytes of the weights' working copies.

    One GPU: each product casts its weight and keeps the cast for the backward pass, all blocks' or, where a block is
    computed again, one block's; and one matrix's gradient in that dtype. In float32 nothing is cast.

    More, copies or shards (FSDP2): what is outside the blocks is gathered from the forward to the backward pass, and
    has a gradient in that dtype; of the blocks one is computed with, the next one waits, another arrives, and one has
    its gradient in that dtype and, to be summed, in float32. Read from FSDP2's ways, not measured.
    """
    count = units(config)
    if spread.gpus > 1:
        return 2 * element * count.root + (4 * element + 4) * count.block
    if element == 4:
        return 0
    blocks = config.n_layers if checkpointing == "none" else 1
    largest = max(count.embedding, 2 * config.d_model * config.ffn_dim)
    return element * (count.root - count.embedding + blocks * count.block + largest)
