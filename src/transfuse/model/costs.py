"""The cost of a network: parameters, operations, and the bytes of activations that a training step keeps.

A multiplication and an addition are two operations. Two figures, never mixed: the paper's theoretical `6 N D`, which
its scaling laws use, and what a step really executes (attention over visible keys only, logits only where a token is
predicted, nothing for padding).

Activations are counted layer by layer: a product keeps its input, a norm its input, an addition nothing. C is d_model,
F is d_ff, there are H query and K key heads of D channels, and `element` is the bytes of one element of the residual
stream (2: bfloat16, 4: float32). Copies of the weights in that dtype are counted with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..sequence import Batch, shapes_of
from .attention import starts_of
from .config import ModelConfig
from .layers import TimestepEmbedding
from .transfusion import Transfusion, of_images

LatentSizes = Sequence[tuple[int, int]]  # rows and columns of each image's latent
Frozen = Literal["none", "text", "all"]  # matrices that get no gradient: none, those of text, or all of the transformer


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


def forward_flops(config: ModelConfig, positions: int, pairs: int, predictions: int, images: LatentSizes) -> int:
    """Operations of one forward pass: `pairs` is the number of (query, visible key) pairs.

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
    config: ModelConfig, positions: int, pairs: int, predictions: int, images: LatentSizes, frozen: Frozen = "none"
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


# --- activation memory: what is kept from the forward to the backward pass --------------------------------------------

Checkpointing = Literal["none", "selective", "full"]
"""what a block keeps: everything its backward pass needs; only products and attention; only its input"""

FLOAT = 4  # bytes of an element that is always float32: statistics of norms and of attention


@dataclass(frozen=True)
class Load:
    """The size of a forward pass: positions, predicted tokens, and images by latent size (rows, columns)."""

    positions: int
    predictions: int
    images: Mapping[tuple[int, int], int] = field(default_factory=dict)


AttentionBytes = Callable[[ModelConfig, int, int], int]
"""(config, positions, element) -> bytes that one block's attention keeps, including the output of the qkv product"""


def flex_bytes(config: ModelConfig, positions: int, element: int) -> int:
    """Return FlexAttention's bytes: rotated queries and keys, values, output, and each softmax's log denominator.

    With q/k norm the unnormed queries and keys stay, too, in one tensor with the values. Scores are never stored.
    """
    elements = config.qkv_dim * (2 if config.qk_norm else 1) + config.heads_dim
    return positions * (element * elements + FLOAT * config.n_heads)


def block_bytes(config: ModelConfig, positions: int, element: int, attention: AttentionBytes = flex_bytes) -> int:
    """Return the bytes of one block without recomputation.

    4 C        in each half: the residual stream, and its normed form (pre) or the half's output (swin)
    3 F        gate and up, and their product
    2 C        dropout masks, with dropout
    (H + K) D  normalised queries and keys, with q/k LayerNorm; statistics of norms are float32
    8 C        with adaLN: scales and gates, what they multiply, and the modulated input of each half
    """
    elements = 4 * config.d_model + 3 * config.ffn_dim + (2 * config.d_model if config.dropout else 0)
    if config.timestep == "adaln":
        elements += 8 * config.d_model
    statistics = 2 * FLOAT
    heads = config.n_heads + config.kv_heads
    if config.qk_norm and config.qk_norm_type == "layer":
        elements += heads * config.head_dim
        statistics += 2 * FLOAT * heads
    elif config.qk_norm:  # RMSNorm keeps its input and one number of each vector
        statistics += FLOAT * (heads if config.qk_norm_type == "rms" else 2)
    return positions * (element * elements + statistics) + attention(config, positions, element)


def kept_of_block(
    config: ModelConfig, positions: int, element: int, kept: Checkpointing, attention: AttentionBytes = flex_bytes
) -> int:
    """Return the bytes that one block keeps until the backward pass, by activation checkpointing."""
    if kept == "none":
        return block_bytes(config, positions, element, attention)
    if kept == "full":
        return positions * element * config.d_model
    products = config.qkv_dim + 2 * config.d_model + 2 * config.ffn_dim  # q k v, out, gate and up, down
    elements = config.d_model + products + config.heads_dim  # its input, the products' outputs, attention's output
    return positions * (element * elements + FLOAT * config.n_heads)


