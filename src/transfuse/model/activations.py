"""What a training step keeps in memory from its forward to its backward pass, in bytes. `flops` counts operations.

Counted layer by layer: a product keeps its input, a norm its input, an addition nothing. Below, C is the width, F the
hidden width, H query and K key heads have D channels, and `element` is the size of one element of the residual stream
(2: bfloat16, 4: float32). The weights' own copies in that dtype are counted with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .config import ModelConfig
from .layers import TimestepEmbedding

Checkpointing = Literal["none", "selective", "full"]
"""what of a block is kept: all that its derivative needs; products and attention alone; its input alone"""

FLOAT = 4
"""bytes of what is kept in float32 whatever the residual stream is: statistics of norms and of attention"""


@dataclass(frozen=True)
class Load:
    """What one forward pass carries: positions, those that predict a token, and how many images of which latent size
    (rows, columns)."""

    positions: int
    predictions: int
    images: Mapping[tuple[int, int], int] = field(default_factory=dict)


AttentionBytes = Callable[[ModelConfig, int, int], int]
"""(config, positions, element) -> bytes that attention in one block keeps, the product that made q, k and v included"""


def flex_bytes(config: ModelConfig, positions: int, element: int) -> int:
    """FlexAttention's: rotated queries and keys, values, its output, the logarithm of each softmax's denominator; where
    queries and keys are normed, what they were before, of one piece with the values. No scores."""
    elements = _qkv(config) + config.d_model + (_qkv(config) if config.qk_norm else 0)
    return positions * (element * elements + FLOAT * config.n_heads)


def block_bytes(config: ModelConfig, positions: int, element: int, attention: AttentionBytes = flex_bytes) -> int:
    """One block that recomputes nothing.

    4 C        of each half: the residual stream, and its normed form (pre), or what the half adds (swin)
    3 F        gate and up, and their product
    2 C        what dropout multiplied by, where there is any
    (H + K) D  queries and keys without their mean and length, where they are normed, and those in float32
    """
    elements = 4 * config.d_model + 3 * config.ffn_dim + (2 * config.d_model if config.dropout else 0)
    statistics = 2 * FLOAT
    if config.qk_norm:
        elements += (config.n_heads + config.kv_heads) * config.head_dim
        statistics += 2 * FLOAT * (config.n_heads + config.kv_heads)
    return positions * (element * elements + statistics) + attention(config, positions, element)


def kept_of_block(
    config: ModelConfig,
    positions: int,
    element: int,
    checkpointing: Checkpointing,
    attention: AttentionBytes = flex_bytes,
) -> int:
    """One block's share of what a forward pass leaves behind, by activation checkpointing."""
    if checkpointing == "none":
        return block_bytes(config, positions, element, attention)
    if checkpointing == "full":
        return positions * element * config.d_model
    products = _qkv(config) + 2 * config.d_model + 2 * config.ffn_dim  # q k v, out, gate and up, down
    elements = config.d_model + products + config.d_model  # its input, what products give, what attention gives
    return positions * (element * elements + FLOAT * config.n_heads)


def forward_bytes(
    config: ModelConfig,
    load: Load,
    element: int,
    checkpointing: Checkpointing,
    attention: AttentionBytes = flex_bytes,
) -> int:
    """All that a forward pass leaves behind, up to the inputs of the head; logits are not kept.

    Beside the blocks: the rotary table, the final norm's input, what the head and the patch layers read.
    """
    block = kept_of_block(config, load.positions, element, checkpointing, attention)
    once = element * (2 * config.head_dim + config.d_model) + FLOAT
    patches = sum(count * sum(patch_bytes(config, size, element)) for size, count in load.images.items())
    return config.n_layers * block + load.positions * once + load.predictions * element * config.d_model + patches


def step_bytes(config: ModelConfig, load: Load, element: int, checkpointing: Checkpointing) -> int:
    """The most there is at once: when the backward pass enters the trunk, and the patch layers behind it are done with;
    or when the forward pass ends, where those keep more than a block takes."""
    done = sum(count * patch_bytes(config, size, element)[1] for size, count in load.images.items())
    block = backward_bytes(config, load.positions, element, checkpointing)
    return forward_bytes(config, load, element, checkpointing) + max(0, block - done)


def backward_bytes(config: ModelConfig, positions: int, element: int, checkpointing: Checkpointing) -> int:
    """What the backward pass takes on top while it is in a block: what it computes again there, and its gradients.

    The most at once is in the gated layer: the gradient of the residual stream, of the product (F), of gate and of up
    (2 F, put together from two of F), while what was kept of the product (F) is gone.
    """
    gradients = positions * element * (2 * config.d_model + 4 * config.ffn_dim)
    if checkpointing == "none":
        return gradients
    whole = block_bytes(config, positions, element)
    kept = kept_of_block(config, positions, element, checkpointing)
    if checkpointing == "selective" and config.norm_order == "pre":
        kept -= positions * element * 2 * config.d_model  # what out and down give: kept, though nothing reads it again
    return whole - kept + gradients


def patch_bytes(config: ModelConfig, size: tuple[int, int], element: int) -> tuple[int, int]:
    """What the patch layers keep of one image of `size` latent elements: before the trunk, and behind it."""
    if config.images != "latents":
        return 0, 0
    pixels = size[0] * size[1]
    vectors = (
        element * config.d_model * pixels // config.patch_size**2
    )  # put among the tokens, and read out of the trunk
    image = element * config.latent_channels * pixels
    if config.adapter == "linear":
        time = config.patch_dim if config.timestep_at == "patch" else config.d_model
        return image + element * _time_elements(time) + vectors, vectors
    before, behind = _unet_bytes(config, pixels, element)
    return 2 * image + before + vectors, vectors + behind


def _unet_bytes(config: ModelConfig, pixels: int, element: int) -> tuple[int, int]:
    """The U-Net's layers down and up, walked as `UNetAdapter` is built; each counts its own input."""
    levels, last = config.unet_levels, len(config.unet_levels) - 1
    time = 4 * levels[0]

    def residual(inputs: int, outputs: int, pixels: int) -> int:
        """Each half keeps its input, that normed, and that through SiLU; and the timestep through SiLU is kept."""
        return pixels * (element * 3 * (inputs + outputs) + 4 * FLOAT) + element * time

    def attention(channels: int, pixels: int) -> int:
        """Its input, that normed, q, k, v, what attention gives, and statistics of the norm and of the softmax."""
        return pixels * (element * 6 * channels + FLOAT * (2 + max(1, channels // 64)))

    skips, current = [levels[0]], levels[0]
    down = element * (_time_elements(time) + time)  # the timestep; and again, for a group of images of one size
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
    # And the last norm's input, what it gives, and its statistics.
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


def _qkv(config: ModelConfig) -> int:
    return (config.n_heads + 2 * config.kv_heads) * config.head_dim


def _time_elements(channels: int) -> int:
    """Of a `TimestepEmbedding`, per image: sinusoids, what comes of them, that through SiLU."""
    return TimestepEmbedding.sinusoids + 2 * channels
