"""Patch layers: image latents to vectors of the trunk, and back (Transfusion section 3.1, Tables 6 and 7).

Both take latents, whose sizes may differ, and give one flat run of patches `[P, C]`: image after image, row by row.
`decode` takes the trunk's output for the same run and gives predictions shaped as the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..sequence import Images, shapes_of
from .config import MAX_GRID, ModelConfig
from .layers import Linear, TimestepEmbedding


def by_shape(latents: Images, apart: bool = False) -> list[list[int]]:
    """Numbers of the images that share a shape, so that each group is one stacked tensor; `apart`: each one alone."""
    if apart:
        return [[number] for number in range(len(latents))]
    if isinstance(latents, Tensor):
        return [list(range(len(latents)))]
    groups: dict[torch.Size, list[int]] = {}
    for number, latent in enumerate(latents):
        groups.setdefault(latent.shape, []).append(number)
    return list(groups.values())


def those(images: Images, group: list[int]) -> Tensor:
    """A group of images as one tensor."""
    if isinstance(images, Tensor):
        return images if len(group) == len(images) else images[group]
    return torch.stack([images[number] for number in group])


def in_order(groups: list[list[int]], pieces: Sequence[Images]) -> list[Tensor]:
    """Undo `by_shape`: one tensor per image, in the images' own order."""
    found = {
        number: piece
        for group, those in zip(groups, pieces, strict=True)
        for number, piece in zip(group, those, strict=True)
    }
    return [found[number] for number in range(len(found))]


def windows(images: Tensor, size: int) -> Tensor:
    """Latents `[image, channel, row, column]` -> windows of `size` x `size`, `[image, row, column, elements]`."""
    return rearrange(images, "i c (r p) (q s) -> i r q (c p s)", p=size, s=size)


def unwindowed(flat: Tensor, rows: int, size: int) -> Tensor:
    """Undo `windows`, whose `rows` come one after another: `[image, patch, elements]` -> latents."""
    return rearrange(flat, "i (r q) (c p s) -> i c (r p) (q s)", r=rows, p=size, s=size)


