"""Counting parameters and arithmetic. A multiplication and an addition are two operations.

Two figures, never mixed: the paper's theoretical `6 N D`, which its scaling laws use, and what a step really executes
(attention over visible keys only, logits only where a token is predicted, nothing for padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..sequence import Batch, shapes_of
from .attention import starts_of
from .config import ModelConfig
from .layers import TimestepEmbedding
from .transfusion import Transfusion, of_images

Frozen = Literal["none", "text", "all"]
"""matrices that get no gradient: none, those of text, or all of the transformer"""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    transformer   embeddings, blocks and output layer, as the paper counts its sizes; with experts, those of text
    adapter       the patch layers
    image_tower   with experts, the blocks of images
    """

    transformer: int
    adapter: int
    image_tower: int = 0

    @property
    def active(self) -> int:
        """The parameters that text or patches use, N of the paper's 6 N D: all but the image tower."""
        return self.transformer + self.adapter

    @property
    def total(self) -> int:
        """All parameters."""
        return self.active + self.image_tower


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a network without building it."""
    model = Transfusion.on_meta(config)
    images = sum(p.numel() for name, p in model.named_parameters() if of_images(name))
    adapter = 0 if model.image_adapter is None else sum(p.numel() for p in model.image_adapter.parameters())
    return Parameters(sum(p.numel() for p in model.parameters()) - images, adapter, images - adapter)


@lru_cache(maxsize=64)
def adapter_flops(config: ModelConfig, height: int, width: int) -> int:
    """Forward operations of the patch layers, both ways, for one image of `height x width` latent elements."""
    model = Transfusion.on_meta(config)
    if model.image_adapter is None:
        return 0
    latents = [torch.empty(config.latent_channels, height, width, device="meta")]
    with FlopCounterMode(display=False) as counter:
        vectors, state = model.image_adapter.encode(latents, torch.ones(1, device="meta"), torch.float32)
        model.image_adapter.decode(vectors, latents, state)
    return counter.get_total_flops()


def forward_flops(
    config: ModelConfig, positions: int, pairs: int, predictions: int, images: Sequence[tuple[int, int]]
) -> int:
    """Operations of one forward pass: `pairs` is the number of (query, visible key) pairs, images are latent sizes.

    A position is computed by one tower alone, so experts add nothing but what a wider `image_d_ff` takes.
    """
    block = config.d_model * (config.qkv_dim + config.heads_dim + 3 * config.ffn_dim)
    wider = 3 * config.d_model * (config.image_ffn_dim - config.ffn_dim)  # of a patch
    patches = sum(rows * columns for rows, columns in images) // config.patch_size**2
    transformer = config.n_layers * (2 * (block * positions + wider * patches) + 4 * config.heads_dim * pairs)
    head = 2 * config.d_model * config.vocab_size * predictions
    modulation = 2 * config.d_model * (TimestepEmbedding.sinusoids + 7 * config.d_model) * len(images)
    modulation *= config.timestep == "adaln"
    return transformer + head + modulation + sum(adapter_flops(config, *size) for size in images)


def step_flops(
    config: ModelConfig,
    positions: int,
    pairs: int,
    predictions: int,
    images: Sequence[tuple[int, int]],
    frozen: Frozen = "none",
) -> int:
    """Operations of forward and backward, with the arguments of `forward_flops`.

    The backward pass is twice the forward pass; frozen matrices take half of that, for they pass gradients on and have
    none themselves. Adapters of LoRA, small next to the matrices they adapt, are not counted.
    """
    total = 3 * forward_flops(config, positions, pairs, predictions, images)
    if frozen == "none":
        return total
    if frozen == "text":
        patches = sum(rows * columns for rows, columns in images) // config.patch_size**2
        return total - forward_flops(config, positions - patches, 0, predictions, ())
    trained = sum(adapter_flops(config, *size) for size in images)
    return total - forward_flops(config, positions, 0, predictions, images) + trained


def train_flops(config: ModelConfig, batch: Batch, frozen: Frozen = "none") -> int:
    """Operations of forward and backward for a batch.

    Only the documents' own positions and images count, so that the sum over a step is the same however it is split:
    positions and images that fill a batch up are left out.
    """
    real = batch.positions - batch.n_padding
    pairs_of = [int((batch.kv_end[:real] - start[:real]).sum()) for start in starts_of(batch, config)]
    pairs = sum(pairs_of[-1 if windowed else 0] for windowed in config.windowed) // config.n_layers
    if batch.gaps is not None:
        pairs -= int((batch.gaps[1, :real] - batch.gaps[0, :real]).sum())
    patches, sizes = int((batch.patches < real).sum()), []
    for _, rows, columns in shapes_of(batch.latents):
        if patches:  # an image that fills up is the last one
            sizes.append((rows, columns))
            patches -= rows * columns // config.patch_size**2
    return step_flops(config, real, pairs, len(batch.loss_positions), sizes, frozen)
