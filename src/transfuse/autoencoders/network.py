"""The encoder and decoder of the KL and VQ autoencoders (VQGAN, arXiv 2012.09841).

Tensors are `[image, channel, row, column]`. Modules are named as in diffusers, so that each library opens the other's
folders; tests compare the results.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AutoencoderConfig

EPSILON = 1e-6


class ResidualBlock(nn.Module):
    """A residual block: two times norm, SiLU and a 3 x 3 convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


class Attention(nn.Module):
    """Single-head self-attention over the positions of an image, with a residual connection."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(flat)[:, None], self.to_k(flat)[:, None], self.to_v(flat)[:, None]
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Halve rows and columns by a convolution of stride 2, padded at the bottom and right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double rows and columns by nearest-neighbour upsampling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if `attended`, and the change to the next resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, groups: int, attended: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks)
        )
        if attended:
            self.attentions = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks))
        self.attended = attended

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.resnets):
            x = block(x)
            if self.attended:
                x = self.attentions[number](x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, attended: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attended else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Map images `[image, 3, row, column]` in [-1, 1] to `[image, outputs, row / factor, column / factor]`."""

    def __init__(self, config: AutoencoderConfig, outputs: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for number, width in enumerate(widths):
            before = widths[max(0, number - 1)]
            level = Level(before, width, config.blocks, config.groups, number in config.attended)
            if number < len(widths) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(level)
        self.mid_block = Middle(widths[-1], config.groups, config.middle_attention)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Map latents `[image, latent_channels, row, column]` to images `[image, 3, row * factor, column * factor]`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], config.groups, config.middle_attention)
        self.up_blocks = nn.ModuleList()
        for number, width in enumerate(widths):
            before = widths[max(0, number - 1)]
            attended = len(widths) - 1 - number in config.attended
            level = Level(before, width, config.blocks + 1, config.groups, attended)
            if number < len(widths) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def initialise(module: nn.Module, seed: int) -> None:
    """Initialise a module from `seed`: He's deviation for weights, zero for biases, one for norms.

    The last convolution of every residual block and the output of every attention start at a tenth of that.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = {id(m.conv2) for m in module.modules() if isinstance(m, ResidualBlock)}
    ends |= {id(m.to_out[0]) for m in module.modules() if isinstance(m, Attention)}
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                deviation = (2 / part.weight[0].numel()) ** 0.5 * (0.1 if id(part) in ends else 1.0)
                drawn = torch.empty(part.weight.shape).normal_(0, deviation, generator=generator)
                part.weight.copy_(drawn)
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, nn.GroupNorm):
                part.weight.fill_(1)
                part.bias.zero_()