class LinearPatches(nn.Module):
    """One linear map from a k x k window of latents to the width, one back.

    The timestep embedding is added to every patch, before or after the first map (`ModelConfig.timestep_at`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, elements = config.patch_size, config.patch_elements
        self.time_first = config.timestep_at == "patch"
        self.time = TimestepEmbedding(elements if self.time_first else config.width)
        self.enter = Linear(elements, config.width)
        self.leave = Linear(config.width, elements)
        self.positions = GridPositions(config.width) if config.patch_positions == "learned" else None

    def encode(self, latents: Images, timesteps: Tensor, dtype: torch.dtype, apart: bool = False) -> tuple[Tensor, Any]:
        """Latents `[channel, row, column]` each, timesteps `[I]` -> patches `[P, C]` and what `decode` needs.

        Images of one shape are computed together, or, where `apart`, each alone.
        """
        time = self.time(timesteps, dtype)
        groups, pieces = by_shape(latents, apart), []
        for group in groups:
            stacked = those(latents, group).to(dtype)
            x, its_time = windows(stacked, self.size), those(time, group)[:, None, None]
            x = self.enter(x + its_time) if self.time_first else self.enter(x) + its_time
            if self.positions is not None:
                x = x + self.positions(*x.shape[1:3]).to(dtype)
            pieces.append(x.flatten(1, 2))
        if len(pieces) == 1:
            return pieces[0].flatten(0, 1), groups
        return torch.cat(in_order(groups, pieces)), groups

    def decode(self, x: Tensor, latents: Images, groups: Any) -> Images:
        """Trunk output `[P, C]` -> one prediction `[channel, row, column]` per image, in float32."""
        runs, pieces = _runs(self.leave(x).float(), latents, groups, self.size), []
        for group in groups:
            pieces.append(unwindowed(those(runs, group), latents[group[0]].shape[1] // self.size, self.size))
        return pieces[0] if len(pieces) == 1 else in_order(groups, pieces)


def _runs(patches: Tensor, latents: Images, groups: list[list[int]], size: int) -> Images:
    """The patches `[P, C]` of each image: one tensor `[image, patch, C]` where all images are of one group."""
    if len(groups) == 1:
        return patches.view(len(latents), -1, patches.shape[-1])
    return patches.split([rows * columns // size**2 for _, rows, columns in shapes_of(latents)])


class GridPositions(nn.Module):
    """A learned vector per row and per column of patches: `(rows, columns) -> [row, column, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(MAX_GRID, channels))
        self.column = nn.Parameter(torch.zeros(MAX_GRID, channels))

    def forward(self, rows: int, columns: int) -> Tensor:
        if max(rows, columns) > MAX_GRID:
            raise ValueError(f"image: expected at most {MAX_GRID} patches a side, found {rows}x{columns}")
        return self.row[:rows, None] + self.column[None, :columns]


class ChannelNorm(nn.LayerNorm):
    """Plain layer norm over the channels of `[image, channel, row, column]` (the paper's footnote 7: not adaptive)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(
            x.movedim(1, -1), self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )
        return x.movedim(-1, 1)


class Conv(nn.Conv2d):
    """A convolution in the dtype of its input, `size` wide, output as large as the input divided by `stride`."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding)


class ResBlock(nn.Module):
    """Two convolutions with the timestep added between them, around a skip (Ho et al. 2020)."""

    def __init__(self, inputs: int, outputs: int, time_channels: int) -> None:
        super().__init__()
        self.first_norm, self.first = ChannelNorm(inputs), Conv(inputs, outputs)
        self.time = Linear(time_channels, outputs, bias=True)
        self.second_norm, self.second = ChannelNorm(outputs), Conv(outputs, outputs)
        self.skip = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(F.silu(self.first_norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.second_norm(h)))


class ImageAttention(nn.Module):
    """Full attention among the positions of one feature map, inside the U-Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = ChannelNorm(channels)
        self.qkv, self.out = Linear(channels, 3 * channels), Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(rearrange(self.norm(x), "i c r q -> i (r q) c"))
        q, k, v = rearrange(qkv, "i n (three h d) -> three i h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + rearrange(self.out(rearrange(out, "i h n d -> i n (h d)")), "i (r q) c -> i c r q", r=x.shape[2])


class UNetPatches(nn.Module):
    """U-Net down blocks before the trunk and up blocks after it, with long skips between them.

    Each level has two residual blocks on the way down and three on the way up (each fed one skip); the lowest has
    attention. Levels are `log2(patch_size) + 1`; the last one meets the trunk's width.

    Beside them runs a linear map each way, as in `LinearPatches`; of the paper's 0.27 billion it is a thousandth at
    most. Without, skips answer for all but the noisiest pictures, the trunk learns to keep quiet, and pictures follow
    captions no more than captions pictures (docs/LOG.md, 2026-11-26).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, elements = config.patch_size, config.patch_elements
        self.linear_enter, self.linear_leave = Linear(elements, config.width), Linear(config.width, elements)
        self.positions = GridPositions(config.width) if config.patch_positions == "learned" else None
        levels = config.unet_levels
        time = 4 * levels[0]
        self.time = TimestepEmbedding(time)
        self.first = Conv(config.latent_channels, levels[0])
        skips, current = [levels[0]], levels[0]
        self.down = nn.ModuleList()
        for level, channels in enumerate(levels):
            for _ in range(2):
                self.down.append(ResBlock(current, channels, time))
                current = channels
                skips.append(current)
            if level < len(levels) - 1:
                self.down.append(Conv(current, current, stride=2))
                skips.append(current)
        self.down_attention, self.up_attention = ImageAttention(current), ImageAttention(current)
        # Normed, and small at first, as words are: sums of residual blocks are hundreds of times as large, and what
        # attention adds of the words would be lost among them, so that pictures would not learn to follow captions.
        self.enter_norm = ChannelNorm(current)
        self.enter, self.leave = Conv(current, config.width, 1), Conv(config.width, current, 1)
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(levels))):
            for _ in range(3):
                self.up.append(ResBlock(current + skips.pop(), channels, time))
                current = channels
            if level:
                self.up.append(Conv(current, current))
        self.last_norm, self.last = ChannelNorm(current), Conv(current, config.latent_channels)

    def encode(self, latents: Images, timesteps: Tensor, dtype: torch.dtype, apart: bool = False) -> tuple[Tensor, Any]:
        """As `LinearPatches.encode`; the state for `decode` is the time embedding and the skips of each group."""
        time = self.time(timesteps, dtype)
        groups, pieces, kept = by_shape(latents, apart), [], []
        for group in groups:
            stacked, its_time = those(latents, group).to(dtype), those(time, group)
            x = self.first(stacked)
            skips = [x]
            for module in self.down:
                x = module(x, its_time) if isinstance(module, ResBlock) else module(x)
                skips.append(x)
            x = self.enter(self.enter_norm(self.down_attention(x)))
            x = rearrange(x, "i c r q -> i r q c") + self.linear_enter(windows(stacked, self.size))
            if self.positions is not None:
                x = x + self.positions(*x.shape[1:3]).to(dtype)
            pieces.append(x.flatten(1, 2))
            kept.append((skips, its_time, x.shape[1]))
        if len(pieces) == 1:
            return pieces[0].flatten(0, 1), (groups, kept)
        return torch.cat(in_order(groups, pieces)), (groups, kept)

    def decode(self, x: Tensor, latents: Images, state: Any) -> Images:
        """As `LinearPatches.decode`."""
        groups, kept = state
        runs, pieces = _runs(x, latents, groups, self.size), []
        for group, (skips, time, rows) in zip(groups, kept, strict=True):
            run = those(runs, group)
            h = rearrange(run, "i (r q) c -> i c r q", r=rows)
            h = self.up_attention(self.leave(h))
            remaining = list(skips)
            for module in self.up:
                if isinstance(module, ResBlock):
                    h = module(torch.cat([h, remaining.pop()], dim=1), time)
                else:
                    h = module(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            straight = unwindowed(self.linear_leave(run), rows, self.size)
            pieces.append(self.last(F.silu(self.last_norm(h))).float() + straight.float())
        return pieces[0] if len(pieces) == 1 else in_order(groups, pieces)