def forward_bytes(
    config: ModelConfig, load: Load, element: int, checkpointing: Checkpointing, attention: AttentionBytes = flex_bytes
) -> int:
    """Return all bytes kept by a forward pass, up to the inputs of the output layer; logits are not kept.

    Besides the blocks these are the rotary table, the final norm's input, and the inputs of both heads.
    """
    block = kept_of_block(config, load.positions, element, checkpointing, attention)
    once = element * (2 * config.head_dim + config.d_model) + FLOAT
    patches = sum(count * sum(patch_bytes(config, size, element)) for size, count in load.images.items())
    return config.n_layers * block + load.positions * once + load.predictions * element * config.d_model + patches


def step_bytes(config: ModelConfig, load: Load, element: int, checkpointing: Checkpointing) -> int:
    """Return the peak of a step.

    It is reached when the backward pass enters the transformer and has freed the decoder's patch layers, or at the end
    of the forward pass, if those keep more than a block needs.
    """
    done = sum(count * patch_bytes(config, size, element)[1] for size, count in load.images.items())
    # The peak inside a block is in its gated layer: gradients of the residual stream, of the product (F), and of gate
    # and up (2 F, concatenated from two of F), after the product itself (F) has been freed; and what is recomputed.
    block = load.positions * element * (2 * config.d_model + 4 * config.ffn_dim)
    if checkpointing != "none":
        block += block_bytes(config, load.positions, element)
        block -= kept_of_block(config, load.positions, element, checkpointing)
    if checkpointing == "selective" and config.norm_order == "pre":
        block += load.positions * element * 2 * config.d_model  # `out` and `down`, kept though nothing reads them again
    return forward_bytes(config, load, element, checkpointing) + max(0, block - done)


def patch_bytes(config: ModelConfig, size: tuple[int, int], element: int) -> tuple[int, int]:
    """Return the bytes the patch layers keep of one image of `size`, before and after the transformer."""
    if config.images != "latents":
        return 0, 0
    pixels = size[0] * size[1]
    # Vectors inserted among the tokens, and selected from the output.
    vectors = element * config.d_model * pixels // config.patch_size**2
    image = element * config.latent_channels * pixels
    if config.timestep == "adaln":  # of `TimestepModulation`: sinusoids, inputs and outputs of SiLU, and six vectors
        image += element * (TimestepEmbedding.sinusoids + 10 * config.d_model)
    if config.adapter == "linear":
        time = config.patch_dim if config.timestep_at == "patch" else config.d_model
        # The sinusoids, the first layer's output, and SiLU of that; likewise in the U-Net.
        told = element * (TimestepEmbedding.sinusoids + 2 * time) if config.timestep == "added" else 0
        return image + told + vectors, vectors
    before, after = _unet_bytes(config, pixels, element)
    return 2 * image + before + vectors, vectors + after


def _unet_bytes(config: ModelConfig, pixels: int, element: int) -> tuple[int, int]:
    """Return the bytes of the U-Net's down and up layers, in the order of `UNetAdapter`; each counts its input."""
    levels, last = config.unet_levels, len(config.unet_levels) - 1
    time = 4 * levels[0] if config.timestep == "added" else 0

    def residual(inputs: int, outputs: int, pixels: int) -> int:
        """Each half keeps its input, the normed input, and SiLU of that; SiLU of the timestep is kept, too."""
        return pixels * (element * 3 * (inputs + outputs) + 4 * FLOAT) + element * time

    def attention(channels: int, pixels: int) -> int:
        """Input, normed input, q, k, v, output, and the statistics of the norm and of the softmax."""
        return pixels * (element * 6 * channels + FLOAT * (2 + max(1, channels // 64)))

    skips, current = [levels[0]], levels[0]
    # And t_emb again, for a group of images of one size.
    down = element * (TimestepEmbedding.sinusoids + 3 * time) if time else 0
    for level, channels in enumerate(levels):
        here = pixels // 4**level
        for _ in range(2):
            down += residual(current, channels, here)
            current = channels
            skips.append(current)
        if level < last:
            down += here * element * current
            skips.append(current)
    lowest = pixels // 4**last
    # Plus the last norm's input, output and statistics.
    down += attention(current, lowest) + lowest * (2 * element * current + 2 * FLOAT)
    up = attention(current, lowest)
    for level, channels in reversed(list(enumerate(levels))):
        here = pixels // 4**level
        for _ in range(3):
            up += residual(current + skips.pop(), channels, here)
            current = channels
        if level:
            up += 4 * here * element * current
    return down, up + pixels * (element * 3 * current + 2 * FLOAT)  # the last norm, SiLU and convolution
