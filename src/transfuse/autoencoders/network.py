"""The encoder, decoder and critic of the KL and VQ autoencoders (VQGAN, arXiv 2012.09841), and their configuration.

Tensors are `[image, channel, row, column]`. Modules are named as in diffusers, so that each library opens the other's
folders; tests compare the results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
MAX_BLOCKS = 100  # per resolution, far more than any network has: a damaged file may ask for more than can be built
CRITIC_GROUPS = 8
CRITIC_MIN_SIZE = 24
"""side of the smallest image that the critic scores, in pixels"""


@dataclass(frozen=True)
class AutoencoderConfig:
    """The fields of diffusers' `AutoencoderKL` and `VQModel`, with fewer names.

    kind              "kl": a Gaussian; "vq": the nearest of `codebook_size` vectors of `code_channels`
    widths            channels of each resolution, finest first; the image shrinks by two between them
    blocks            residual blocks of each resolution in the encoder; the decoder has one more
    attended          resolutions (indices of widths) whose blocks are followed by attention
    middle_attention  attention between encoder and bottleneck, and between bottleneck and decoder
    groups            groups of the group norms
    quant_conv, post_quant_conv   1 x 1 convolutions before and after the bottleneck (a "vq" always has both)
    scaling_factor, shift_factor, latents_mean, latents_std
                      normalisation: `(z - mean) / std * scaling_factor` if mean and std are given, by channel, else
                      `(z - shift_factor) * scaling_factor`

    Raises ValueError, naming the field, for values out of range.
    """

    kind: Literal["kl", "vq"] = "kl"
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 8
    groups: int = 32
    attended: tuple[int, ...] = ()
    middle_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    codebook_size: int = 16_384
    code_channels: int = 8
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "latent_channels", "groups", "codebook_size", "code_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"blocks: expected at most {MAX_BLOCKS}, found {self.blocks}")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"widths: expected multiples of groups ({self.groups}), found {self.widths}")
        if any(not 0 <= level < len(self.widths) for level in self.attended):
            raise ValueError(f"attended: expected resolutions 0 to {len(self.widths) - 1}, found {self.attended}")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean: expected together with latents_std, found one of the two")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.bottleneck_channels:
                raise ValueError(f"{name}: expected {self.bottleneck_channels} numbers, found {len(values)}")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ValueError(f"latents_std: expected positive numbers, found {self.latents_std}")

    @property
    def factor(self) -> int:
        """Pixels per latent element, along each side."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def bottleneck_channels(self) -> int:
        """Channels of a latent."""
        return self.latent_channels if self.kind == "kl" else self.code_channels


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
        q, k, v = (project(flat)[:, None] for project in (self.to_q, self.to_k, self.to_v))
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
    """The blocks of one resolution, each followed by attention if `attended`, then `resample`: "down", "up" or None."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, attended: bool, resample: str | None
    ) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (blocks - 1)
        self.resnets = nn.ModuleList(ResidualBlock(width, outputs, groups) for width in widths)
        self.attentions = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks if attended else 0))
        self.downsamplers = nn.ModuleList([Downsample(outputs)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(outputs)] if resample == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.resnets):
            x = block(x)
            if self.attentions:
                x = self.attentions[number](x)
        for resample in (*self.downsamplers, *self.upsamplers):
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
        widths, groups = config.widths, config.groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for number, width in enumerate(widths):
            inputs, last = widths[max(0, number - 1)], number == len(widths) - 1
            attended, way = number in config.attended, None if last else "down"
            self.down_blocks.append(Level(inputs, width, config.blocks, groups, attended, way))
        self.mid_block = Middle(widths[-1], groups, config.middle_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
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
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, config.middle_attention)
        self.up_blocks = nn.ModuleList()
        for number, width in enumerate(widths):
            inputs, last = widths[max(0, number - 1)], number == len(widths) - 1
            attended, way = len(widths) - 1 - number in config.attended, None if last else "up"
            self.up_blocks.append(Level(inputs, width, config.blocks + 1, groups, attended, way))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class PatchCritic(nn.Module):
    """Scores patches of images, `[image, 3, row, column] -> [image, 1, row / 8 - 2, column / 8 - 2]`; positive is real.

    The discriminator of VQGAN (arXiv 1611.07004): three convolutions of stride 2 and two of stride 1, all 4 x 4, so
    that a score has a receptive field of 70 pixels. Group norms replace batch norms, so that a score depends on its
    image alone and a step's result does not depend on how it is split.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 128, 256, 512]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in zip(widths, widths[1:], (2, 2, 1), strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(CRITIC_GROUPS, outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


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
