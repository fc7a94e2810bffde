"""The parts of the transformer, up to the decoder block: pre-norm RMSNorm, SwiGLU, RoPE, no biases, as in Llama.

Shapes: N positions, C channels, H query heads, K key heads, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .attention import Towers
from .config import ModelConfig


class Linear(nn.Linear):
    """A linear map that computes in the dtype of its input, whatever dtype its weights are kept in.

    Master weights stay float32 while the residual stream is bfloat16: explicit, and cheaper on CPU than autocast.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # No `.to` of the same dtype: quantised weights do not support it.
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if x.dim() == 2:
        return F.linear(x, weight, bias)
    # torch multiplies more dimensions in another way, with other last bits, where the weight needs no gradient.
    return F.linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])


class TiedLinear(nn.Module):
    """An output layer without a weight: it reads the embedding's, whatever that is at the time of a pass.

    One matrix is then trained, sharded, averaged and saved once, under the embedding's name.
    """

    bias: Tensor | None = None

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule and its weight has one name
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """The embedding's matrix, `[vocab_size, C]`."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, None)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, taken in float32 and rounded once, to the dtype of the input."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or self.weight.requires_grad:
            return _RMSNorm.apply(x, self.weight, self.eps)
        return _rms_norm(x, self.weight, self.eps)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed `[N, C]`, and the factor of each vector, `[N, 1]` in float32 at least."""
    # Written out: on CPU torch's own rms_norm is made of more, and slower, steps.
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = length.square().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """`_rms_norm`, which keeps its input alone for the backward pass, where autograd would keep float32 products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        scale, wide = scale.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        unit, weighted = x * scale, gradient * weight.to(x.dtype)
        along = (weighted * unit).mean(-1, keepdim=True, dtype=wide).to(x.dtype)
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * unit).flatten(0, -2).sum(0, dtype=wide).to(weight.dtype)
        return torch.addcmul(weighted, unit, along, value=-1).mul_(scale), of_weight, None


class HeadNorm(nn.Module):
    """The weights and biases of one LayerNorm per head, which `Tower.project_qkv` applies."""

    def __init__(self, heads: int, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        # Flat, so that weight decay, which is for matrices, passes them by.
        self.weight = nn.Parameter(torch.ones(heads * channels))
        self.bias = nn.Parameter(torch.zeros(heads * channels))


def head_norm(config: ModelConfig, heads: int) -> HeadNorm | RMSNorm:
    """Return the norm of the queries or keys of `heads` heads."""
    if config.qk_norm_type == "layer":
        return HeadNorm(heads, config.head_dim, config.norm_eps)
    return RMSNorm(config.head_dim * (heads if config.qk_norm_type == "rms-all" else 1), config.norm_eps)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, because one large product is faster than two."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(channels, 2 * hidden)
        self.down = Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if gate_up.requires_grad:
            return self.down(_GatedSiLU.apply(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class _GatedSiLU(torch.autograd.Function):
    """`silu(gate) * up` of `[gate, up]`; the backward pass computes silu again rather than keep it in memory."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)], dim=-1)


Rotary = tuple[Tensor, Tensor]
"""cosines and sines of the rotary embedding, `[N, 1, D]` each"""


