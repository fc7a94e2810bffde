"""The trunk: a Llama-style decoder (pre-norm RMSNorm, SwiGLU, RoPE, no biases) over a flat run of positions.

It sees vectors, positions and an `attend` function; what a token or a patch is, it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attend
from .config import ModelConfig
from .layers import HeadNorm, Linear, RMSNorm, SwiGLU, norm_heads, rotary_table, rotate


class Block(nn.Module):
    """One decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`. `[N, C] -> [N, C]`.

    With `norm_order="swin"` the norms are of what is added: `x + norm(attention(x))`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.key_heads = layer, config.heads, config.key_heads
        self.head_channels = config.head_channels
        self.pre_norm, self.dropout = config.norm_order == "pre", config.dropout
        readers = (("attention_norm", "qkv"), ("feed_forward_norm", "feed_forward.gate_up"))
        self.normed = readers if self.pre_norm else ()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_channels)
        self.out = Linear(config.width, config.width)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.hidden_channels)
        self.query_norm = HeadNorm(self.heads, self.head_channels, config.norm_eps) if config.qk_norm else None
        self.key_norm = HeadNorm(self.key_heads, self.head_channels, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, dropout: torch.Generator | None = None
    ) -> Tensor:
        q, k, v = self.before(x, rotary)
        return self.after(x, attend(self.layer, q, k, v), dropout)

    def before(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is asked: queries `[N, H, D]`, keys and values `[N, K, D]`."""
        # `view` and `split_with_sizes`, not `unflatten`, `split` and `len`: those are Python, felt when one token is
        # decoded.
        asked = self.heads + self.key_heads
        qkv = self.qkv(self.attention_norm(x) if self.pre_norm else x)
        qkv = qkv.view(-1, asked + self.key_heads, self.head_channels)
        qk, v = qkv.split_with_sizes([asked, self.key_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            qk = norm_heads(qk, self.query_norm, self.key_norm)
        q, k = rotate(qk, rotary).split_with_sizes([self.heads, self.key_heads], dim=1)
        return q, k, v

    def after(self, x: Tensor, attended: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """What the block makes of attention's answer `[N, H * D]`."""
        if self.pre_norm:
            x = x + self._drop(self.out(attended), dropout)
            return x + self._drop(self.feed_forward(self.feed_forward_norm(x)), dropout)
        x = x + self._drop(self.attention_norm(self.out(attended)), dropout)
        return x + self._drop(self.feed_forward_norm(self.feed_forward(x)), dropout)

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.dropout:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * kept.div_(1 - self.dropout)


class Transformer(nn.Module):
    """All blocks and the final norm. `x [N, C], positions [N] -> [N, C]`; `dropout` draws what is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, dropout: torch.Generator | None = None) -> Tensor:
        rotary = self._rotary(positions, x.dtype)
        for block in self.blocks:
            x = block(x, rotary, attend, dropout)
        return self.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines; looked up where a CPU writes token by token, for there their making is felt."""
        shape = self.config.head_channels, self.config.rope_theta, dtype
        if positions.is_cuda or not torch.is_inference_mode_enabled():
            return rotary_table(positions, *shape)
        most = int(positions.max()) + 1
        if dtype not in self._tables or len(self._tables[dtype][0]) < most:
            self._tables[dtype] = rotary_table(torch.arange(max(most, self.config.context)), *shape)
        cosine, sine = self._tables[dtype]
        return cosine.index_select(0, positions), sine.index_select(0, positions)
