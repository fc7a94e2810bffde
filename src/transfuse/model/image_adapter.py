"""Patch layers: image latents to transformer inputs, and back (Transfusion section 3.1, Tables 6 and 7).

`encode` takes latents, whose sizes may differ, and returns one flat run of patches `[P, C]`: image after image, row by
row. `decode` takes the transformer's output for the same run and returns predictions shaped like the latents.
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


def group_by_shape(latents: Images, separate: bool = False) -> list[list[int]]:
    """Return the indices of images grouped by shape, so that each group can be stacked; `separate`: one per group."""
    if separate:
        return [[number] for number in range(len(latents))]
    if isinstance(latents, Tensor):
        return [list(range(len(latents)))]
    groups: dict[torch.Size, list[int]] = {}
    for number, latent in enumerate(latents):
        groups.setdefault(latent.shape, []).append(number)
    return list(groups.values())


def stack_group(images: Images, group: list[int]) -> Tensor:
    """Return the images of one group as one tensor."""
    if isinstance(images, Tensor):
        return images if len(group) == len(images) else images[group]
    return torch.stack([images[number] for number in group])


def ungroup(groups: list[list[int]], stacks: Sequence[Images]) -> list[Tensor]:
    """Undo `group_by_shape`: return one tensor per image, in the original order."""
    images: dict[int, Tensor] = {}
    for group, stack in zip(groups, stacks, strict=True):
        images.update(zip(group, stack, strict=True))
    return [images[number] for number in range(len(images))]


def patchify(images: Tensor, size: int) -> Tensor:
    """Cut latents `[image, channel, row, column]` into flat patches `[image, row, column, C * size**2]`."""
    return rearrange(images, "i c (r p) (q s) -> i r q (c p s)", p=size, s=size)


def unpatchify(flat: Tensor, rows: int, size: int) -> Tensor:
    """Undo `patchify`: `[image, patch, C * size**2]`, `rows` rows of patches, to `[image, channel, row, column]`."""
    return rearrange(flat, "i (r q) (c p s) -> i c (r p) (q s)", r=rows, p=size, s=size)


class LinearAdapter(nn.Module):
    """One linear map from a k x k patch of latents to d_model, and one back.

    The timestep embedding is added to every patch, before or after the first map (`ModelConfig.timestep_at`), with
    `ModelConfig.timestep` "added".
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, elements = config.patch_size, config.patch_dim
        self.time_first = config.timestep_at == "patch"
        self.time = None
        if config.timestep == "added":
            self.time = TimestepEmbedding(elements if self.time_first else config.d_model)
        self.in_proj = Linear(elements, config.d_model)
        self.out_proj = Linear(config.d_model, elements)
        self.positions = GridPositions(config.d_model) if config.patch_positions == "learned" else None

    def encode(
        self, latents: Images, timesteps: Tensor, dtype: torch.dtype, separate: bool = False
    ) -> tuple[Tensor, Any]:
        """Map latents `[channel, row, column]` and timesteps `[I]` to vectors `[P, C]`, and a state for `decode`.

        Images of one shape are computed together, or each by itself if `separate`.
        """
        time = None if self.time is None else self.time(timesteps, dtype)
        groups, pieces = group_by_shape(latents, separate), []
        for group in groups:
            stacked = stack_group(latents, group).to(dtype)
            x = patchify(stacked, self.size)
            t_emb = None if time is None else stack_group(time, group)[:, None, None]
            if t_emb is None:
                x = self.in_proj(x)
            else:
                x = self.in_proj(x + t_emb) if self.time_first else self.in_proj(x) + t_emb
            if self.positions is not None:
                x = x + self.positions(*x.shape[1:3]).to(dtype)
            pieces.append(x.flatten(1, 2))
        if len(pieces) == 1:
            return pieces[0].flatten(0, 1), groups
        return torch.cat(ungroup(groups, pieces)), groups

    def decode(self, x: Tensor, latents: Images, groups: Any) -> Images:
        """Map the transformer's output `[P, C]` to one float32 prediction `[channel, row, column]` per image."""
        runs, pieces = _split_images(self.out_proj(x).float(), latents, groups, self.size), []
        for group in groups:
            pieces.append(unpatchify(stack_group(runs, group), latents[group[0]].shape[1] // self.size, self.size))
        return pieces[0] if len(pieces) == 1 else ungroup(groups, pieces)


def _split_images(patches: Tensor, latents: Images, groups: list[list[int]], size: int) -> Images:
    """Split `[P, C]` by image; one tensor `[image, patch, C]` if all images have the same shape."""
    if len(groups) == 1:
        return patches.view(len(latents), -1, patches.shape[-1])
    return patches.split([rows * columns // size**2 for _, rows, columns in shapes_of(latents)])


class GridPositions(nn.Module):
    """Learned embeddings of a patch's row and column: `(rows, columns) -> [row, column, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(MAX_GRID, channels))
        self.column = nn.Parameter(torch.zeros(MAX_GRID, channels))

    def forward(self, rows: int, columns: int) -> Tensor:
        if max(rows, columns) > MAX_GRID:
            raise ValueError(f"image: expected at most {MAX_GRID} patches a side, found {rows}x{columns}")
        return self.row[:rows, None] + self.column[None, :columns]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of `[image, channel, row, column]` (the paper's footnote 7: not adaptive)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(
            x.movedim(1, -1), self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )
        return x.movedim(-1, 1)


class Conv(nn.Conv2d):
    """A `size` x `size` convolution in the dtype of its input; the output's side is the input's over `stride`."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, self.stride, self.padding)


class ResBlock(nn.Module):
    """A residual block of two convolutions, with the timestep, if any, added between them (DDPM, arXiv 2006.11239)."""

    def __init__(self, inputs: int, outputs: int, time_channels: int | None) -> None:
        super().__init__()
        self.first_norm, self.first = ChannelNorm(inputs), Conv(inputs, outputs)
        self.time = None if time_channels is None else Linear(time_channels, outputs, bias=True)
        self.second_norm, self.second = ChannelNorm(outputs), Conv(outputs, outputs)
        self.skip = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        h = self.first(F.silu(self.first_norm(x)))
        if self.time is not None and time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.silu(self.second_norm(h)))


class ImageAttention(nn.Module):
    """Full self-attention over the positions of one feature map, inside the U-Net."""

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


class UNetAdapter(nn.Module):
    """U-Net down blocks before the transformer and up blocks after it, with long skips between them.

    Each level has two residual blocks on the way down and three on the way up (each takes one skip); the lowest has
    attention. There are `log2(patch_size) + 1` levels; the last one meets the transformer's d_model.

    A linear map each way, as in `LinearAdapter`, runs in parallel; it has at most a thousandth of the paper's 0.27B
    parameters. Without it the skips predict all but the noisiest images, the transformer's output is ignored, and
    images do not follow their captions (docs/LOG.md, 2026-11-26).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size, elements = config.patch_size, config.patch_dim
        self.skip_in, self.skip_out = Linear(elements, config.d_model), Linear(config.d_model, elements)
        self.positions = GridPositions(config.d_model) if config.patch_positions == "learned" else None
        levels = config.unet_levels
        time = 4 * levels[0] if config.timestep == "added" else None
        self.time = None if time is None else TimestepEmbedding(time)
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
        self.in_norm = ChannelNorm(current)
        self.in_proj, self.out_proj = Conv(current, config.d_model, 1), Conv(config.d_model, current, 1)
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(levels))):
            for _ in range(3):
                self.up.append(ResBlock(current + skips.pop(), channels, time))
                current = channels
            if level:
                self.up.append(Conv(current, current))
        self.last_norm, self.last = ChannelNorm(current), Conv(current, config.latent_channels)

    def encode(
        self, latents: Images, timesteps: Tensor, dtype: torch.dtype, separate: bool = False
    ) -> tuple[Tensor, Any]:
        """Like `LinearAdapter.encode`; the state for `decode` holds each group's timestep embedding and skips."""
        time = None if self.time is None else self.time(timesteps, dtype)
        groups, pieces, kept = group_by_shape(latents, separate), [], []
        for group in groups:
            stacked = stack_group(latents, group).to(dtype)
            t_emb = None if time is None else stack_group(time, group)
            x = self.first(stacked)
            skips = [x]
            for module in self.down:
                x = module(x, t_emb) if isinstance(module, ResBlock) else module(x)
                skips.append(x)
            x = self.in_proj(self.in_norm(self.down_attention(x)))
            x = rearrange(x, "i c r q -> i r q c") + self.skip_in(patchify(stacked, self.size))
            if self.positions is not None:
                x = x + self.positions(*x.shape[1:3]).to(dtype)
            pieces.append(x.flatten(1, 2))
            kept.append((skips, t_emb, x.shape[1]))
        if len(pieces) == 1:
            return pieces[0].flatten(0, 1), (groups, kept)
        return torch.cat(ungroup(groups, pieces)), (groups, kept)

    def decode(self, x: Tensor, latents: Images, state: Any) -> Images:
        """Like `LinearAdapter.decode`."""
        groups, kept = state
        runs, pieces = _split_images(x, latents, groups, self.size), []
        for group, (skips, time, rows) in zip(groups, kept, strict=True):
            run = stack_group(runs, group)
            h = rearrange(run, "i (r q) c -> i c r q", r=rows)
            h = self.up_attention(self.out_proj(h))
            remaining = list(skips)
            for module in self.up:
                if isinstance(module, ResBlock):
                    h = module(torch.cat([h, remaining.pop()], dim=1), time)
                else:
                    h = module(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            skip = unpatchify(self.skip_out(run), rows, self.size)
            pieces.append(self.last(F.silu(self.last_norm(h))).float() + skip.float())
        return pieces[0] if len(pieces) == 1 else ungroup(groups, pieces)