def rotary_table(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotary:
    """Cosines and sines `[N, 1, D]` of the rotary embedding (Su et al. 2021; halves rotated, as in Llama).

    positions `[N]`, or `[N, 3]` (`ModelConfig.positions`): the frequencies then turn with the three in rotation, so
    that each of the three has high and low ones (interleaved M-RoPE, Qwen3-VL, arXiv 2511.21631).

    The sines of the first half are negative already, so that rotating takes one product less.
    """
    channels = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency, factor = scaled_frequencies(config.rope_theta ** -(channels / config.head_dim), config)
    positions = positions.to(torch.float32)
    if positions.dim() == 2:
        angle = positions[:, torch.arange(len(frequency), device=positions.device) % 3] * frequency
    else:
        angle = positions[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    if factor != 1:
        cosine, sine = cosine * factor, sine * factor
    both = torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)
    return both[0][:, None].to(dtype), both[1][:, None].to(dtype)


def scaled_frequencies(frequency: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Return the frequencies `[D / 2]` that `rope_scaling` makes of the plain ones, and the factor of q and k."""
    scaling = config.rope_scaling
    match scaling.type:
        case "linear":
            return frequency / scaling.factor, 1.0
        case "llama3":
            turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
            kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            kept = kept.clamp(0, 1)
            return (1 - kept) * frequency / scaling.factor + kept * frequency, 1.0
        case "yarn":

            def channel_of(turns: float) -> float:
                """Return the channel that turns so often within the length of pretraining."""
                wavelength = scaling.original_max_seq_len / (turns * 2 * math.pi)
                return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

            low, high = channel_of(scaling.beta_fast), channel_of(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, config.head_dim - 1)
            channel = torch.arange(len(frequency), device=frequency.device, dtype=torch.float32)
            divided = ((channel - low) / max(high - low, 0.001)).clamp(0, 1)
            factor = scaling.attention_factor
            if factor is None:
                factor = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
            return frequency / scaling.factor * divided + frequency * (1 - divided), factor
    return frequency, 1.0


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Apply the rotary embedding to `[N, H, D]`."""
    cosine, sine = table
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep through a two-layer perceptron: `[I] -> [I, C]`.

    The paper names no size; a perceptron as wide as the model is what its Table 7 percentages imply.
    """

    sinusoids = 256

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = Linear(self.sinusoids, channels, bias=True)
        self.outer = Linear(channels, channels, bias=True)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.sinusoids // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=timesteps.device) / half)
        angle = timesteps[:, None].float() * frequency
        return self.outer(F.silu(self.inner(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))))


class TimestepModulation(nn.Module):
    """Timesteps `[I]` to the six vectors `[I, 6 * C]` by which every block modulates an image's positions.

    They are shift, scale and gate of attention, then of the feed-forward layer. All blocks share the projection,
    and each adds six learned vectors (PixArt-alpha, arXiv 2310.00426): DiT's projection, one in each block, is half as
    large again as the block.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time = TimestepEmbedding(channels)
        self.out = Linear(channels, 6 * channels, bias=True)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out(F.silu(self.time(timesteps, dtype)))


Six = tuple[Tensor, ...]
"""shift, scale and gate of attention, then of the feed-forward layer, at each position: `[N, C]` each"""


class Modulation(NamedTuple):
    """The vectors of a pass's images, and where the images are.

    vectors [I, 6 * C]   of `TimestepModulation`
    image [N]            the image of each position, I for text
    patches [P]          positions of the patches, image after image
    counts               patches of each image
    """

    vectors: Tensor
    image: Tensor
    patches: Tensor
    counts: Sequence[int]


class _Spread(torch.autograd.Function):
    """Rows `[I, C]` to positions `[N, C]`; the gradient is summed image by image, in one order on every device."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, image: Tensor, patches: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(patches)
        ctx.counts = list(counts)
        return F.pad(rows, (0, 0, 0, 1)).index_select(0, image)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (patches,) = ctx.saved_tensors
        of_patches = gradient.index_select(0, patches)
        return torch.stack([part.sum(0) for part in of_patches.split(ctx.counts)]), None, None, None


class Tower(nn.Module):
    """The weights of a decoder block for one kind of position, and all of its arithmetic but attention.

    `six` are the vectors that modulate each position (`Modulation`), with `timestep="adaln"`.
    `attention=False` builds the feed-forward half alone. `layer` is the block's number, `ffn_dim` the channels inside
    the SwiGLU layer.
    """

    def __init__(self, config: ModelConfig, layer: int, ffn_dim: int, attention: bool = True) -> None:
        super().__init__()
        self.n_heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.pre_norm, self.dropout = config.norm_order == "pre", config.dropout
        self.has_attention = attention
        if attention:
            self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
            self.qkv = Linear(config.d_model, config.qkv_dim, config.qkv_bias)
            self.out = Linear(config.heads_dim, config.d_model)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config.d_model, ffn_dim)
        self.has_positions = layer not in config.nope_layers
        normed = attention and config.qk_norm
        self.query_norm = head_norm(config, self.n_heads) if normed else None
        self.key_norm = head_norm(config, self.kv_heads) if normed else None

    def project_qkv(self, x: Tensor, rotary: Rotary, six: Six | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries `[N, H, D]` and keys `[N, K, D]`, and values `[N, K, D]`."""
        # `view` and `split_with_sizes`, because `unflatten` and `split` run Python code, which one token's pass feels.
        rotated = self.n_heads + self.kv_heads
        h = self.attention_norm(x) if self.pre_norm else x
        qkv = self.qkv(h if six is None else torch.addcmul(six[0], h, 1 + six[1]))
        qkv = qkv.view(-1, rotated + self.kv_heads, self.head_dim)
        qk, v = qkv.split_with_sizes([rotated, self.kv_heads], dim=1)
        if isinstance(self.query_norm, HeadNorm) and isinstance(self.key_norm, HeadNorm):
            # One call for queries and keys: on CPU two calls and a concatenation cost half as much again.
            weight = torch.cat([self.query_norm.weight, self.key_norm.weight]).to(qk.dtype).view(qk.shape[1:])
            bias = torch.cat([self.query_norm.bias, self.key_norm.bias]).to(qk.dtype).view(qk.shape[1:])
            qk = torch.addcmul(bias, F.layer_norm(qk, qk.shape[-1:], eps=self.query_norm.eps), weight)
        elif self.query_norm is not None and self.key_norm is not None:
            q, k = qk.split_with_sizes([self.n_heads, self.kv_heads], dim=1)
            # The norm's weights are those of one head, or of all.
            q = self.query_norm(q.reshape(len(q), -1, self.query_norm.weight.shape[0])).view_as(q)
            k = self.key_norm(k.reshape(len(k), -1, self.key_norm.weight.shape[0])).view_as(k)
            qk = torch.cat([q, k], dim=1)
        if self.has_positions:
            qk = rotate(qk, rotary)
        q, k = qk.split_with_sizes([self.n_heads, self.kv_heads], dim=1)
        return q, k, v

    def add_attention(self, x: Tensor, attended: Tensor, dropout: Generator | None, six: Six | None) -> Tensor:
        """Add the heads' outputs `[N, H * D]` to the residual stream `[N, C]`."""
        out = self.out(attended)
        out = self._drop(out if self.pre_norm else self.attention_norm(out), dropout)
        return x + out if six is None else torch.addcmul(x, out, 1 + six[2])

    def add_feed_forward(self, x: Tensor, dropout: Generator | None, six: Six | None) -> Tensor:
        """Add the feed-forward layer's output to the residual stream `[N, C]`."""
        h = self.feed_forward_norm(x) if self.pre_norm else x
        out = self.feed_forward(h if six is None else torch.addcmul(six[3], h, 1 + six[4]))
        out = self._drop(out if self.pre_norm else self.feed_forward_norm(out), dropout)
        return x + out if six is None else torch.addcmul(x, out, 1 + six[5])

    def finish(self, x: Tensor, attended: Tensor, dropout: Generator | None = None, six: Six | None = None) -> Tensor:
        """Return the block's output, given its input `[N, C]` and the heads' outputs `[N, H * D]`."""
        return self.add_feed_forward(self.add_attention(x, attended, dropout, six), dropout, six)

    def _drop(self, x: Tensor, generator: Generator | None) -> Tensor:
        if generator is None or not self.dropout:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * kept.div_(1 - self.dropout)


class Block(Tower):
    """One decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`. `[N, C] -> [N, C]`.

    With `norm_order="swin"` the outputs are normed instead: `x + norm(attention(x))`. With `timestep="adaln"` each half
    is `x + gate * f(norm(x) * (1 + scale) + shift)` at an image's positions (adaLN-zero, DiT, arXiv 2212.09748).

    `image` is the tower of image positions with `experts` (Mixture-of-Transformers, arXiv 2411.04996); the block's
    remaining weights are then the tower of text. It takes such positions apart, as `Towers`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, config.ffn_dim)
        self.layer = layer
        self.image: Tower | None = None
        if config.experts != "shared":
            self.image = Tower(config, layer, config.image_ffn_dim, config.experts == "all")
        # Flat, so that weight decay, which is for matrices, passes it by. Gates are stored less 1, so that zeros in
        # place of all six vectors leave text as it is.
        self.modulation = nn.Parameter(torch.zeros(6 * config.d_model)) if config.timestep == "adaln" else None

    def forward(
        self, x: Any, rotary: Any, attend: Any, dropout: Generator | None = None, modulation: Modulation | None = None
    ) -> Any:
        """Map `x [N, C]`, with its rotary table; or `Towers` of both, with an `AttendTowers` unless text is None."""
        six = None
        if modulation is not None and self.modulation is not None:
            vectors = (modulation.vectors + self.modulation).to(modulation.vectors.dtype)
            # Each position has its image's vectors, or zeros if it is text.
            six = _Spread.apply(vectors, modulation.image, modulation.patches, modulation.counts).chunk(6, dim=-1)
        if not isinstance(x, Towers):
            q, k, v = self.project_qkv(x, rotary, six)
            return self.finish(x, attend(self.layer, q, k, v), dropout, six)
        image_qkv = self.project_image_qkv(x.image, rotary.image, six)
        if x.text is None:
            return Towers(None, self.finish_image(x.image, attend(self.layer, *image_qkv), dropout, six))
        text_qkv = self.project_qkv(x.text, rotary.text)
        out = attend(self.layer, *map(Towers, text_qkv, image_qkv))
        return Towers(self.finish(x.text, out.text, dropout), self.finish_image(x.image, out.image, dropout, six))

    def project_image_qkv(self, x: Tensor, rotary: Rotary, six: Six | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `project_qkv` of image positions, by the image tower if it has weights for attention."""
        assert self.image is not None
        return (self.image if self.image.has_attention else self).project_qkv(x, rotary, six)

    def finish_image(self, x: Tensor, attended: Tensor, dropout: Generator | None, six: Six | None) -> Tensor:
        """Return `finish` of image positions."""
        assert self.image is not None
        owner = self.image if self.image.has_attention else self
        return self.image.add_feed_forward(owner.add_attention(x, attended, dropout, six), dropout, six)
